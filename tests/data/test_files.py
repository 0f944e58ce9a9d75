import csv
import gzip
import json
import os
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from ctrl_jax import config
from ctrl_jax.data import files, jsonl, rows, sources
from ctrl_jax.data.conversations import Record, Turn, messages
from ctrl_jax.errors import InputError

ASK = Turn("user", "Why is the sky blue?")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
NO = {"role": "assistant", "content": "No"}
ASSISTANT = {"role": "assistant", "content": " It scatters.\n"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why is the sky blue?"}, Record((ASK,))),
        ({"prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant:"}, Record((ASK,))),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why is the sky blue?\n\nAssistant:"},
            Record((Turn("user", "Hi"), Turn("assistant", "Ho"), ASK)),
        ),
        ({"prompt": [SYSTEM, USER]}, Record((Turn("system", "Be brief."), ASK))),
        ({"prompt": "Why is the sky blue?", "response": " It scatters.\n"}, Record((ASK,), "It scatters.")),
        ({"prompt": [USER], "chosen": "Yes 🙂", "rejected": "No"}, Record((ASK,), None, "Yes 🙂", "No")),
        (
            {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [{"role": "assistant", "content": "No"}]},
            Record((ASK,), None, "It scatters.", "No"),
        ),
        ({"messages": [USER]}, Record((ASK,))),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, Record((Turn("system", "Be brief."), ASK), "It scatters.")),
        ({"prompt": "Why is the sky blue?", "chosen": "a", "rejected": "b", "response": "c"},
         Record((ASK,), "c", "a", "b")),
        # Null is absent, as exporters write it.
        ({"prompt": "Why is the sky blue?", "response": "c", "chosen": None, "rejected": None}, Record((ASK,), "c")),
        # The turns before the last of a pair are the prompt, or have it in front, or follow it.
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, NO]}, Record((ASK,), None, "It scatters.", "No")),
        ({"prompt": "Why is the sky blue? ", "chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
         Record((ASK,), None, "It scatters.", "No")),
        ({"prompt": [USER], "chosen": [USER, NO, USER, ASSISTANT], "rejected": [NO, USER, NO]},
         Record((ASK, Turn("assistant", "No"), ASK), None, "It scatters.", "No")),
        ({"prompt": "Why is the sky blue?", "response": [USER, ASSISTANT]}, Record((ASK,), "It scatters.")),
        # Whole dialogues in hh-rlhf's form, with the prompt in front of each reply.
        ({"prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant:",
          "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Yes", "rejected": "No"},
         Record((ASK,), None, "Yes", "No")),
        ({"chosen": "Human: Why is the sky blue?\n\nAssistant: Yes",
          "rejected": "Human: Why is the sky blue?\n\nAssistant: No"}, Record((ASK,), None, "Yes", "No")),
        # Two that say the same agree.
        ({"prompt": "Why is the sky blue?", "messages": [USER, ASSISTANT], "response": "It scatters.",
          "chosen": [USER, ASSISTANT], "rejected": [USER, NO]}, Record((ASK,), "It scatters.", "It scatters.", "No")),
    ],
)  # fmt: skip
def test_every_form_of_a_row(row, expected, tmp_path):
    loaded = files.load(write(tmp_path / "data.jsonl", row))
    (found,) = [record for records in loaded.records.values() for record in records]
    assert replace(found, written=None) == expected
    written = row.get("prompt")
    short = isinstance(written, str) and found.prompt != expected.prompt
    assert found.asked == (written if isinstance(written, str) and not short else messages(expected.prompt))
    assert (loaded.rows, loaded.dropped) == (1, {})


def test_a_packed_file_with_empty_lines_and_a_byte_order_mark(tmp_path):
    rows = [{"prompt": f"Question {i} — “quoted” 漢字?"} for i in range(50)]
    text = "\ufeff" + "\n\n  \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with gzip.open(tmp_path / "data.jsonl.gz", "wb") as file:
        file.write(text.encode())
    loaded = files.load(tmp_path / "data.jsonl.gz")
    assert loaded.rows == 50
    found = {record.prompt[0].content for records in loaded.records.values() for record in records}
    assert found == {row["prompt"] for row in rows}


