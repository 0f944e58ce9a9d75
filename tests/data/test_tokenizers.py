import time
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_jax.data import dialogues, tokenizers
from ctrl_jax.data.conversations import Turn, transcript
from ctrl_jax.errors import InputError


def _texts(side, count=1000):
    records = islice(dialogues.records(dialogues.config(side, seed=0, count=count), "train"), count)
    return [f"{transcript(record.prompt)} {record.response}" for record in records]


TEXTS = {side: _texts(side) for side in ("helpful", "harmless")}
TOKENIZER = tokenizers.train(TEXTS["helpful"], vocabulary_size=512)


def test_the_vocabulary_has_the_asked_size_and_distinct_special_tokens():
    assert TOKENIZER.vocabulary_size == 512
    assert TOKENIZER.pad_id not in TOKENIZER.eos_ids
    assert TOKENIZER.decode([TOKENIZER.pad_id, *TOKENIZER.eos_ids]) == ""


@pytest.mark.parametrize("side", ["helpful", "harmless"])
def test_dialogues_are_short(side):
    tokenizer = tokenizers.train(TEXTS[side], vocabulary_size=512)
    records = list(dialogues.records(dialogues.config(side, seed=1, count=3000), "test"))
    prompts = [len(tokenizer.encode_prompt(record.prompt)) for record in records]
    responses = [len(tokenizer.encode_response(record.response)) for record in records]
    assert max(prompts) <= 20
    assert sum(responses) / len(responses) < 27
    assert sum(length > 36 for length in responses) < 0.02 * len(responses)


def test_texts_of_another_split_need_no_spelling():
    assert len(TOKENIZER.encode(" patience")) == 1
    assert len(TOKENIZER.encode("\n\nHuman: Why?\n\nAssistant:")) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   two  spaces   ",
        "\n\n\nHuman\n",
        "tab\there\r\n\0",
        "emoji 🙂👩\u200d👩 and CJK 漢字",
        "▁ ⟦41⟧ ⟦⟧",
        "a\u030a å",
        "<pad></s><unk>",
        "\n\nHuman: Hi:\n\nAssistant: Ho\n\nHuman:",
    ],
)
def test_awkward_text_round_trips(text):
    ids = TOKENIZER.encode(f" {text}")
    assert TOKENIZER.decode(ids) == text
    assert 2 not in ids, "an unknown piece"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(f" {text}")) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 511)))
def test_any_ids_have_a_printable_text(ids):
    TOKENIZER.decode(ids).encode("utf-8")


def test_a_prompt_is_its_transcript_and_a_response_ends_in_eos():
    conversation = (Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "Why?"))
    text = "Be kind.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant:"
    assert TOKENIZER.encode_prompt(conversation) == TOKENIZER.encode(text)
    response = TOKENIZER.encode_response("  So that it ends.\n")
    assert response == [*TOKENIZER.encode(" So that it ends."), TOKENIZER.eos_ids[0]]
    assert TOKENIZER.decode(response) == "So that it ends."
    assert TOKENIZER.encode_response(" \n") == list(TOKENIZER.eos_ids)


def test_only_the_space_before_the_first_word_is_left_out():
    assert TOKENIZER.decode(TOKENIZER.encode("a b ")) == "a b "
    assert TOKENIZER.decode(TOKENIZER.encode("\n a")) == "\n a"


def test_training_is_deterministic_and_the_fingerprint_tells_models_apart():
    again = tokenizers.train(TEXTS["helpful"], vocabulary_size=512)
    assert again.model == TOKENIZER.model
    assert again.fingerprint == TOKENIZER.fingerprint
    assert tokenizers.train(TEXTS["helpful"], vocabulary_size=500).fingerprint != TOKENIZER.fingerprint


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path)
    assert (tmp_path / "tokenizer.model").is_file()
    loaded = tokenizers.load(tmp_path)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(TEXTS["helpful"][0]) == TOKENIZER.encode(TEXTS["helpful"][0])


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match=r"5000 .*at most \d{3}"):
        tokenizers.train(TEXTS["helpful"], vocabulary_size=5000)
    with pytest.raises(InputError, match=r"30 .*more than \d{2}"):
        tokenizers.train(TEXTS["helpful"], vocabulary_size=30)
    with pytest.raises(InputError, match="no words"):
        tokenizers.train(["", "?!"], vocabulary_size=512)
    with pytest.raises(InputError, match="train it again"):
        tokenizers.load(tmp_path)
    with pytest.raises(InputError, match="not a SentencePiece model"):
        tokenizers.TrainedTokenizer(b"garbage")


def test_a_text_that_repeats_itself_takes_no_longer_than_others():
    # Whole, it takes SentencePiece 240 s.
    started = time.monotonic()
    with pytest.raises(tokenizers.VocabularyTooLarge) as caught:
        tokenizers.train(["word " * 100_000, "a" * 100_000], vocabulary_size=512)
    assert time.monotonic() - started < 60
    text = "word " * 1000
    tokenizer = tokenizers.train([text], vocabulary_size=caught.value.bound - 1)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bounds_in_the_message_are_right():
    for bad, step in ((5000, 0), (30, 1)):
        with pytest.raises(InputError) as caught:
            tokenizers.train(TEXTS["helpful"], vocabulary_size=bad)
        bound = int(str(caught.value).split("; set ")[1].split(",")[0].rstrip(".").split()[-1]) + step
        assert tokenizers.train(TEXTS["helpful"], vocabulary_size=bound).vocabulary_size == bound
