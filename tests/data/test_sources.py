import json

import pytest

from ctrl_jax import config
from ctrl_jax.data import dialogues, sources
from ctrl_jax.data.conversations import parse
from ctrl_jax.errors import InputError

HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}
TLDR = {
    "info": {"id": "1", "post": "Hi", "title": "Hi", "subreddit": "hi"},
    "summaries": [{"text": "Ho"}, {"text": "Go"}],
    "choice": 0,
    "split": "train",
}
SOURCES = {
    "hh_rlhf/harmless-base": ("harmless-base.jsonl", HH),
    "tldr": ("batch3.json", TLDR),
    "files": ("train.jsonl", {"prompt": "Hi", "chosen": "Ho", "rejected": "Go"}),
    "jsonl": ("train.jsonl", {"prompt": "Hi", "chosen": "Ho", "rejected": "Go"}),
}


def rows(source, folder, *, count=40):
    """Writes rows with distinct prompts, all of them defective where `count` is 0, and returns the data's options."""
    name, row = SOURCES[source]
    text = json.dumps(row)
    lines = [text.replace("Hi", f"Hi {i}") for i in range(count)] or [text.replace("Ho", "Go")]
    (folder / name).write_text("\n".join(lines))
    return config.Data(source=source, path=str(folder))


@pytest.mark.parametrize("source", SOURCES)
def test_every_local_source_gives_records(source, tmp_path):
    loaded = sources.load(rows(source, tmp_path), tmp_path / "data")
    records = [record for split in ("train", "validation", "test") for record in loaded.records[split]]
    assert (loaded.rows, loaded.dropped, len(records)) == (40, {}, 40)
    assert all((record.chosen, record.rejected) == ("Ho", "Go") for record in records)
    if source != "tldr":
        assert {record.prompt for record in records} == {parse(f"Hi {i}") for i in range(40)}


def test_dialogues_are_generated(tmp_path):
    data = config.Data(source="dialogues/harmless", seed=3, dialogues=20)
    loaded = sources.load(data, tmp_path)
    assert loaded.records["train"] == list(dialogues.records(dialogues.config("harmless", seed=3, count=20), "train"))
    assert (loaded.rows, loaded.dropped) == (sum(map(len, loaded.records.values())), {})
    assert sources.fingerprint(data) is None


@pytest.mark.parametrize("source", SOURCES)
def test_the_fingerprint_is_of_the_contents_wherever_they_lie(source, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = sources.fingerprint(rows(source, tmp_path / "a"))
    assert first is not None
    assert sources.fingerprint(rows(source, tmp_path / "b")) == first
    assert sources.fingerprint(rows(source, tmp_path / "b", count=39)) != first


@pytest.mark.parametrize("source", ["hh_rlhf/harmless-base", "tldr"])
def test_what_would_be_downloaded_has_no_fingerprint(source):
    assert sources.fingerprint(config.Data(source=source)) is None


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_path_is_named(source, tmp_path):
    data = config.Data(source=source, path=str(tmp_path / "nowhere"))
    for function in (sources.fingerprint, lambda data: sources.load(data, tmp_path / "data")):
        with pytest.raises(InputError, match=f"{tmp_path / 'nowhere'}.*`data.path`"):
            function(data)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_to_train_on_is_said_with_the_counts(source, tmp_path):
    with pytest.raises(InputError, match=r"1 rows were read, and 1 dropped \(1 chosen equals rejected\)"):
        sources.load(rows(source, tmp_path, count=0), tmp_path / "data")


def test_prompts_are_asked_as_their_source_writes_them(tmp_path):
    found = {}
    for source in SOURCES:
        (tmp_path / source).mkdir(parents=True)
        loaded = sources.load(rows(source, tmp_path / source, count=1), tmp_path / "data")
        (found[source],) = [record.asked for records in loaded.records.values() for record in records]
    assert found["hh_rlhf/harmless-base"] == "\n\nHuman: Hi 0\n\nAssistant:"
    assert found["tldr"] == "SUBREDDIT: r/hi\n\nTITLE: Hi 0\n\nPOST: Hi 0\n\nTL;DR:"
    assert found["files"] == found["jsonl"] == "Hi 0"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt",), "write NAME=COLUMN"),
        (("=a",), "write NAME=COLUMN"),
        (("prompt=",), "write NAME=COLUMN"),
        (("prompt=a+",), "write NAME=COLUMN"),
        (("messages=a+b",), "texts alone are joined"),
        (("prompt=a", "prompt=b"), "says twice"),
    ],
)
def test_a_mapping_is_checked_at_once(columns, words):
    with pytest.raises(InputError, match=words):
        config.Data(source="files", path="rows.csv", columns=columns)
    with pytest.raises(InputError, match="has columns of its own"):
        config.Data(source="tldr", columns=("prompt=a",))


def test_a_mapping_reaches_the_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"q{i},{i}\n" for i in range(40)))
    data = config.Data(source="files", path=str(tmp_path / "rows.csv"), columns=("prompt=question", "response=answer"))
    (first, *_) = sources.load(data, tmp_path / "data").records["train"]
    assert (first.asked, first.response) == (f"q{first.response}", first.response)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    data = rows("files", tmp_path)

    def refused(found):
        raise PermissionError(13, "Permission denied", str(tmp_path / "train.jsonl"))

    monkeypatch.setattr("ctrl_jax.data.downloads.fingerprint", refused)
    with pytest.raises(InputError, match=r"train.jsonl cannot be read: Permission denied"):
        sources.fingerprint(data)


@pytest.mark.parametrize("path", ["a" * 5000, "~nobody-of-this-name/rows.jsonl", "a\0b", "caf\udce9/rows.jsonl"])
def test_what_can_be_no_path_is_refused(path, tmp_path):
    data = config.Data(source="files", path=path)
    for function in (sources.fingerprint, lambda data: sources.load(data, tmp_path / "data")):
        with pytest.raises(InputError, match=r"data\.path"):
            function(data)


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows("jsonl", tmp_path)
    assert sources.fingerprint(config.Data(source="jsonl", path="~/train.jsonl")) is not None


def test_plain_posts_end_where_their_summary_begins(tmp_path):
    data = config.Data(**{**vars(rows("tldr", tmp_path, count=1)), "format": "plain"})
    (record,) = [one for records in sources.load(data, tmp_path / "data").records.values() for one in records]
    assert record.asked == record.prompt[0].content and record.asked.endswith("TL;DR:")
    assert (record.response, record.chosen, record.rejected) == (" Ho", " Ho", " Go")


@pytest.mark.parametrize("source", ["dialogues/helpful", "hh_rlhf/harmless-base"])
def test_conversations_are_no_plain_texts(source):
    with pytest.raises(InputError, match="conversations") as caught:
        config.Data(source=source, format="plain")
    assert caught.value.field == "data.format" and "`data.format=chat`" in caught.value.remedy