def test_a_folder_has_its_own_splits(tmp_path):
    for split, prompts in (("train", "abc"), ("validation", "cd"), ("test", "de")):
        write(tmp_path / f"{split}.jsonl", *({"prompt": prompt} for prompt in prompts))
    loaded = files.load(tmp_path)
    found = {split: [record.prompt[0].content for record in records] for split, records in loaded.records.items()}
    assert found == {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}
    assert loaded.dropped == {"prompt in another split": 2}
    assert loaded.rows == 7


def test_defective_rows_are_counted(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, pair | {"chosen": " "}, {"prompt": "a", "response": ""}, pair | {"rejected": "b "}]
    loaded = files.load(write(tmp_path / "data.jsonl", *rows))
    assert loaded.dropped == {"empty response": 2, "chosen equals rejected": 1}
    assert (loaded.rows, sum(map(len, loaded.records.values()))) == (4, 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"', ["is not JSON", '"prompt": "a"', "one object a line"]),
        (b"[" * 100_000, ["is not JSON"]),
        (b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", ["nested more than 100 deep"]),
        (b'{"prompt": "a", "prompt": "b"}', ["'prompt' twice"]),
        (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", ["is not JSON", "4300 digits"]),
        (b'{"prompt": "a"} {"prompt": "b"}', ["is not JSON", "Extra data"]),
        (b'["a"]', ["is a list", "['a']"]),
        (b"null", ["is null"]),
        (b'{"prompt": "caf\xe9"}', ["byte 16", "0xe9", "not UTF-8"]),
        (b'{"prompt": "\\ud83d alone"}', ["half of a character"]),
        (b'{"text": "a", "id": 3}', ["neither 'prompt' nor 'messages'", "'text', 'id'"]),
        (b"{}", ["no fields"]),
        (b'{"chosen": "a", "rejected": "b"}', ["no prompt", "`data.source=hh_rlhf"]),
        (b'{"prompt": 3}', ["'prompt' must be a text", "a number, 3"]),
        (b'{"prompt": null}', ["neither 'prompt' nor 'messages'"]),
        (b'{"prompt": " \\n"}', ["the prompt is empty"]),
        (b'{"prompt": "\\n\\nHuman: \\n\\nAssistant:"}', ["the prompt is empty"]),
        (b'{"prompt": []}', ["list of messages", "a list, []"]),
        (b'{"prompt": "\\n\\nHuman: a\\n\\nAssistant: b"}', ["ends with the assistant's turn", "'b'", "'response'"]),
        (b'{"prompt": "a", "chosen": "b"}', ["'chosen' but no 'rejected'"]),
        (b'{"prompt": "a", "rejected": "b"}', ["'rejected' but no 'chosen'"]),
        (b'{"prompt": "a", "chosen": "b", "rejected": null}', ["'chosen' but no 'rejected'"]),
        (b'{"prompt": "a", "chosen": ["b"], "rejected": ["c"]}',
         ["'chosen' must be a text, or a list of messages {role, content}", "a list of texts, ['b']"]),
        (b'{"prompt": ["a"]}', ["'prompt' must be a text, or a list of messages", "a list of texts"]),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', ["'messages'", "'prompt'", "'a'", "'b'"]),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}',
         ["'response' and the last of 'messages' differ", "'c' and 'b'"]),
        (b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], '
         b'"rejected": "d"}', ["'chosen' before its reply are not those of 'prompt'", "'b' and 'a'"]),
        (b'{"prompt": "a", "rejected": "\\n\\nHuman: b\\n\\nAssistant: c", "chosen": "d"}',
         ["'rejected' before its reply are not those of 'prompt'", "'b' and 'a'"]),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chosen": '
         b'[{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": '
         b'"d"}], "rejected": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": '
         b'"assistant", "content": "e"}]}', ["'messages'", "'rejected'", "reply to different turns"]),
        (b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{"x": 1}]}]}', ["'tool_calls'", "not read"]),
        (b'{"instruction": "Do x", "input": "y", "output": "z"}',
         ["`data.columns` prompt=instruction+input response=output", "'instruction', 'input', 'output'"]),
        (b'{"question": "a", "answer": "b"}', ["`data.columns` prompt=question response=answer"]),
        (b'{"conversations": [{"from": "human", "value": "a"}]}', ["`data.columns` messages=conversations"]),
        (b'{"prompt": "a", "completion": "b"}', ["'completion', which is not read", "response=completion"]),
        (b'{"prompt": "a", "completion": "b", "label": true}', ["'completion', 'label'", "whose label is bad"]),
        (b'{"prompt": "a", "response": "b", "label": true}', ["'label' beside 'response'", "label=label"]),
        (b'{"prompt": "a", "response": "b", "score": 0.5}', ["'score' beside 'response'"]),
        (b'{"prompt": "a", "system": "b"}', ["'system', 'b'", "the first message"]),
        (b'{"prompt": "a", "response": {"text": "b"}}', ["'response' must be a text", "an object"]),
        (b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}',
         ["'chosen' must end with the assistant's message", "the user's"]),
        (b'{"messages": "a"}', ["'messages' must be a list", "a text, 'a'"]),
        (b'{"messages": ["a"]}', ["'messages' must be a list of messages", "a list of texts, ['a']"]),
        (b'{"messages": [{"role": "user", "content": "b"}, "a"]}', ["message 2", "an object", "'a'"]),
        (b'{"messages": [{"role": "user"}]}', ["message 1", "no 'content'", "'role'"]),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', ["message 1", "must be a text", "a list"]),
        (b'{"messages": [{"role": "human", "content": "a"}]}', ["message 1", "'human'", "system, user, assistant"]),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
         ["message 2", "only the first"]),
        (b'{"messages": [{"role": "system", "content": "a"}]}', ["ends with the system's turn"]),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', ["the prompt is empty"]),
    ],
)  # fmt: skip
def test_what_is_no_row_is_named_with_its_place(line, words, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        files.load(path)
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert len(message) < 600
    for word in words:
        assert word in message


HI, A1, A2 = USER | {"content": "hi"}, ASSISTANT | {"content": "a1"}, ASSISTANT | {"content": "a2"}
B1, B2, Q2 = ASSISTANT | {"content": "b1"}, ASSISTANT | {"content": "b2"}, USER | {"content": "q2"}
GOOD, BAD, M = ASSISTANT | {"content": "good"}, ASSISTANT | {"content": "bad"}, USER | {"content": "M?"}
SUM = USER | {"content": "What is 2+2?"}


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        pytest.param(
            {
                "prompt": [SUM],
                "chosen": [USER | {"content": "What is the capital of France?"}, ASSISTANT | {"content": "Paris"}],
                "rejected": [SUM, ASSISTANT | {"content": "5"}],
            },
            "'chosen' before its reply are not those of 'prompt'",
            id="chosen_other_prompt",
        ),
        pytest.param(
            {"prompt": [HI], "chosen": [A1, Q2, A2], "rejected": [B1, Q2, B2]},
            {"turns of chosen and rejected differ before the last": 1},
            id="chosen_two_turns",
        ),
        pytest.param(
            {"prompt": [HI], "chosen": [HI, A1, Q2, A2], "rejected": [HI, B1, USER | {"content": "z2"}, B2]},
            {"turns of chosen and rejected differ before the last": 1},
            id="multi_chosen_diff",
        ),
        pytest.param(
            {"prompt": "P?", "messages": [M, ASSISTANT], "chosen": [M, GOOD], "rejected": [M, BAD]},
            "'messages' before its reply are not those of 'prompt'",
            id="messages_and_prompt",
        ),
        pytest.param(
            {"messages": [M, ASSISTANT], "response": "from response"},
            "'response' and the last of 'messages' differ",
            id="messages_and_response",
        ),
        pytest.param(
            {"chosen": [HI, GOOD], "rejected": [HI, BAD]},
            Record((Turn("user", "hi"),), None, "good", "bad", messages((Turn("user", "hi"),))),
            id="implicit",
        ),
        pytest.param(
            {"prompt": "q?", "chosen": ["good"], "rejected": ["bad"]},
            "'chosen' must be a text, or a list of messages",
            id="list_pair",
        ),
        pytest.param(
            {"prompt": "q?", "response": "a", "chosen": None, "rejected": None},
            Record((Turn("user", "q?"),), "a", written="q?"),
            id="null_pair",
        ),
        pytest.param(
            {"instruction": "Do x", "input": "y", "output": "z"},
            "`data.columns` prompt=instruction+input response=output",
            id="instruction",
        ),
        pytest.param(
            {"prompt": "q?", "completion": "c", "label": True}, "`data.columns` response=completion", id="label"
        ),
    ],
)
def test_what_went_wrong_before(row, outcome, tmp_path):
    path = write(tmp_path / "rows.jsonl", row)
    if isinstance(outcome, str):
        with pytest.raises(InputError) as caught:
            files.load(path)
        assert f"{path}, line 1" in str(caught.value)
        assert outcome in str(caught.value)
        return
    loaded = files.load(path)
    found = [record for records in loaded.records.values() for record in records]
    assert (found, loaded.dropped) == (([outcome], {}) if isinstance(outcome, Record) else ([], outcome))


