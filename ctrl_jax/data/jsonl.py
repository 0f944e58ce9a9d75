"""Prompts, demonstrations and preference pairs from JSON lines; and the reading of such files, for every source."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctrl_jax.data.conversations import Conversation, Record, Turn, parse
from ctrl_jax.data.splits import SPLITS, Loaded, arranged, defect
from ctrl_jax.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz")

Row = dict[str, Any]


def load(path: Path) -> Loaded:
    """The records of a file, or of a folder of train, validation and test (see `splits.arranged`).

    A line is an object with `prompt`, and perhaps `chosen` and `rejected`, or `response`; or with `messages`, of which
    the last is the demonstration if it is the assistant's. A prompt is a text (hh-rlhf's form is read as turns; any
    other is one user turn) or a list of messages {role, content}; a reply is a text, or messages of which the last, the
    assistant's, is taken. Rows with an empty reply, or whose two replies are equal, are dropped and counted.

    Errors: InputError with the file and line for what is not such a row.
    """
    return collected(files(path), read_row)


def collected(files: Mapping[str, Path], read: Callable[[Row, str], Record | str]) -> Loaded:
    """The records of each split's file; `read` makes one of a row and its place, or says why it is to be dropped."""
    dropped = Counter[str]()
    published: dict[str, list[Record]] = {}
    for split, file in files.items():
        published[split] = []
        for place, row in rows(file):
            record = read(row, place)
            if isinstance(record, str):
                dropped[record] += 1
            else:
                published[split].append(record)
    return arranged(published, dropped)


def files(path: Path) -> dict[str, Path]:
    """By split, the files at a path; a file alone is called train. Errors: InputError where there is none."""
    if path.is_file():
        return {"train": path}
    found = {split: file for split in SPLITS for suffix in SUFFIXES if (file := path / f"{split}{suffix}").is_file()}
    if not found:
        raise InputError(
            f"There is no data at {path}: it is neither a .jsonl or .jsonl.gz file nor a folder with train.jsonl "
            "(and validation.jsonl, test.jsonl). Give --data.path one of them."
        )
    return found


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each object of a file of JSON lines, plain or .gz, after its place for messages: `file, line 3`.

    Errors: InputError with the file and line where a line is not UTF-8, not JSON, or no object; with the file where it
    cannot be read or unpacked. Empty lines are passed over.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _object(line, place)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read after line {number}: {error}. A .gz must be a whole gzip file; copy or download it "
            "again."
        ) from error


def _object(line: bytes, place: str) -> Row:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8 "
            f"(in {line[max(0, error.start - 20) : error.start + 20]!r}); save the file as UTF-8."
        ) from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not JSON: {error}. It begins with {_shown(text)}; write one object a line."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f'{place} is {_kind(row)}, {_shown(row)}; write one object a line, such as {{"prompt": ...}}.')
    if "\\ud" in text.lower():
        # An escape may name half of a character, which no tokenizer and no file can take.
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place} names half of a character (\\ud800 to \\udfff, alone); mend its text."
            ) from error
    return row


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """A field that has to be a text. Errors: InputError with the place."""
    if name not in row:
        raise InputError(f"{place} has no {name!r}; it has {', '.join(map(repr, row)) or 'no fields'}.")
    if not isinstance(row[name], str):
        raise InputError(f"{place}: {name!r} must be a text, and is {_kind(row[name])}, {_shown(row[name])}.")
    return row[name]


def read_row(row: Row, place: str) -> Record | str:
    """The record of a row, its replies without the white space around them; or why it is defective.

    Errors: InputError with the place.
    """
    response = None
    if "messages" in row:
        prompt = _messages(row, "messages", place)
        if prompt[-1].role == "assistant":
            prompt, response = prompt[:-1], prompt[-1].content.strip()
    elif isinstance(row.get("prompt"), list):
        prompt = _messages(row, "prompt", place)
    elif "prompt" in row:
        prompt = parse(text_of(row, "prompt", place))
    else:
        hint = (
            " (rows of hh-rlhf, of whole dialogues, are read by --data.source hh_rlhf/...)" if "chosen" in row else ""
        )
        raise InputError(
            f"{place} has neither 'prompt' nor 'messages'; it has {', '.join(map(repr, row)) or 'no fields'}{hint}."
        )
    if not prompt or not prompt[-1].content.strip():
        raise InputError(f"{place}: the prompt is empty; give it a text or leave the line out.")
    if prompt[-1].role != "user":
        raise InputError(
            f"{place}: the prompt ends with the {prompt[-1].role}'s turn, {_shown(prompt[-1].content)}; it must end "
            "with the user's. The assistant's reply belongs in 'response', or last in 'messages'."
        )
    if ("chosen" in row) != ("rejected" in row):
        has, lacks = ("chosen", "rejected") if "chosen" in row else ("rejected", "chosen")
        raise InputError(f"{place} has {has!r} but no {lacks!r}; a preference pair needs both.")
    if "response" in row:
        response = _reply(row, "response", place)
    chosen, rejected = (_reply(row, name, place) if name in row else None for name in ("chosen", "rejected"))
    record = Record(prompt, response, chosen, rejected)
    return defect(record) or record


def _messages(row: Row, name: str, place: str) -> Conversation:
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{place}: {name!r} must be a list of messages {{role, content}}, and is {_kind(messages)}, "
            f"{_shown(messages)}."
        )
    turns = []
    for i, message in enumerate(messages):
        where = f"{place}, message {i + 1} of {name!r}"
        if not isinstance(message, dict):
            raise InputError(
                f"{where} must be an object {{role, content}}, and is {_kind(message)}, {_shown(message)}."
            )
        role = text_of(message, "role", where)
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{where} has the role {role!r}; it is one of system, user, assistant.")
        if role == "system" and i:
            raise InputError(f"{where} is the system's; only the first message may be.")
        turns.append(Turn(role, text_of(message, "content", where)))  # type: ignore[arg-type]
    return tuple(turns)


def _reply(row: Row, name: str, place: str) -> str:
    if not isinstance(row[name], list):
        return text_of(row, name, place).strip()
    last = _messages(row, name, place)[-1]
    if last.role != "assistant":
        raise InputError(f"{place}: {name!r} must end with the assistant's message, and ends with the {last.role}'s.")
    return last.content.strip()


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return kinds[type(value)]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
