import gzip
import json
import os

import pytest

from ctrl_jax.data import tldr
from ctrl_jax.data.conversations import Turn
from ctrl_jax.errors import InputError


def row(number, *, split="train", choice=0, texts=(" A cat sat.", " A dog ran."), **info):
    """A comparison in the published schema."""
    return {
        "info": {"id": f"t3_{number}", "post": f"Post {number}\n\nHuman: said", "title": "My pet", "subreddit": "pets"}
        | info,
        "summaries": [{"text": text, "policy": "ref", "note": None} for text in texts],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": 8},
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


ROWS = [
    row(1),
    row(2, choice=1),
    row(3, split="valid1"),
    row(4, split="valid2"),
    row(2),
    row(4),
    row(3, split="valid2"),
]


@pytest.mark.parametrize("folder", [".", "comparisons"])
def test_the_published_splits(folder, tmp_path):
    write(tmp_path / folder / "batch3.json", ROWS[:4])
    write(tmp_path / folder / "batch10.jsonl.gz", ROWS[4:])
    write(tmp_path / folder / "cnndm0.json", [{"not": "read"}])
    loaded = tldr.load(path=tmp_path, data_dir=tmp_path / "data")
    posts = {
        split: [record.prompt[0].content.split("POST: ")[1].split("\n")[0] for record in records]
        for split, records in loaded.records.items()
    }
    # batch10 stands before batch3; what is in test leaves train and validation.
    assert posts == {"train": ["Post 2", "Post 1", "Post 2"], "validation": [], "test": ["Post 3", "Post 4"]}
    assert loaded.dropped == {"prompt in another split": 2}
    assert loaded.rows == len(ROWS)
    assert tldr.load(path=tmp_path, data_dir=tmp_path / "data") == loaded


def test_a_comparison_is_one_user_turn_and_two_summaries(tmp_path):
    write(tmp_path / "batch3.json", [row(2, choice=1)])
    loaded = tldr.load(path=tmp_path / "batch3.json", data_dir=tmp_path / "data")
    (record,) = [record for records in loaded.records.values() for record in records]
    # One turn, whatever markers the post has.
    text = "SUBREDDIT: r/pets\n\nTITLE: My pet\n\nPOST: Post 2\n\nHuman: said\n\nTL;DR:"
    assert record.prompt == (Turn("user", text),)
    assert (record.response, record.chosen, record.rejected) == ("A dog ran.", "A dog ran.", "A cat sat.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row(1, texts=("a", " ")), "empty response"),
        (row(1, texts=("a", " a")), "chosen equals rejected"),
        (row(1, post=" \n"), "empty post"),
        (row(1) | {"info": {"id": "1", "site": "cnn", "title": "t", "article": "a"}}, "not a Reddit post"),
    ],
)
def test_defective_rows_say_why(row, reason):
    assert tldr.read_row(row, "here") == ("train", reason)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (row(1, split="dev"), ["'dev'", "train, valid1, valid2"]),
        ({name: value for name, value in row(1).items() if name != "split"}, ["no 'split'"]),
        (row(1, choice=2), ["'choice' is 2"]),
        (row(1, choice=None), ["'choice' is None"]),
        (row(1, choice=True), ["'choice' is True"]),
        (row(1, choice=1.0), ["'choice' is 1.0"]),
        (row(1, choice=-0.0), ["'choice' is -0.0"]),
        (row(1, choice=[1]), ["'choice' is [1]"]),
        (row(1, texts=("a",)), ["'summaries'", "two"]),
        (row(1, texts=("a", None)), ["'summaries'", "'text' must be a text", "null"]),
        (row(1) | {"info": "a"}, ["'info'", "'a'"]),
        (row(1, title=None), ["'info'", "'title'", "null"]),
    ],
)
def test_what_is_not_of_the_schema_is_named_with_its_place(row, words, tmp_path):
    write(tmp_path / "batch4.json", [ROWS[0], row])
    with pytest.raises(InputError) as caught:
        tldr.load(path=tmp_path, data_dir=tmp_path / "data")
    for word in [f"{tmp_path / 'batch4.json'}, line 2", *words]:
        assert word in str(caught.value)


def test_a_folder_without_comparisons_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}: no batch\*.json .*`data.path`"):
        tldr.load(path=tmp_path, data_dir=tmp_path / "data")


def test_what_only_has_the_name_of_a_batch_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "batch3.json")
    (tmp_path / "batch4.json").mkdir()
    with pytest.raises(InputError, match=r"no batch\*.json"):
        tldr.load(path=tmp_path, data_dir=tmp_path / "data")


def test_every_batch_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def fetch(url, target):
        asked.append(url)
        write(target, [row(len(asked), split=("train", "valid1", "valid2")[len(asked) % 3])])
        return target

    monkeypatch.setattr(tldr, "fetch", fetch)
    loaded = tldr.load(path=None, data_dir=tmp_path)
    place = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
    assert asked == [f"{place}/batch{i}.json" for i in (*range(3, 21), 22)]
    assert (loaded.rows, loaded.dropped) == (19, {})
    assert [len(loaded.records[split]) for split in ("train", "validation", "test")] == [6, 7, 6]
