"""Whatever a file holds, a loader gives records or an InputError, within seconds; never another exception."""

import csv
import datetime
import gzip
import io
import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrl_jax import config
from ctrl_jax.data import files, hh_rlhf, jsonl, pipelines, sources, splits, tldr, tokenizers
from ctrl_jax.errors import InputError

pytestmark = pytest.mark.slow

TOKENIZER = tokenizers.train([f"What is {i} plus {2 * i}?" for i in range(40)], vocabulary_size=40)
TURNS = [{"role": "user", "content": "Hi é 🙂"}, {"role": "assistant", "content": "Ho"}]
ROWS = [
    {"prompt": f"Q{i}", "response": "A, “b”\nc", "chosen": "good", "rejected": "bad", "answer": i, "messages": None}
    for i in range(12)
]
OWN = [*ROWS, {"messages": TURNS}, {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "He"}]}]
HH = [{side: f"\n\nHuman: Q{i}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for i in range(12)]
TLDR = [
    {
        "info": {"id": "1", "post": f"P{i}", "title": "T", "subreddit": "s"},
        "summaries": [{"text": "a"}, {"text": "b"}], "choice": i % 2, "split": "train",
    }
    for i in range(12)
]  # fmt: skip
NASTY = [
    b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b'"\\ud800"', b'"\\uDFFF x"', b"1e400", b"-1e400",
    b"NaN", b"1.0", b"-Infinity", b"9" * 5000, b"[" * 5000, b'{"a":' * 300, b"\r", b"\n", b'"', b",", b"\\",
    b"null", b"true", b"[]", b"{}", b"\x1f\x8b\x08", b"PAR1", b"\xff\xff\xff\xff", b"\0\0\0\x80",
    b"\xff\xff\xff\x7f", b"Human:", b"\n\nAssistant:", b'"prompt": "x", ', b'"choice": 1.0, ', b'"split": [], ',
    b" " * 5000,
]  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows):
    """Without the column of nulls, whose type is none."""
    return pyarrow.Table.from_pylist(
        [{name: value for name, value in row.items() if value is not None} for row in rows]
    )


def as_csv():
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet():
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table(ROWS), sink)
    return sink.getvalue()


def as_arrow():
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table(ROWS).schema) as stream:
        stream.write_table(table(ROWS))
    return sink.getvalue()


