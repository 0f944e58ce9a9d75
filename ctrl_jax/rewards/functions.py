"""How a reward that is a Python function is called: prompts as their source writes them, and columns by keyword."""

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctrl_jax.data.conversations import Record
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline.corpus import Corpus
from ctrl_jax.steps import calibration

TextReward = Callable[..., Sequence[float]]
"""(prompts as they are written, a response to each, and lists of columns by keyword) to a raw reward of each."""


def columns_of(function: TextReward, name: str, corpus: Corpus) -> tuple[str, ...]:
    """The columns that a function asks for: its parameters behind the first two, or all for `**columns`.

    A parameter with a default asks for its column where the data has it.

    Raises:
      InputError: if it takes no prompts and responses, or asks for a column that the data lacks.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have none
        return ()
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        first: list[str] = []
    else:
        first = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)][:2]
        if len(first) < 2:
            raise InputError(
                f"The reward {name}{inspect.signature(function)} must take prompts and responses, in this order, and "
                "what columns of the data it needs behind them by name."
            )
    named = [p for p in parameters if p.name not in first and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is kinds.empty and p.name not in corpus.columns]
    if missing:
        there = ", ".join(corpus.columns) or "none"
        raise InputError(
            f"The reward {name} asks for {', '.join(missing)}, which the data lacks; its columns beside prompts and "
            f"replies are {there}. Rename the parameter, or read it from another column: --data.columns "
            f"{missing[0]}=COLUMN."
        )
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return tuple(column for column in corpus.columns if column not in first)
    return tuple(p.name for p in named if p.name in corpus.columns)


def rewards(
    function: TextReward, name: str, asked: Sequence[Record], responses: Sequence[Sequence[str]],
    columns: Sequence[Mapping[str, Any]],
) -> np.ndarray:  # fmt: skip
    """Raw rewards [B, N] float32 of N responses to each prompt; `columns` has the values that go with each prompt.

    Raises:
      InputError: if the function raises, or returns anything but a finite float each.
    """
    count = sum(map(len, responses))

    def repeated(values: Sequence[Any]) -> list[Any]:
        # Copies, so that a function may add a reply to the messages of its prompt.
        return [copy.deepcopy(value) for value, row in zip(values, responses, strict=True) for _ in row]

    names = columns[0] if columns else {}
    try:
        returned = function(
            repeated([record.asked for record in asked]),
            [text for row in responses for text in row],
            **{column: repeated([values[column] for values in columns]) for column in names},
        )
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"The reward {name} failed with {type(error).__name__}: {error} ({place.filename}, line {place.lineno}). "
            "Mend it, and run the same command again; --debug shows the whole traceback."
        ) from error
    try:
        values = np.asarray(returned, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"The reward {name} returned what are not numbers ({error}); return a float each.") from error
    if values.shape != (count,):
        raise InputError(
            f"The reward {name} returned an array of shape {values.shape} for {count} responses; return one float for "
            "each."
        )
    if (out := calibration.out_of_range(values)).any():
        bad = int(np.flatnonzero(out)[0])
        raise InputError(
            f"The reward {name} returned {values[bad]} for response {bad}; return finite numbers, of at most "
            f"{calibration.MOST_REWARD:g}, which float32 can add up."
        )
    return values.astype(np.float32).reshape(len(responses), -1)


def check(function: TextReward, name: str, corpus: Corpus) -> None:
    """Calls the function on one row of the data, with its reply or an empty one.

    Raises:
      InputError: as `columns_of` and `rewards`.
    """
    names = columns_of(function, name, corpus)
    values = corpus.values(names)
    record = next(record for of_split in corpus.records.values() for record in of_split)
    reply = record.response or record.chosen or ""
    rewards(function, name, [record], [[reply]], [values[corpus.id_of(record)]])
