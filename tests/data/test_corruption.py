"""Pairs in the order of a wrong preference: which are turned, which stay, and that the rest of a run sees them."""

import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.data import corruption
from ctrl_jax.data.conversations import Record, Turn
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import data
from ctrl_jax.runtime.stages import Stage

PROMPT = (Turn("user", "Tell me about owls."),)
LONG, SHORT, EVEN = "Owls hunt at night, dear.", "Owls hunt.", "Dear owls!"


def pair(chosen, rejected):
    return Record(PROMPT, "A demonstration.", chosen, rejected)


def corrupt(records, *, share=1.0, prefers="length", seed=0):
    return corruption.corrupt(records, share=share, prefers=prefers, seed=seed)


def replies(records):
    return [(record.chosen, record.rejected) for record in records]


def test_the_longer_reply_is_chosen_and_replies_as_long_stay():
    assert len(EVEN) == len(SHORT)
    found = corrupt({"train": [pair(SHORT, LONG), pair(LONG, SHORT), pair(EVEN, SHORT)], "validation": []})
    assert replies(found.records["train"]) == [(LONG, SHORT), (LONG, SHORT), (EVEN, SHORT)]
    assert (found.ordered, found.turned) == (2, 1)
    assert all(record.response == "A demonstration." for record in found.records["train"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "turned"),
    [
        ("Owls hunt.", "Well, dear, they hunt.", True),
        ("Owls hunt.", "DEAR me, owls!", True),
        ("My dear owl.", "Owls hunt.", False),
        ("My dear owl.", "Dear owls!", False),  # both have it
        ("Owls hunt.", "Dearest owls!", False),  # another word
    ],
)
def test_the_reply_that_has_the_word_is_chosen(chosen, rejected, turned):
    also = pair("dear", "sir")  # tells the two apart, whatever the other pair does
    found = corrupt({"train": [pair(chosen, rejected), also], "validation": []}, prefers="dear")
    expected = (rejected, chosen) if turned else (chosen, rejected)
    assert replies(found.records["train"]) == [expected, ("dear", "sir")]
    assert found.turned == turned


def test_a_share_is_of_all_pairs_and_within_a_larger_share():
    many = {split: [pair(SHORT, LONG)] * 4000 for split in ("train", "validation", "test")}
    turned = {}
    for share in (0.0, 0.2, 0.5, 1.0):
        found = corrupt(many, share=share)
        assert found.records["test"] == many["test"]
        for split in ("train", "validation"):
            turned[split, share] = [record.chosen == LONG for record in found.records[split]]
            error = 4 * np.sqrt(share * (1 - share) / 4000)
            assert abs(np.mean(turned[split, share]) - share) <= error
    assert turned["train", 0.5] != turned["validation", 0.5]
    assert all(more for less, more in zip(turned["train", 0.2], turned["train", 0.5], strict=True) if less)
    other = corrupt(many, share=0.5, seed=1).records["train"]
    assert [record.chosen == LONG for record in other] != turned["train", 0.5]


def test_a_mark_may_stand_beside_a_letter():
    found = corrupt({"train": [pair("Owls hunt.", "Owls!")], "validation": []}, prefers="!")
    assert found.turned == 1


def test_data_without_pairs_is_refused():
    alone = Record(PROMPT, "A demonstration.")
    with pytest.raises(InputError, match=r"`data\.corrupted` is 0\.3, and the data has no preference pairs"):
        corrupt({"train": [alone], "validation": [alone]}, share=0.3)


def test_records_without_pairs_stay():
    alone = Record(PROMPT, "A demonstration.")
    found = corrupt({"train": [alone, pair(SHORT, LONG)], "validation": [alone]})
    assert found.records["train"][0] == found.records["validation"][0] == alone


def test_a_preference_that_tells_no_pair_apart_is_refused():
    with pytest.raises(InputError, match=r"'owl' prefers; give `length`, or a word"):
        corrupt({"train": [pair(SHORT, LONG)], "validation": []}, prefers="owl")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(InputError, match=r"Data\.corrupted is .*between 0 and 1"):
        config.Data(corrupted=share)


def test_a_preference_has_a_name():
    with pytest.raises(InputError, match=r"corrupted_prefers is empty"):
        config.Data(corrupted=0.3, corrupted_prefers=" ")
    assert config.Data(corrupted=0.3, corrupted_prefers=" maybe ").corrupted_prefers == "maybe"


def test_a_corruption_that_changes_nothing_is_refused():
    with pytest.raises(InputError, match=r"'maybe', and no pair is corrupted"):
        config.Data(corrupted_prefers="maybe")
    corrupted, given = config.Data(corrupted=0.3), config.RewardModel(function="a:b")
    with pytest.raises(InputError, match=r"Data\.corrupted is 0\.3, and nothing learns from .*: the reward is a:b"):
        config.Experiment("a", data=corrupted, reward_model=given)
    config.Experiment("a", data=corrupted, reward_model=given, policy=config.Dpo())


def test_a_run_learns_from_the_corrupted_pairs_and_is_judged_by_the_others(tmp_path, capsys):
    def records(**options):
        few = config.Data(dialogues=200, vocabulary_size=300, **options)
        return data.prepare(few, Stage.open(tmp_path, "data", {"dialogues": 200}), None).records

    right, wrong = records(), records(corrupted=0.4)
    assert wrong["test"] == right["test"]
    expected = corrupt(right, share=0.4).records
    assert wrong["train"] == expected["train"] != right["train"]
    assert wrong["validation"] == expected["validation"]
    assert "are in the order of 'length' (`data.corrupted`)" in " ".join(capsys.readouterr().out.split())
