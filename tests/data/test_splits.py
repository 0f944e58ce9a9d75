import math

import pytest

from ctrl_jax.data.conversations import Record, Turn, transcript
from ctrl_jax.data.splits import SPLITS, arranged, defect


def conversation(*contents):
    return tuple(Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents))


def record(*contents):
    return Record(conversation(*contents))


# Four records of each opening: two prompts, each of them twice.
DIALOGUES = [
    record(f"Opening {i}", *rest) for i in range(1000) for rest in ((), ("Go on.", f"More of {i}")) for _ in range(2)
]


def sizes(loaded):
    return {split: len(records) for split, records in loaded.records.items()}


def openings(records):
    return {record.prompt[0].content for record in records}


@pytest.mark.parametrize("name", SPLITS)
def test_one_file_is_cut_80_10_10_by_the_opening(name):
    loaded = arranged({name: DIALOGUES}, {})
    assert (loaded.rows, loaded.dropped) == (4000, {})
    found = {split: openings(records) for split, records in loaded.records.items()}
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        error = math.sqrt(1000 * share * (1 - share))
        assert abs(len(found[split]) - 1000 * share) < 4 * error
        # Whatever begins alike is in one split, all four records of it.
        assert sizes(loaded)[split] == 4 * len(found[split])
    assert sum(map(len, found.values())) == 1000


def test_the_cut_depends_on_the_opening_alone():
    loaded = arranged({"train": DIALOGUES}, {})
    fewer = arranged({"train": list(reversed(DIALOGUES[::3]))}, {})
    for split in SPLITS:
        assert openings(fewer.records[split]) <= openings(loaded.records[split])
        assert fewer.records[split]


def test_a_published_test_stays_and_validation_comes_from_train():
    test = [record(f"Test {i}") for i in range(100)]
    loaded = arranged({"train": DIALOGUES, "test": test}, {})
    assert loaded.records["test"] == test
    assert sizes(loaded)["train"] + sizes(loaded)["validation"] == 4000
    assert abs(len(openings(loaded.records["validation"])) - 50) < 4 * math.sqrt(1000 * 0.05 * 0.95)
    assert openings(loaded.records["train"]).isdisjoint(openings(loaded.records["validation"]))


def test_without_a_test_it_is_half_of_validation():
    train = [record(f"Train {i}") for i in range(10)]
    loaded = arranged({"train": train, "validation": DIALOGUES}, {})
    assert loaded.records["train"] == train
    assert sizes(loaded)["validation"] + sizes(loaded)["test"] == 4000
    assert abs(len(openings(loaded.records["test"])) - 500) < 4 * math.sqrt(1000 / 4)
    assert openings(loaded.records["validation"]).isdisjoint(openings(loaded.records["test"]))


def test_a_prompt_is_in_one_split_and_what_leaves_is_counted():
    a, b, c, d = (record(name) for name in "abcd")
    loaded = arranged({"train": [a, b, c, c, d], "validation": [a, b], "test": [a]}, {"empty response": 2, "never": 0})
    assert loaded.records == {"train": [c, c, d], "validation": [b], "test": [a]}
    assert loaded.dropped == {"empty response": 2, "prompt in another split": 3}
    assert loaded.rows == 5 + 2 + 1 + 2


def test_prompts_are_compared_by_their_text():
    whole = Record((Turn("user", "a\n\nAssistant: b\n\nHuman: c"),))
    turns = record("a", "b", "c")
    assert transcript(whole.prompt) == transcript(turns.prompt)
    loaded = arranged({"train": [whole], "validation": [record("x")], "test": [turns]}, {})
    assert loaded.dropped == {"prompt in another split": 1}


def test_defects():
    prompt = conversation("a")
    assert defect(Record(prompt)) is None
    assert defect(Record(prompt, "r", "c", "d")) is None
    for empty in (Record(prompt, " \n"), Record(prompt, "r", "", "d"), Record(prompt, None, "c", "")):
        assert defect(empty) == "empty response"
    assert defect(Record(prompt, None, "c", "c")) == "chosen equals rejected"
