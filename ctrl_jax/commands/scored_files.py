"""Two files of scored responses, of a policy and of its reference, as the commands that judge them read them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ctrl_jax.config import expand_user
from ctrl_jax.data import scored_responses
from ctrl_jax.data.scored_responses import ScoredResponses
from ctrl_jax.errors import InputError
from ctrl_jax.report.judgement import Sides
from ctrl_jax.rewards import function

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Files:
    """The options of such a command."""

    policy: Annotated[Path, tyro.conf.Positional]
    """JSON lines, a row a prompt: {"prompt": ..., "responses": [...], "rewards": [...]}, of any engine."""
    reference: Annotated[Path, tyro.conf.Positional]
    """Likewise of the reference's responses to the same prompts, in any order."""
    reward: str = "rewards"
    """What picks: a column of the rows with a number for each response, or module:name of a Python function (prompts,
    responses) -> floats."""
    judge: str | None = None
    """Who decides which of the picks wins: another column, or another function; by default the reward itself."""
    figure: Path | None = None
    """Where the figure goes, as .png, .svg or .pdf; by default below `runs`, and nowhere with --json."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "policy", "reference", "figure")

    def picture(self, command: str) -> Path | None:
        """Where the figure goes."""
        if self.figure is not None or self.json:
            return self.figure
        return Path("runs") / f"{command}_{self.policy.name.split('.')[0]}.png"


def read(files: Files) -> Sides:
    """The numbers of both files, in the order of the policy's prompts.

    Raises:
      InputError: for an option that cannot be used; with the file and line, where a file cannot; with the function,
        where that fails.
    """
    if files.figure is not None and files.figure.suffix not in PICTURES:
        raise InputError(f"--figure is {files.figure}, which names no kind of picture; end it in .png, .svg or .pdf.")
    if files.judge == files.reward:
        raise InputError(f"--judge is {files.judge}, which picks already (--reward). Leave it out, or name another.")
    names = [files.reward, *([] if files.judge is None else [files.judge])]
    functions = {name: function.load(name, field="reward") for name in names if _is_function(name)}
    columns = [name for name in names if name not in functions]
    policy, reference = (
        scored_responses.read(path, columns, texts=bool(functions)) for path in (files.policy, files.reference)
    )
    sides = policy, scored_responses.in_order_of(policy, reference)
    found = {
        name: [_scored(side, functions[name]) if name in functions else side.values[name] for side in sides]
        for name in names
    }
    judged = [None, None] if files.judge is None else found[files.judge]
    return Sides(*found[files.reward], *judged)


def _is_function(name: str) -> bool:
    return name.count(":") == 1 and os.sep not in name


def _scored(side: ScoredResponses, reward: function.Function) -> np.ndarray:
    assert side.responses is not None, "they were asked for"
    asked = side.records
    return function.rewards(reward.call, reward.name, asked, side.responses, [{} for _ in asked])
