"""Responses that any engine sampled, with numbers that judge them: JSON lines, a row a prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_jax.data import jsonl
from ctrl_jax.data.conversations import Record
from ctrl_jax.data.rows import Row, kind, listed, read_row, shown
from ctrl_jax.errors import InputError

RESPONSES = "responses"
LARGEST = 1e300
"""Larger numbers are none that anything was scored with."""
NAMED = 3
"""Prompts that a message names."""


@dataclass(frozen=True)
class ScoredResponses:
    """B prompts with M responses each."""

    path: Path
    places: list[str]
    """Of each row, for messages: `file, line 3`."""
    records: list[Record]
    responses: list[list[str]] | None
    """None where they were not asked for."""
    values: dict[str, np.ndarray]
    """[B, M] by column."""
    samples: int
    """M."""


def read(path: Path, columns: Sequence[str], *, texts: bool) -> ScoredResponses:
    """The rows of a file, each `{"prompt": ..., "responses": [...], "rewards": [...]}`.

    Args:
      path: of JSON lines, plain or .gz.
      columns: whose lists of numbers are read, one for each response.
      texts: whether `responses` are read.

    Raises:
      InputError: with the file and line, where a row lacks a column, has other numbers of values than the first, what
        is no finite number, or the prompt of an earlier row.
    """
    places: list[str] = []
    rows: list[Row] = []
    for place, row in jsonl.rows(path):
        places.append(place)
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows", field=str(path), value=0, remedy="give it a row a prompt.")
    records = [_record(row, place) for row, place in zip(rows, places, strict=True)]
    _check_distinct(records, places)
    values = {name: [_numbers(row, name, place) for row, place in zip(rows, places, strict=True)] for name in columns}
    responses = [_texts(row, place) for row, place in zip(rows, places, strict=True)] if texts else None
    lists: dict[str, list[Any]] = {**values, **({} if responses is None else {RESPONSES: responses})}
    samples = _count(lists, places)
    arrays = {name: np.array(lists, np.float64) for name, lists in values.items()}
    return ScoredResponses(path, places, records, responses, arrays, samples)


def in_order_of(first: ScoredResponses, second: ScoredResponses) -> ScoredResponses:
    """The rows of `second` in the order of the prompts of `first`.

    Raises:
      InputError: if a prompt is in one of the two alone.
    """
    rows = {record.prompt: row for row, record in enumerate(second.records)}
    for one, other in ((first, second), (second, first)):
        known = {record.prompt for record in other.records}
        alone = [place for place, record in zip(one.places, one.records, strict=True) if record.prompt not in known]
        if alone:
            more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
            raise InputError(
                f"{'; '.join(alone[:NAMED])}{more}: the prompt is not in {other.path}",
                field=alone[0],
                value=len(alone),
                remedy="sample both policies on the same prompts, or leave these out.",
            )
    order = [rows[record.prompt] for record in first.records]
    return replace(
        second,
        places=[second.places[row] for row in order],
        records=[second.records[row] for row in order],
        responses=None if second.responses is None else [second.responses[row] for row in order],
        values={name: array[order] for name, array in second.values.items()},
    )


def _record(row: Row, place: str) -> Record:
    if "prompt" not in row:
        raise InputError(
            f"{place} has no 'prompt'; it has {listed(row)}",
            field=place,
            value=[*row],
            remedy="give each row the prompt, a text or a list of messages {role, content}.",
        )
    prompt = row["prompt"]
    if not isinstance(prompt, str | list):
        raise InputError(
            f"{place}: 'prompt' is {kind(prompt)}, {shown(prompt)}",
            field=place,
            value=prompt,
            remedy="give a text, or a list of messages {role, content}.",
        )
    found = read_row({"prompt": prompt}, place)
    if isinstance(found, str):
        raise InputError(f"{place}: {found}", field=place, value=prompt, remedy="mend the prompt.")
    return replace(found, columns={name: value for name, value in row.items() if name not in ("prompt", RESPONSES)})


def _column(row: Row, name: str, place: str) -> list[Any]:
    if name not in row:
        raise InputError(
            f"{place} has no {name!r}; it has {listed(row)}",
            field=place,
            value=[*row],
            remedy=f'write rows such as {{"prompt": ..., "responses": [...], "{name}": [...]}}.',
        )
    values = row[name]
    if not isinstance(values, list) or not values:
        raise InputError(
            f"{place}: {name!r} is {kind(values)}, {shown(values)}",
            field=place,
            value=values,
            remedy="give a list, with an entry for each response.",
        )
    return values


def _numbers(row: Row, name: str, place: str) -> list[float]:
    values = _column(row, name, place)
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise InputError(
                f"{place}: {name}[{index}] is {json.dumps(value)[:80]}",
                field=place,
                value=value,
                remedy="give finite numbers, or leave the prompt out of both files.",
            )
    return values


def _texts(row: Row, place: str) -> list[str]:
    values = _column(row, RESPONSES, place)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(
                f"{place}: {RESPONSES}[{index}] is {kind(value)}, {shown(value)}",
                field=place,
                value=value,
                remedy="give texts.",
            )
    return values


def _check_distinct(records: Sequence[Record], places: Sequence[str]) -> None:
    first: dict[Any, str] = {}
    for record, place in zip(records, places, strict=True):
        if record.prompt in first:
            raise InputError(
                f"{place} has the prompt of {first[record.prompt]} again",
                field=place,
                value=record.asked,
                remedy="put all responses to a prompt into one row.",
            )
        first[record.prompt] = place


def _count(lists: dict[str, list[Any]], places: Sequence[str]) -> int:
    """The one length of all lists: an estimate over prompts weighs them alike."""
    name, values = next(iter(lists.items()))
    count, where = len(values[0]), f"{places[0]} has {len(values[0])} {name}"
    for name, values in lists.items():
        for place, one in zip(places, values, strict=True):
            if len(one) != count:
                raise InputError(
                    f"{place} has {len(one)} {name}, and {where}",
                    field=place,
                    value=len(one),
                    remedy="give every prompt of a file the same number of responses, and each of them a number.",
                )
    return count
