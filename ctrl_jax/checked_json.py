"""JSON of files that may be damaged or foreign: parsed, and checked value by value."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrl_jax.errors import InputError

ROUNDING = 1e-4
"""How far float32 may take a win rate beyond 1, or a KL below 0."""
DEEPEST = 64
"""Levels of JSON that are read."""


def parse(text: str) -> Any:
    """The JSON of a text. Raises ValueError, also where it is nested so deeply that walking it would fail."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [tree]
    for _ in range(DEEPEST):
        level = [
            child for node in level if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]  # fmt: skip
        if not level:
            return tree
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


@dataclass(frozen=True)
class JsonFile:
    """Checks of a JSON file's values, each with its place; the methods raise InputError with file, value and place."""

    source: pathlib.Path | str
    remedy: str
    """A sentence that says how to mend the file."""

    def refuse(self, value: Any, where: str, expected: str) -> InputError:
        return InputError(f"{self.source} has {_short(value)} at {where}, where {expected} must stand; {self.remedy}")

    def object(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.refuse(value, where, "a JSON object")
        return value

    def under(self, tree: Mapping[str, Any], key: str, absent: Any = None) -> Mapping[str, Any]:
        return self.object(tree.get(key) if tree.get(key) is not None else absent, key)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.refuse(value, where, "a name")
        return value

    def number(self, value: Any, where: str) -> float:
        number = finite(value)
        if number is None:
            raise self.refuse(value, where, "a finite number")
        return number

    def optional(self, value: Any, where: str) -> float | None:
        return None if value is None else self.number(value, where)

    def share(self, value: Any, where: str) -> float:
        number = self.number(value, where)
        if not -ROUNDING <= number <= 1 + ROUNDING:
            raise self.refuse(value, where, "a share between 0 and 1")
        return min(max(number, 0.0), 1.0)

    def optional_share(self, value: Any, where: str) -> float | None:
        return None if value is None else self.share(value, where)

    def fields(self, value: Any, where: str, names: Sequence[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        found = self.object(value, where)
        return {name: read(found.get(name), f"{where}.{name}") for name in names}

    def each(self, tree: Mapping[str, Any], key: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
        """The values of the object at `key`, none where it is missing."""
        return {name: read(value, f"{key}.{name}") for name, value in self.under(tree, key, {}).items()}