@pytest.mark.parametrize(
    ("row", "mapping", "expected"),
    [
        ({"question": "q", "answer": "a", "n": 1}, {"prompt": ("question",), "response": ("answer",)},
         Record((Turn("user", "q"),), "a", written="q", columns={"n": 1})),
        ({"question": "q", "answer": "a"},
         {"prompt": ("question",), "response": ("answer",), "answer": ("answer",)},
         Record((Turn("user", "q"),), "a", written="q", columns={"answer": "a"})),
        ({"instruction": "Do x", "input": "y", "output": "z"},
         {"prompt": ("instruction", "input"), "response": ("output",)},
         Record((Turn("user", "Do x\n\ny"),), "z", written="Do x\n\ny")),
        ({"instruction": "Do x", "input": "", "output": "z"},
         {"prompt": ("instruction", "input"), "response": ("output",)},
         Record((Turn("user", "Do x"),), "z", written="Do x")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         {"messages": ("conversations",)},
         Record((Turn("user", "q"),), "a", written=[{"role": "user", "content": "q"}])),
        ({"prompt": "q", "completion": "a", "label": True}, {"response": ("completion",), "label": ("label",)},
         Record((Turn("user", "q"),), "a", written="q", columns={"label": True})),
        ({"prompt": "other", "messages": [USER, ASSISTANT]}, {"note": ("prompt",)},
         Record((ASK,), "It scatters.", written=[USER], columns={"note": "other"})),
    ],
)  # fmt: skip
def test_columns_of_other_names_are_mapped(row, mapping, expected, tmp_path):
    loaded = files.load(write(tmp_path / "data.jsonl", row), mapping)
    assert [record for records in loaded.records.values() for record in records] == [expected]


