import hashlib
import json

import jax
import numpy as np
import pytest

from ctrl_jax.data import pipelines, tokenizers
from ctrl_jax.data.conversations import Record, Turn, parse, transcript
from ctrl_jax.data.dialogues import config, records
from ctrl_jax.errors import InputError
from ctrl_jax.types import Examples

RECORDS = list(records(config("helpful", seed=0, count=600), "train"))
TOKENIZER = tokenizers.train([f"{transcript(r.prompt)} {r.response}" for r in RECORDS], vocabulary_size=512)
LENGTHS = {"prompt_length": 24, "response_length": 36}


def test_prompts_are_distinct_in_order_and_padded():
    doubled = [*RECORDS[:20], *RECORDS[5:10]]
    found = pipelines.prompts(doubled, TOKENIZER, prompt_length=24)
    assert list(found.texts) == [transcript(record.prompt) for record in RECORDS[:20]]
    assert found.conversations == tuple(record.prompt for record in RECORDS[:20])
    assert found.dropped == 0
    assert found.prompts.tokens.shape == (20, 24)
    assert len(set(found.prompts.ids.tolist())) == 20
    for i, text in enumerate(found.texts):
        ids = TOKENIZER.encode(text)
        assert found.prompts.lengths[i] == len(ids)
        assert found.prompts.tokens[i].tolist() == ids + [TOKENIZER.pad_id] * (24 - len(ids))
        assert found.prompts.ids[i] == int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little")


def test_the_first_prompts_can_be_asked_for_alone():
    doubled = [*RECORDS[:3], *RECORDS[:20]]
    found = pipelines.prompts(doubled, TOKENIZER, prompt_length=24, count=5)
    assert found.texts == pipelines.prompts(RECORDS[:5], TOKENIZER, prompt_length=24).texts
    assert len(pipelines.prompts(doubled, TOKENIZER, prompt_length=24, count=50).texts) == 20


def test_demonstrations_end_in_eos_and_are_cut():
    examples = pipelines.demonstrations(RECORDS, TOKENIZER, **LENGTHS).examples
    short = pipelines.demonstrations(RECORDS, TOKENIZER, prompt_length=24, response_length=12).examples
    assert examples.responses.tokens.shape == (600, 1, 36)
    assert examples.prompts.tokens.shape == (600, 24)
    cut = 0
    for i, record in enumerate(RECORDS):
        ids = [*TOKENIZER.encode(" " + record.response), TOKENIZER.eos_ids[0]]
        length = examples.responses.lengths[i, 0]
        assert length == min(len(ids), 36)
        assert examples.responses.tokens[i, 0, :length].tolist() == ids[:36]
        assert (examples.responses.tokens[i, 0, length:] == TOKENIZER.pad_id).all()
        assert short.responses.tokens[i, 0].tolist() == (ids + [TOKENIZER.pad_id] * 12)[:12]
        cut += len(ids) > 12
    assert cut


def test_a_reply_without_a_token_is_dropped_and_counted():
    mixed = [Record(parse("Why?"), "", "", "No."), RECORDS[0]]
    for make in (pipelines.demonstrations, pipelines.preference_pairs):
        found = make(mixed, TOKENIZER, **LENGTHS)
        assert (found.empty, found.dropped, found.equal, len(found.examples.prompts.ids)) == (1, 0, 0, 1)
        with pytest.raises(InputError, match=r"None of 1 records is left to learn .* 1 a reply without a token"):
            make(mixed[:1], TOKENIZER, **LENGTHS)


def test_pairs_that_the_cut_makes_equal_are_dropped_and_counted():
    prompt = parse("Why?")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    long, other = " ".join(words), " ".join([*words[:-1], "nine"])
    first, second = (TOKENIZER.encode_response(text) for text in (long, other))
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    records = [Record(prompt, None, long, other), Record(prompt, None, long, "No."), Record(prompt, None, "No.", long)]
    cut = {"prompt_length": 24, "response_length": same}
    found = pipelines.preference_pairs(records, TOKENIZER, **cut)
    assert (found.equal, found.empty, found.dropped, found.unended) == (1, 0, 0, 0)
    assert found.examples.responses.tokens.shape == (2, 2, same)
    whole = pipelines.preference_pairs(records, TOKENIZER, **(cut | {"response_length": same + 1}))
    assert (whole.equal, whole.unended) == (0, len(first) > same + 1)
    with pytest.raises(InputError, match=rf"1 have replies that are equal as far as `data.response_length` {same}"):
        pipelines.preference_pairs(records[:1], TOKENIZER, **cut)


