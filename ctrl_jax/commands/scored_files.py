"""Two files of scored responses, of a policy and of its reference, as the commands that judge them read them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ctrl_jax.commands import figure
from ctrl_jax.config import expand_user
from ctrl_jax.data import scored_responses
from ctrl_jax.data.conversations import Record
from ctrl_jax.data.scored_responses import ScoredResponses
from ctrl_jax.errors import InputError
from ctrl_jax.report.judgement import Sides
from ctrl_jax.theory.procedures import Procedure


@dataclass(frozen=True)
class Files:
    """The options of such a command."""

    policy: Annotated[Path, tyro.conf.Positional]
    """JSON lines, a row a prompt: {"prompt": ..., "responses": [...], "rewards": [...]}, of any engine."""
    reference: Annotated[Path, tyro.conf.Positional]
    """Likewise of the reference's responses to the same prompts, in any order."""
    reward: str = "rewards"
    """What picks: a column of the rows with a number for each response, or module:name of a Python function (prompts,
    responses) -> floats, which gets other columns of the rows by the names of its parameters."""
    judge: str | None = None
    """Who decides which of the picks wins: another column, or another function; by default the reward itself."""
    figure: Path | None = None
    """Where the figure goes, as .png, .svg or .pdf; by default below `runs`, with --json only where it is given."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "policy", "reference", "figure")

    def picture(self, command: str) -> Path | None:
        """Where the figure goes."""
        if self.figure is not None or self.json:
            return self.figure
        names = [command, _stem(self.policy), _stem(self.reference), *([] if self.judge is None else [self.judge])]
        return Path("runs") / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', '_'.join(names))}.png"


def read(files: Files, asked: Sequence[Procedure] = ()) -> Sides:
    """The numbers of both files, in the order of the policy's prompts.

    Args:
      files: where they are, and what scores them.
      asked: procedures that both need samples for.

    Raises:
      InputError: for an option that cannot be used; with the file and line, where a file cannot; with the function,
        where that fails.
    """
    figure.check(files.figure)
    if files.judge == files.reward:
        raise InputError(f"--judge is {files.judge}, which picks already (--reward). Leave it out, or name another.")
    # Only now: it imports what takes seconds, and a mistyped option should not wait.
    from ctrl_jax.rewards import function

    names = {files.reward: "reward", **({} if files.judge is None else {files.judge: "judge"})}
    functions = {name: function.load(name, field=field) for name, field in names.items() if _is_function(name)}
    columns = [name for name in names if name not in functions]
    policy, reference = (
        scored_responses.read(path, columns, texts=bool(functions)) for path in (files.policy, files.reference)
    )
    sides = policy, scored_responses.in_order_of(policy, reference)
    for side in sides:
        _check_samples(side, asked)
    columns_of = {name: function.columns_of(one.call, name, _shared(sides)) for name, one in functions.items()}
    found = {
        name: [
            function.rewards(functions[name].call, name, *_given(side, columns_of[name]))
            if name in functions
            else side.values[name]
            for side in sides
        ]
        for name in names
    }
    judged = [None, None] if files.judge is None else found[files.judge]
    return Sides(*found[files.reward], *judged)


def _is_function(name: str) -> bool:
    return name.count(":") == 1 and os.sep not in name


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _check_samples(side: ScoredResponses, asked: Sequence[Procedure]) -> None:
    """Before a function is asked for hours."""
    for procedure in asked:
        if procedure.num_samples > side.samples:
            raise InputError(
                f"{side.path} has {side.samples} responses a prompt, and {procedure} needs {procedure.num_samples}",
                field="procedures",
                value=procedure.name,
                remedy="sample more, or choose a procedure with fewer.",
            )


def _shared(sides: Sequence[ScoredResponses]) -> list[str]:
    """The columns that every row of both files has."""
    rows = [record.columns for side in sides for record in side.records]
    return [name for name in rows[0] if all(name in row for row in rows)]


def _given(side: ScoredResponses, names: Sequence[str]) -> tuple[list[Record], list[list[str]], list[dict[str, Any]]]:
    """What a function is given: prompts, responses, and the columns of these names."""
    assert side.responses is not None, "they were asked for"
    return side.records, side.responses, [{name: record.columns[name] for name in names} for record in side.records]
