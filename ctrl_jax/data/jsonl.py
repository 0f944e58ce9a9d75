"""Rows of files of JSON lines, plain or packed, and what a file of lines may hold at most."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctrl_jax.data.rows import Row, kind, shown
from ctrl_jax.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz")
LONGEST_LINE = 2**24
"""Bytes. A line is read into memory whole, and a packed file of a few kB can hold one of gigabytes."""
PACKED = 300
"""A packed file may hold so many times its bytes, and `PACKED_AT_LEAST`; text is packed to a third or a tenth."""
PACKED_AT_LEAST = 2**26
DEEPEST = 100
"""Nested lists and objects; nothing that reads a row need fear for its stack then."""


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each object of a file of JSON lines, plain or .gz, after its place for messages: `file, line 3`.

    Errors: InputError with the file and line where a line is too long, not UTF-8, not JSON, no object, or says
    something twice; with the file where it cannot be read or unpacked. Empty lines are passed over.
    """
    for number, line in lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _object(line, place)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line of a file, plain or .gz, with its end, after its number.

    Errors: InputError where the file cannot be read or unpacked, a line is longer than `LONGEST_LINE`, or a packed file
    unpacks to far more than texts do.
    """
    number, unpacked = 0, 0
    try:
        most = PACKED_AT_LEAST + PACKED * path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                unpacked += len(line)
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{path}, line {number} has more than {LONGEST_LINE >> 20} MiB",
                        field=f"{path}, line {number}",
                        value=len(line),
                        remedy="write one row a line.",
                    )
                if path.suffix == ".gz" and unpacked > most:
                    raise InputError(
                        f"{path} unpacks to more than {most >> 20} MiB by line {number}, {PACKED} times its size, as "
                        "no text does",
                        field=str(path),
                        value=unpacked,
                        remedy="unpack it, if it is what it should be.",
                    )
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read after line {number}: {error}. A .gz must be a whole gzip file",
            field=str(path),
            value=str(error),
            remedy="copy or download it again.",
        ) from error


def decoded(line: bytes, place: str) -> str:
    """The text of a line, without a byte order mark. Errors: InputError with the place of what is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte {error.start + 1} of the line, 0x{error.object[error.start]:02x}, is not UTF-8 (in "
            f"{error.object[max(0, error.start - 20) : error.start + 20]!r})",
            field=place,
            value=line,
            remedy="save the file as UTF-8.",
        ) from error


def _object(line: bytes, place: str) -> Row:
    text = decoded(line, place)
    try:
        row = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not JSON: {error}. It begins with {shown(text)}",
            field=place,
            value=text,
            remedy="write one object a line.",
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f"{place} is {kind(row)}, {shown(row)}",
            field=place,
            value=row,
            remedy='write one object a line, such as {"prompt": ...}.',
        )
    if text.count("[") + text.count("{") > DEEPEST and _depth(row) > DEEPEST:
        raise InputError(
            f"{place} is nested more than {DEEPEST} deep",
            field=place,
            value=row,
            remedy="write texts, or lists of messages.",
        )
    if "\\ud" in text.lower():
        # An escape may name half of a character, which no tokenizer and no file can take.
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place} names half of a character (\\ud800 to \\udfff, alone)",
                field=place,
                value=row,
                remedy="mend its text.",
            ) from error
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {shown(twice)} twice")
    return found


def _depth(value: Any) -> int:
    level, deepest = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        deepest += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return deepest