@st.composite
def damaged(draw, content):
    """The content after up to four changes: bytes turned, cut, doubled, moved, or something nasty put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        stop = min(len(content), start + draw(st.sampled_from([1, 2, 8, 100, 10_000])))
        match draw(st.sampled_from(["turn", "cut", "double", "end", "nasty", "over"])):
            case "turn" if content:
                content[start] ^= draw(st.integers(1, 255))
            case "cut":
                del content[start:stop]
            case "double":
                content[start:start] = content[start:stop]
            case "end":
                del content[start:]
            case "nasty":
                content[start:start] = draw(st.sampled_from(NASTY))
            case "over":
                nasty = draw(st.sampled_from(NASTY))
                content[start : start + len(nasty)] = nasty
    return bytes(content)


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "\0", "\n\nHuman: a\n\nAssistant:", "Human: a\n\nAssistant: b", "\ud800", "\ufeff", "a" * 500]
    ),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), TEXTS,
    st.sampled_from([TURNS, TURNS[:1], TURNS[::-1], [{"from": "human", "value": "a"}], ["a"]]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), LEAVES), "content": LEAVES},
        optional={"tool_calls": LEAVES, "from": LEAVES, "value": LEAVES},
    ),
    max_size=4,
)
NAMES = [
    *config.FIELDS, "answer", "instruction", "input", "output", "completion", "label", "score", "system",
    "conversations",
]  # fmt: skip
ANY_ROW = st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUES, MESSAGES, TEXTS), max_size=6)
ANY_TLDR = st.fixed_dictionaries(
    {},
    optional={
        "info": st.one_of(st.dictionaries(st.sampled_from(["subreddit", "title", "post", "article"]), LEAVES), VALUES),
        "summaries": st.one_of(st.lists(st.dictionaries(st.just("text"), LEAVES), min_size=2, max_size=2), VALUES),
        "choice": st.one_of(st.sampled_from([0, 1, 0.0, 1.0, True, "1"]), VALUES),
        "split": st.one_of(st.sampled_from(["train", "valid1", "valid2"]), VALUES),
    },
)
MAPPINGS = st.sampled_from(
    [(), ("prompt=instruction+input", "response=output"), ("note=prompt",), ("messages=answer",)]
)


def use(loaded):
    """What comes after the loading of records."""
    for records in loaded.records.values():
        for make in (pipelines.prompts, pipelines.demonstrations, pipelines.preference_pairs):
            lengths = (
                {"prompt_length": 16} if make is pipelines.prompts else {"prompt_length": 16, "response_length": 4}
            )
            try:
                make(records, TOKENIZER, **lengths)
            except InputError:
                continue
        assert all(record.asked and repr(record.columns) for record in records)


def refused_or_used(load):
    try:
        loaded = load()
    except InputError as error:
        assert 20 < len(str(error)) < 3000
        str(error).encode()
        return
    use(loaded)


def read(kind, path, tmp_path):
    if kind == "hh_rlhf":
        return splits.collected({"train": jsonl.rows(path)}, hh_rlhf.read_row)
    if kind == "tldr":
        return tldr.records({"batch": path})
    return sources.load(config.Data(source="files", path=str(path)), tmp_path)


def fuzz(count):
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=datetime.timedelta(seconds=60),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


CONTENTS = {
    "rows.jsonl": lines(OWN),
    "rows.jsonl.gz": gzip.compress(lines(OWN), mtime=0),
    "rows.csv": as_csv(),
    "rows.parquet": as_parquet(),
    "rows.arrow": as_arrow(),
    "hh_rlhf": lines(HH),
    "tldr": lines(TLDR),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_damaged_files(name, tmp_path):
    path = tmp_path / (name if "." in name else "rows.jsonl")
    path.write_bytes(CONTENTS[name])
    assert read(name, path, tmp_path).rows >= 12, "it is whole before"

    @fuzz(250)
    @given(damaged(CONTENTS[name]))
    def holds(content):
        path.write_bytes(content)
        refused_or_used(lambda: read(name, path, tmp_path))

    holds()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "hh_rlhf", "tldr"])
def test_any_bytes(name, tmp_path):
    path = tmp_path / (name if "." in name else "rows.jsonl")

    @fuzz(60)
    @given(st.one_of(st.binary(max_size=200), st.sampled_from(NASTY), st.just(CONTENTS["rows.parquet"])))
    def holds(content):
        path.write_bytes(content)
        refused_or_used(lambda: read(name, path, tmp_path))

    holds()


def test_any_rows_of_ones_own(tmp_path):
    path = tmp_path / "rows.jsonl"

    @fuzz(600)
    @given(st.lists(ANY_ROW, min_size=1, max_size=3), MAPPINGS)
    def holds(rows, columns):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = config.Data(source="files", path=str(path), columns=columns)
        refused_or_used(lambda: sources.load(data, tmp_path))

    holds()


@pytest.mark.parametrize("kind", ["hh_rlhf", "tldr"])
def test_any_rows_of_published_data(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ANY_TLDR if kind == "tldr" else st.dictionaries(st.sampled_from(["chosen", "rejected"]), LEAVES)

    @fuzz(300)
    @given(rows)
    def holds(row):
        path.write_text(json.dumps(row))
        refused_or_used(lambda: read(kind, path, tmp_path))

    holds()


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_damaged_descriptions_of_saved_data(name, tmp_path):
    folder = tmp_path / "saved"
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    whole = json.dumps(state if name == "state.json" else {"splits": ["train", "test"]}).encode()

    @fuzz(120)
    @given(damaged(whole))
    def holds(content):
        shutil.rmtree(folder, ignore_errors=True)
        for place in (folder, folder / "train", folder / "test"):
            place.mkdir(parents=True)
            (place / "data-00000-of-00001.arrow").write_bytes(CONTENTS["rows.arrow"])
            (place / "state.json").write_text(json.dumps(state))
        (folder / name).write_bytes(content)
        refused_or_used(lambda: files.load(folder))

    holds()


def test_damaged_tokenizers(tmp_path):
    path = tmp_path / tokenizers.FILENAME

    @fuzz(150)
    @given(damaged(TOKENIZER.model))
    def holds(content):
        path.write_bytes(content)
        try:
            found = tokenizers.load(tmp_path)
            found.decode(found.encode("What is é? \0 🙂"))
        except InputError:
            return

    holds()


@pytest.mark.parametrize("source", ["files", "tldr", "hh_rlhf/harmless-base"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link", "empty", "nothing"])
def test_what_is_no_file(source, what, tmp_path):
    names = {"files": "train.jsonl", "tldr": "batch3.json", "hh_rlhf/harmless-base": "harmless-base.jsonl"}
    place = tmp_path / names[source]
    match what:
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case "link":
            place.symlink_to(place)
        case "empty":
            place.touch()
    for path in (place, tmp_path):
        data = config.Data(source=source, path=str(path))
        with pytest.raises(InputError):
            sources.fingerprint(data)
            sources.load(data, tmp_path / "data")
