"""Chats of two people, from a file in the package's own form and from the package itself."""

import json

import pytest

from ctrl_jax import config
from ctrl_jax.data import chitchat, sources
from ctrl_jax.data.conversations import Turn
from ctrl_jax.data.splits import uniform
from ctrl_jax.errors import InputError


def said(*turns):
    """A conversation as the file has it; a turn is a text, or several that are sent in a row."""
    groups = [[turn] if isinstance(turn, str) else turn for turn in turns]
    return {
        "messages": [
            [{"text": text, "timestamp": "2018-05-02T19:38:15Z", "sender": "ab"[i % 2]} for text in texts]
            for i, texts in enumerate(groups)
        ],
        "prompt": "What if pigs could fly?",
        "ratings": {"witty": "1", "upbeat": 5, "interesting": 5},
        "start": "2018-04-20T01:57:41",
    }


def write(folder, conversations):
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(conversations))
    return folder


def records(loaded):
    return [record for found in loaded.records.values() for record in found]


def in_split(split):
    """A conversation's id of that split."""
    bounds = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}[split]
    return next(f"{i}" for i in range(1000) if bounds[0] <= uniform(f"{i}") < bounds[1])


def test_each_reply_of_the_second_speaker_is_a_record_of_what_was_said_before(tmp_path):
    talk = said("Hello", ["Hi!", " how are you? "], "Fine", "Good", "Bye")
    loaded = chitchat.load(write(tmp_path, {"1": talk}))
    by_length = {len(record.prompt): record for record in records(loaded)}
    assert by_length.keys() == {1, 3}
    assert by_length[1].prompt == (Turn("user", "Hello"),)
    assert by_length[1].response == "Hi!\nhow are you?"
    assert by_length[3].prompt == (
        Turn("user", "Hello"), Turn("assistant", "Hi!\nhow are you?"), Turn("user", "Fine")
    )  # fmt: skip
    assert by_length[3].response == "Good"
    assert (loaded.rows, loaded.dropped) == (2, {})


def test_messages_of_one_speaker_in_a_row_are_one_turn_however_they_are_grouped(tmp_path):
    talk = said("Hello", "Hi!")
    first, second = talk["messages"]
    apart = {"messages": [first, [{**first[0], "text": "You?"}], second]}
    (record,) = records(chitchat.load(write(tmp_path, {"1": apart})))
    assert record.prompt == (Turn("user", "Hello\nYou?"),) and record.response == "Hi!"


def test_a_prompt_has_the_latest_turns_and_begins_with_the_user(tmp_path):
    talk = said(*(f"{i}" for i in range(40)))
    for record in records(chitchat.load(write(tmp_path, {"1": talk}))):
        last = int(record.response)
        expected = range(max(0, last - chitchat.TURNS), last)
        assert [int(turn.content) for turn in record.prompt] == [*expected]
        assert [turn.role for turn in record.prompt] == [("user", "assistant")[i % 2] for i in expected]
        assert record.prompt[0].role == record.prompt[-1].role == "user"


def test_a_conversation_is_whole_in_one_split_by_its_id(tmp_path):
    count = 400
    talks = {f"{i}": said(f"a {i}", f"b {i}", f"c {i}", f"d {i}") for i in range(count)}
    loaded = chitchat.load(write(tmp_path, talks))
    found = {split: {record.response.split()[1] for record in of_split} for split, of_split in loaded.records.items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == count, "each is in one split"
    assert sum(map(len, loaded.records.values())) == 2 * count, "with both of its replies"
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(found[split]) / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)
    # Another file keeps it there.
    more = chitchat.load(write(tmp_path / "more", {**talks, "new": said("x", "y 1000")}))
    assert {record.response for record in loaded.records["test"]} <= {r.response for r in more.records["test"]}


def test_the_first_records_are_of_different_conversations(tmp_path):
    talks = {f"{i}": said(*(f"{turn} {i}" for turn in range(2 * (1 + i % 4)))) for i in range(200)}
    train = chitchat.load(write(tmp_path, talks)).records["train"]
    voices = [record.response.split()[1] for record in train]
    distinct = len(set(voices))
    assert len(set(voices[:distinct])) == distinct, "one each"
    first_replies = [record for record in train[:distinct] if len(record.prompt) == 1]
    assert len(first_replies) < 0.8 * distinct, "which is not always the answer to the greeting"


def test_what_is_left_out_is_counted(tmp_path):
    talks = {
        in_split("train"): said("Hello", "Hi", "So", ["", " "], "Yes", "No"),
        in_split("validation"): said("Anybody?"),
        in_split("test"): said("Hello", "Hey", "You", "Me"),
    }
    loaded = chitchat.load(write(tmp_path, talks))
    assert loaded.dropped == {
        "empty response": 1, "empty turn": 1, "no reply": 1, "prompt in another split": 1
    }  # fmt: skip
    assert [record.response for record in records(loaded)] != [] and loaded.rows == 6


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("[", "cannot be read"),
        ("[]", "is a list"),
        ('{"1": {}}', "conversation 1: its 'messages' are None; they must be a list of lists"),
        ('{"1": {"messages": [{}]}}', "conversation 1: its 'messages' are .*; they must be a list of lists"),
        ('{"1": {"messages": [["Hi"]]}}', "conversation 1: message 1 is a text"),
        ('{"1": {"messages": [[{"text": "Hi"}]]}}', "conversation 1 has no 'sender'"),
        ('{"1": {"messages": [[{"text": 1, "sender": "a"}]]}}', "conversation 1: 'text' must be a text"),
    ],
)
def test_another_form_is_refused_with_its_place(contents, words, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(contents)
    with pytest.raises(InputError, match=words) as caught:
        chitchat.load(path)
    assert str(path) in str(caught.value)


def test_the_source_reads_a_copy_and_knows_its_contents(tmp_path):
    data = config.Data(source="chitchat", path=str(write(tmp_path / "a", {"1": said("Hello", "Hi")})))
    assert len(records(sources.load(data, tmp_path / "data"))) == 1
    known = sources.fingerprint(data)
    assert known == sources.fingerprint(config.Data(source="chitchat", path=str(tmp_path / "a" / "dataset.json")))
    write(tmp_path / "a", {"1": said("Hello", "Ho")})
    assert known not in (None, sources.fingerprint(data))
    with pytest.raises(InputError, match=r"nowhere: it has no dataset.json"):
        sources.fingerprint(config.Data(source="chitchat", path=str(tmp_path / "nowhere")))


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(chitchat, "PACKAGE", "chitchat_dataset_that_is_not_there")
    data = config.Data(source="chitchat")
    for read in (sources.fingerprint, lambda data: sources.load(data, None)):
        with pytest.raises(InputError, match="not installed") as caught:
            read(data)
        assert (caught.value.field, caught.value.value) == ("data.source", "chitchat")
        assert "make setup EXTRA=chitchat" in caught.value.remedy


def test_the_package_has_what_its_page_promises(tmp_path):
    pytest.importorskip("chitchat_dataset")
    data = config.Data(source="chitchat")
    loaded = sources.load(data, tmp_path)
    assert loaded.origin.startswith("7168 conversations")
    sizes = {split: len(found) for split, found in loaded.records.items()}
    assert sizes["train"] > 40_000 and min(sizes.values()) > 4_000
    test = loaded.records["test"]
    assert len({record.prompt for record in test[:300]}) > 280
    assert all(record.prompt[-1].role == "user" and record.response for record in test)