def test_examples_that_do_not_end_are_counted():
    short = {"prompt_length": 24, "response_length": 12}
    ends = [len(TOKENIZER.encode_response(record.response)) <= 12 for record in RECORDS]
    assert 0 < sum(ends) < len(ends)
    assert pipelines.demonstrations(RECORDS, TOKENIZER, **short).unended == len(ends) - sum(ends)
    both = [
        all(len(TOKENIZER.encode_response(reply)) > 12 for reply in (record.chosen, record.rejected))
        for record in RECORDS
    ]
    found = pipelines.preference_pairs(RECORDS, TOKENIZER, **short)
    assert found.unended == sum(both) - found.equal


def test_the_first_examples_can_be_asked_for_alone():
    for make in (pipelines.demonstrations, pipelines.preference_pairs):
        found = make([LONG, *RECORDS], TOKENIZER, **LENGTHS, count=5)
        expected = make(RECORDS[:5], TOKENIZER, **LENGTHS)
        np.testing.assert_array_equal(found.examples.responses.tokens, expected.examples.responses.tokens)


def test_chosen_replies_can_be_the_demonstrations():
    found = pipelines.demonstrations(RECORDS, TOKENIZER, **LENGTHS, field="chosen")
    as_responses = [Record(record.prompt, record.chosen) for record in RECORDS]
    expected = pipelines.demonstrations(as_responses, TOKENIZER, **LENGTHS)
    np.testing.assert_array_equal(found.examples.responses.tokens, expected.examples.responses.tokens)
    pairs = [Record(record.prompt, None, record.chosen, record.rejected) for record in RECORDS]
    with pytest.raises(InputError, match=r"`data\.demonstrations=chosen`"):
        pipelines.demonstrations(pairs, TOKENIZER, **LENGTHS)


def test_pairs_have_the_chosen_response_first_and_decode_back():
    pairs = pipelines.preference_pairs(RECORDS, TOKENIZER, prompt_length=24, response_length=48).examples
    assert pairs.responses.tokens.shape == (600, 2, 48)
    assert pipelines.decoded(pairs.responses, TOKENIZER) == [[r.chosen, r.rejected] for r in RECORDS]


@pytest.mark.parametrize("text", ["", "  \n", "\n\nHuman: \n\nAssistant:"])
def test_an_empty_prompt_is_refused_with_its_record(text):
    with pytest.raises(InputError, match="record 1 is empty"):
        pipelines.prompts([RECORDS[0], Record(parse(text))], TOKENIZER, prompt_length=24)


LONG = Record(parse("Why chess? " * 20), "No.", "No.", "Yes.")


