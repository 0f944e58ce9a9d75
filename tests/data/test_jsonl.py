import gzip
import json

import pytest

from ctrl_jax.data import jsonl
from ctrl_jax.data.conversations import Record, Turn
from ctrl_jax.errors import InputError

ASK = Turn("user", "Why is the sky blue?")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
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
        ({"prompt": "Why is the sky blue?", "chosen": "a", "rejected": "b", "response": "c", "other": [1]},
         Record((ASK,), "c", "a", "b")),
    ],
)  # fmt: skip
def test_every_form_of_a_row(row, expected, tmp_path):
    loaded = jsonl.load(write(tmp_path / "data.jsonl", row))
    (found,) = [record for records in loaded.records.values() for record in records]
    assert found == expected
    assert (loaded.rows, loaded.dropped) == (1, {})


def test_a_packed_file_with_empty_lines_and_a_byte_order_mark(tmp_path):
    rows = [{"prompt": f"Question {i} — “quoted” 漢字?"} for i in range(50)]
    text = "\ufeff" + "\n\n  \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with gzip.open(tmp_path / "data.jsonl.gz", "wb") as file:
        file.write(text.encode())
    loaded = jsonl.load(tmp_path / "data.jsonl.gz")
    assert loaded.rows == 50
    found = {record.prompt[0].content for records in loaded.records.values() for record in records}
    assert found == {row["prompt"] for row in rows}


def test_a_folder_has_its_own_splits(tmp_path):
    for split, prompts in (("train", "abc"), ("validation", "cd"), ("test", "de")):
        write(tmp_path / f"{split}.jsonl", *({"prompt": prompt} for prompt in prompts))
    loaded = jsonl.load(tmp_path)
    found = {split: [record.prompt[0].content for record in records] for split, records in loaded.records.items()}
    assert found == {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}
    assert loaded.dropped == {"prompt in another split": 2}
    assert loaded.rows == 7


def test_defective_rows_are_counted(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, pair | {"chosen": " "}, {"prompt": "a", "response": ""}, pair | {"rejected": "b "}]
    loaded = jsonl.load(write(tmp_path / "data.jsonl", *rows))
    assert loaded.dropped == {"empty response": 2, "chosen equals rejected": 1}
    assert (loaded.rows, sum(map(len, loaded.records.values()))) == (4, 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"', ["is not JSON", '"prompt": "a"', "one object a line"]),
        (b"[" * 100_000, ["is not JSON"]),
        (b'{"prompt": "a"} {"prompt": "b"}', ["is not JSON", "Extra data"]),
        (b'["a"]', ["is a list", "['a']"]),
        (b"null", ["is null"]),
        (b'{"prompt": "caf\xe9"}', ["byte 16", "0xe9", "not UTF-8"]),
        (b'{"prompt": "\\ud83d alone"}', ["half of a character"]),
        (b'{"text": "a", "id": 3}', ["neither 'prompt' nor 'messages'", "'text', 'id'"]),
        (b"{}", ["no fields"]),
        (b'{"chosen": "a", "rejected": "b"}', ["--data.source hh_rlhf"]),
        (b'{"prompt": 3}', ["'prompt' must be a text", "a number, 3"]),
        (b'{"prompt": null}', ["is null"]),
        (b'{"prompt": " \\n"}', ["the prompt is empty"]),
        (b'{"prompt": "\\n\\nHuman: \\n\\nAssistant:"}', ["the prompt is empty"]),
        (b'{"prompt": []}', ["list of messages", "a list, []"]),
        (b'{"prompt": "\\n\\nHuman: a\\n\\nAssistant: b"}', ["ends with the assistant's turn", "'b'", "'response'"]),
        (b'{"prompt": "a", "chosen": "b"}', ["'chosen' but no 'rejected'"]),
        (b'{"prompt": "a", "rejected": "b"}', ["'rejected' but no 'chosen'"]),
        (b'{"prompt": "a", "response": null}', ["'response' must be a text", "null"]),
        (b'{"prompt": "a", "response": {"text": "b"}}', ["'response' must be a text", "an object"]),
        (b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}',
         ["'chosen' must end with the assistant's message", "the user's"]),
        (b'{"messages": "a"}', ["'messages' must be a list", "a text, 'a'"]),
        (b'{"messages": ["a"]}', ["message 1", "an object", "'a'"]),
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
        jsonl.load(path)
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert len(message) < 600
    for word in words:
        assert word in message


def test_files_that_cannot_be_read_are_named(tmp_path):
    packed = gzip.compress(b'{"prompt": "a"}\n' * 10_000)
    for name, content in (("cut", packed[: len(packed) // 2]), ("plain", b'{"prompt": "a"}\n'), ("noise", packed[:20])):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.jsonl.gz cannot be read after line .*whole gzip file"):
            jsonl.load(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_no_files_are_named_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(InputError, match=r"neither a .jsonl or .jsonl.gz file nor a folder with train.jsonl"):
        jsonl.load(tmp_path / name)