def test_a_mapping_of_no_column_is_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "q", "reply": "a"})
    with pytest.raises(InputError, match=r"reads 'respnse', which no row of .* has; the columns are 'prompt', 'reply'"):
        files.load(path, {"response": ("respnse",)})


ROWS = [
    {"prompt": f"Question {i}, “quoted”,\nand more?", "response": f"Answer {i}", "answer": str(i)} for i in range(40)
]


def write_csv(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_saved(folder, table):
    """As `datasets` 4 saves a data set: two Arrow streams, and the state that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table.slice(0, 25), table.slice(25)), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("form", ["rows.csv", "rows.csv.gz", "rows.parquet", "saved", "splits", "shards", "data"])
def test_every_form_of_a_file_says_the_same(form, tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    path = tmp_path / form
    if form.startswith("rows.csv"):
        write_csv(path)
    elif form == "rows.parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "saved":
        write_saved(path, table)
    elif form == "splits":
        write_saved(path / "train", table.slice(0, 35))
        write_saved(path / "test", table.slice(35))
        (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    else:
        folder = path / "data" if form == "data" else path
        folder.mkdir(parents=True)
        for i in range(2):
            pyarrow.parquet.write_table(table.slice(i * 25, 25), folder / f"train-{i:05}-of-00002.parquet")
    loaded = files.load(path)
    expected = {
        Record(
            (Turn("user", row["prompt"]),), row["response"], written=row["prompt"], columns={"answer": row["answer"]}
        )
        for row in ROWS
    }
    found = [record for records in loaded.records.values() for record in records]
    assert (loaded.rows, set(found)) == (40, expected)
    if form == "splits":
        assert [record.response for record in loaded.records["test"]] == [f"Answer {i}" for i in range(35, 40)]
    fingerprint = sources.fingerprint(config.Data(source="files", path=str(path)))
    changed = (
        next(file for file in sorted(path.rglob("*")) if file.suffix in (".arrow", ".parquet"))
        if path.is_dir()
        else path
    )
    changed.write_bytes(changed.read_bytes() + b"\0")
    assert sources.fingerprint(config.Data(source="files", path=str(path))) != fingerprint


def test_null_in_a_table_is_absent(tmp_path):
    rows = [
        {"prompt": "q", "response": "a", "chosen": None, "rejected": None},
        {"prompt": "p", "chosen": "b", "rejected": "c"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,response,chosen,rejected\nq,a,,\np,,b,c\n")
    for name in ("rows.parquet", "rows.csv"):
        loaded = files.load(tmp_path / name)
        found = {(r.response, r.chosen, r.rejected) for records in loaded.records.values() for r in records}
        assert found == {("a", None, None), (None, "b", "c")}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"prompt,response\na,b\nc\n", ["line 3", "1 cells", "2 columns"]),
        ("rows.csv", b'prompt,response\n"a\nb",c\nd,e,f\n', ["line 4", "3 cells"]),
        ("rows.csv", b"prompt,prompt\na,b\n", ["two columns 'prompt'"]),
        ("rows.csv", b'prompt\n"a\n', ["is not CSV", "line 2"]),
        ("rows.csv", b"prompt\n\xff\n", ["line 2", "not UTF-8"]),
        ("rows.csv", b"question,answer\na,b\n", ["line 2", "prompt=question response=answer"]),
        ("rows.parquet", b"PAR1 and more", ["cannot be read"]),
        ("rows.parquet", b"", ["cannot be read"]),
        ("rows.arrow", b"\xff\xff\xff\xff\x10\0\0\0", ["cannot be read"]),
    ],
)
def test_a_table_that_is_none_is_named_with_its_place(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.load(tmp_path / name)
    for word in [str(tmp_path / name), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dataset_dict.json", {"splits": ["train_sft"]}, ["'train_sft'", "train, validation, test"]),
        ("dataset_dict.json", [], ["is no object"]),
        ("dataset_dict.json", {"splits": ["train"]}, ["train/state.json cannot be read"]),
        ("state.json", {"_data_files": [{"filename": "../a.arrow"}]}, ["names no files"]),
        ("state.json", {"_data_files": [{"filename": "a.arrow"}]}, ["lacks 'a.arrow'"]),
        ("state.json", {"_data_files": [{"filename": "a" * 5000}]}, ["names no files"]),
        ("state.json", {}, ["names no files"]),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(name, content, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        files.load(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_two_files_of_one_split_are_refused_and_files_that_are_not_read_are_said(tmp_path):
    write(tmp_path / "train.jsonl", *({"prompt": f"q{i}"} for i in range(40)))
    write(tmp_path / "eval.jsonl", {"prompt": "q"})
    assert "not read there: eval.jsonl" in files.load(tmp_path).origin
    (tmp_path / "train.csv").write_text("prompt\na\n")
    with pytest.raises(InputError, match=r"has train.jsonl and train.csv, and one of them can be train"):
        files.load(tmp_path)


def test_where_the_splits_come_from_is_said(tmp_path):
    path = write(tmp_path / "mine.jsonl", *({"prompt": f"q{i}"} for i in range(40)))
    assert files.load(path).origin == "mine.jsonl: cut into 80, 10 and 10 % by a hash of each conversation's opening"


def test_what_no_memory_should_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(jsonl, "PACKED_AT_LEAST", 2**18)
    for name, content, words in (
        ("long.jsonl", b'{"prompt": "' + b"a" * 2**16 + b'"}', r"line 1 has more than .* one row a line"),
        ("long.csv", b'prompt\n"' + b"a\n" * 2**16, "is not CSV"),
        ("bomb.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 2**16), r"unpacks to more than .* MiB by line"),
        ("one_line.jsonl.gz", gzip.compress(b" " * 2**22), "line 1 has more than"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            files.load(tmp_path / name)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe.jsonl \(it is no regular file\)"):
        files.load(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="There is no data at"):
        files.load(tmp_path)
    (tmp_path / "folder" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match="There is no data at"):
        files.load(tmp_path / "folder")


def test_files_that_cannot_be_read_are_named(tmp_path):
    packed = gzip.compress(b'{"prompt": "a"}\n' * 10_000)
    for name, content in (("cut", packed[: len(packed) // 2]), ("plain", b'{"prompt": "a"}\n'), ("noise", packed[:20])):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.jsonl.gz cannot be read after line .*whole gzip file"):
            files.load(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_no_files_are_named_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(InputError, match=r"neither a .jsonl, .csv .* a folder with train.jsonl"):
        files.load(tmp_path / name)


PLAIN = {"prompt": "The sky is ", "response": "blue.\n", "chosen": "blue.\n", "rejected": " green"}


def test_plain_rows_are_kept_to_the_last_space(tmp_path):
    texts = [" Why?\n", "\n\nHuman: Hi\n\nAssistant: Ho", "Human: Hi"]
    path = write(tmp_path / "train.jsonl", PLAIN, *({"prompt": text, "grade": 3} for text in texts))
    records = [record for found in files.load(path, format="plain").records.values() for record in found]
    by_prompt = {record.prompt[-1].content: record for record in records}
    assert by_prompt.keys() == {PLAIN["prompt"], *texts} and all(len(record.prompt) == 1 for record in records)
    full = by_prompt[PLAIN["prompt"]]
    assert {"prompt": full.asked, **{name: getattr(full, name) for name in rows.REPLIES}} == PLAIN
    assert [by_prompt[text].asked for text in texts] == texts
    assert by_prompt[texts[0]].columns == {"grade": 3}


def test_the_columns_of_plain_rows_are_mapped(tmp_path):
    path = write(tmp_path / "train.jsonl", {"code": "def f():\n", "next": "    pass"})
    loaded = files.load(path, {"prompt": ("code",), "response": ("next",)}, "plain")
    (record,) = [record for found in loaded.records.values() for record in found]
    assert (record.asked, record.response) == ("def f():\n", "    pass")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [USER]}, "'prompt' is a list"),
        ({"messages": [USER, ASSISTANT]}, "'messages' is a list"),
        ({"prompt": "Why?", "response": [ASSISTANT]}, "'response' is a list"),
        ({"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": [USER, NO]}, "'chosen' is a list"),
    ],
)
def test_messages_are_refused_where_rows_are_plain(row, words, tmp_path):
    path = write(tmp_path / "train.jsonl", row)
    with pytest.raises(InputError) as caught:
        files.load(path, format="plain")
    assert words in str(caught.value) and f"{path}, line 1" in str(caught.value)
    assert (caught.value.field, caught.value.value) == ("data.format", "plain")
    assert "`data.format=chat`" in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": " \n", "response": "Ho"}, "the prompt is empty"),
        ({"chosen": "Ho", "rejected": "No"}, "has no 'prompt'"),
        ({"prompt": 3}, "'prompt' must be a text"),
        ({"prompt": "Why?", "completion": "Ho"}, "'completion'"),
    ],
)
def test_plain_rows_are_checked_as_others(row, words, tmp_path):
    with pytest.raises(InputError, match=words):
        files.load(write(tmp_path / "train.jsonl", row), format="plain")