def test_long_prompts_are_dropped_and_counted():
    mixed = [LONG, RECORDS[0], LONG, RECORDS[1]]
    for make in (pipelines.demonstrations, pipelines.preference_pairs):
        found = make(mixed, TOKENIZER, **LENGTHS)
        assert found.dropped == 2, "records"
        expected = make(RECORDS[:2], TOKENIZER, **LENGTHS).examples
        for leaf, other in zip(jax.tree.leaves(found.examples), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(leaf, other)
    prompts = pipelines.prompts(mixed, TOKENIZER, prompt_length=24)
    assert prompts.dropped == 1, "distinct prompts"
    assert prompts.conversations == (RECORDS[0].prompt, RECORDS[1].prompt)


def test_long_prompts_are_cut_on_the_left():
    tokens = TOKENIZER.encode_prompt(LONG.prompt)
    assert len(tokens) > 24
    found = pipelines.prompts([LONG], TOKENIZER, prompt_length=24, long_prompts="truncate")
    assert found.prompts.tokens.tolist() == [tokens[-24:]]
    assert found.prompts.lengths.tolist() == [24]
    assert (found.texts, found.dropped) == ((transcript(LONG.prompt),), 0)
    pairs = pipelines.preference_pairs([LONG, RECORDS[0], LONG], TOKENIZER, **LENGTHS, long_prompts="truncate")
    assert pairs.examples.prompts.tokens[::2].tolist() == [tokens[-24:]] * 2
    assert (pairs.cut, pairs.dropped) == (2, 0), "pairs, not prompts"


def test_of_a_long_conversation_the_oldest_turns_go_first():
    last = Turn("user", "And now?")
    long = (Turn("user", "Tell me of soup. " * 9), Turn("assistant", "It is hot."), last)
    expected = TOKENIZER.encode_prompt((last,))
    assert len(expected) < 24 < len(TOKENIZER.encode_prompt(long))
    found = pipelines.prompts([Record(long)], TOKENIZER, prompt_length=24, long_prompts="truncate")
    assert found.prompts.tokens[0, : len(expected)].tolist() == expected
    assert found.prompts.lengths.tolist() == [len(expected)]
    assert found.conversations == (long,)


def test_nothing_but_long_prompts_is_refused_with_both_lengths():
    long = len(TOKENIZER.encode_prompt(LONG.prompt))
    with pytest.raises(InputError, match=f"more than 24 tokens, the shortest {long}.*truncate"):
        pipelines.demonstrations([LONG], TOKENIZER, **LENGTHS)


def test_records_without_replies_are_passed_over_until_there_are_none():
    bare = Record(RECORDS[0].prompt)
    assert len(pipelines.demonstrations([bare, RECORDS[1]], TOKENIZER, **LENGTHS).examples.prompts.ids) == 1
    assert len(pipelines.preference_pairs([bare, RECORDS[1]], TOKENIZER, **LENGTHS).examples.prompts.ids) == 1
    with pytest.raises(InputError, match=r"None of the 2 .*prompts alone.*`sft.steps=0`"):
        pipelines.demonstrations([bare, bare], TOKENIZER, **LENGTHS)
    with pytest.raises(InputError, match=r"None of the 1 .* 1 have a response, 0 a pair.*`reward_model.function`"):
        pipelines.preference_pairs([Record(bare.prompt, "Yes.")], TOKENIZER, **LENGTHS)


def test_only_the_tokenizer_knows_how_a_conversation_is_read():
    class Letters:
        pad_id = 0
        eos_ids = (1, 2)

        def encode_prompt(self, conversation):
            return [3 + len(turn.content) for turn in conversation]

        def encode_response(self, text):
            return [100 + len(text), 1]

    records = [
        Record((Turn("user", "ab"),), "x", "xy", "xyz"),
        Record((Turn("system", ""), Turn("user", "a"), Turn("assistant", "abcd"), Turn("user", "abc")), "", "xy", "x"),
    ]
    pairs = pipelines.preference_pairs(records, Letters(), prompt_length=4, response_length=2).examples
    assert pairs.prompts.tokens.tolist() == [[5, 0, 0, 0], [3, 4, 7, 6]]
    assert pairs.responses.tokens.tolist() == [[[102, 1], [103, 1]], [[102, 1], [101, 1]]]
    assert pairs.prompts.ids.tolist() == pipelines.prompts(records, Letters(), prompt_length=4).prompts.ids.tolist()


def test_no_records_are_refused():
    with pytest.raises(InputError, match="no records"):
        pipelines.prompts([], TOKENIZER, prompt_length=24)


def _tree(size):
    return {"row": np.arange(size), "double": (2 * np.arange(size, dtype=np.float32))[:, None]}


def _rows(iterator, count):
    return [next(iterator)["row"].tolist() for _ in range(count)]


def test_unshuffled_batches_are_the_rows_in_turn():
    iterator = pipelines.batches(_tree(10), batch_size=4, seed=0, shuffle=False)
    expected = (np.arange(20) % 10).reshape(5, 4)
    for row in expected:
        batch = next(iterator)
        np.testing.assert_array_equal(batch["row"], row)
        np.testing.assert_array_equal(batch["double"], 2.0 * row[:, None])


def test_each_epoch_is_another_permutation():
    rows = np.concatenate(_rows(pipelines.batches(_tree(12), batch_size=4, seed=0), 9)).reshape(3, 12)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(12))
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_rows_that_are_to_be_distinct_are_so_in_every_batch_and_all_come():
    mixed = _rows(pipelines.batches(_tree(10), batch_size=8, seed=0), 30)
    assert any(len(set(rows)) < 8 for rows in mixed)
    rows = _rows(pipelines.batches(_tree(10), batch_size=8, seed=0, distinct=True), 30)
    assert all(len(set(batch)) == 8 for batch in rows)
    assert {row for batch in rows for row in batch} == set(range(10))
    whole, same = (_rows(pipelines.batches(_tree(12), batch_size=4, seed=0, distinct=x), 30) for x in (True, False))
    assert whole == same, "where the batches divide the rows"


