"""The command line's spelling of what messages name as fields: `policy.kl_budget` is --policy.kl-budget."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from ctrl_jax.commands.options import Places
from ctrl_jax.config import Calibration, Experiment, Regression

OF_COMMANDS = (
    "baseline", "device_kind", "efficiency.bandwidth", "efficiency.matmul", "format", "jobs", "output", "point", "port",
    "steps", "transforms", "write_jobs",
)  # fmt: skip
"""Options of single commands that messages name."""

COMPLETE = Experiment("any", calibration=Calibration(keep_responses=True), start=Regression())
"""An experiment with every part, whose options are all that there are."""

_NAMED = re.compile(r"`([a-z]\w*(?:\.[a-z]\w*)*)(?:=([^\s`]*))?`|(?<![\w./,-])([a-z]\w*(?:\.[a-z]\w*)+)(?![\w/])")


def spelled(message: str) -> str:
    """The message with fields and options as flags: `data.source=files` becomes --data.source files.

    Of an experiment's fields those without backticks as well; a field is left as it is where it is part of a path.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1] or found[3], found[2]
        known = name in options() if found[1] else "." in name and name in options()
        # A switch has no value.
        given = f" {value}" if value and value != "True" else ""
        return f"--{name.replace('_', '-')}{given}" if known else found[0]

    return _NAMED.sub(flag, message)


@functools.cache
def options() -> frozenset[str]:
    """Every field that is an option: of an experiment by its path, of a command by its name."""
    return frozenset((*_fields(COMPLETE), *_fields(Places()), *OF_COMMANDS))


def _fields(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