def test_the_seed_alone_gives_the_order():
    first, same, other = (_rows(pipelines.batches(_tree(100), batch_size=8, seed=seed), 20) for seed in (3, 3, 4))
    assert first == same != other


def test_batches_keep_the_type_of_a_tree():
    examples = pipelines.demonstrations(RECORDS, TOKENIZER, **LENGTHS).examples
    batch = next(pipelines.batches(examples, batch_size=8, seed=0))
    assert isinstance(batch, Examples)
    assert isinstance(batch.responses.tokens, np.ndarray)
    for i, prompt_id in enumerate(batch.prompts.ids):
        assert prompt_id in examples.prompts.ids[(examples.responses.tokens == batch.responses.tokens[i]).all((1, 2))]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_together_see_what_one_would(processes):
    # 11 rows do not divide among the processes: an epoch's end falls inside a batch.
    alone = _rows(pipelines.batches(_tree(11), batch_size=8, seed=0), 10)
    shares = [
        _rows(pipelines.batches(_tree(11), batch_size=8, seed=0, process_index=i, process_count=processes), 10)
        for i in range(processes)
    ]
    assert [[row for part in parts for row in part] for parts in zip(*shares, strict=True)] == alone


def test_the_state_goes_through_json_and_to_another_number_of_processes():
    iterator = pipelines.batches(_tree(50), batch_size=8, seed=0)
    _rows(iterator, 9)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _rows(iterator, 9)

    resumed = pipelines.batches(_tree(50), batch_size=8, seed=0)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert _rows(resumed, 9) == expected

    half = pipelines.batches(_tree(50), batch_size=8, seed=0, process_index=1, process_count=2)
    half.set_state(state)
    assert _rows(half, 9) == [row[4:] for row in expected]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4},
        {"seed": 1},
        {"shuffle": False},
        {"distinct": True},
        {"arrays": _tree(51)},
        {"arrays": {"row": np.arange(50)}},
    ],
)
def test_a_state_of_another_pipeline_is_refused(change):
    settings = {"arrays": _tree(50), "batch_size": 8, "seed": 0}
    state = pipelines.batches(**settings).get_state()
    with pytest.raises(InputError, match=state["fingerprint"]):
        pipelines.batches(**settings | change).set_state(state)


def test_changed_data_of_the_same_shape_is_another_pipeline():
    state = pipelines.batches(_tree(50), batch_size=8, seed=0).get_state()
    changed = _tree(50)
    changed["row"][7] = -1
    with pytest.raises(InputError):
        pipelines.batches(changed, batch_size=8, seed=0).set_state(state)


def test_batch_sizes_are_checked():
    with pytest.raises(InputError, match=r"batch of 11 .* 10 rows"):
        pipelines.batches(_tree(10), batch_size=11, seed=0)
    with pytest.raises(InputError, match="6 rows does not divide among 4 processes"):
        pipelines.batches(_tree(10), batch_size=6, seed=0, process_count=4)
