"""A policy under any decoders: win rates, tokens spent, and the procedure to train for.

The policy and its reference are decoded alike, on test prompts. Where a decoder is no choice by order among whole
responses, as a tree search is not, its runs on the reference say which mixture of procedures comes nearest: train for
that one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ctrl_jax.commands import figure
from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import expand_user
from ctrl_jax.decoding import names
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.errors import InputError
from ctrl_jax.report.decoders import Decoding, measure
from ctrl_jax.report.panels import tokens
from ctrl_jax.runtime.console import be_quiet, say, table

LEAST_RUNS = 2


@dataclass(frozen=True)
class Options(RunOptions):
    decoders: tuple[str, ...] = (
        "sampling", "best_of_2", "best_of_4", "best_of_8", "best_of_16", "blockwise_best_of_4(8)",
        "blockwise_best_of_8(8)", "tree_of_8(2,8)", "tree_of_16(4,8)",
    )  # fmt: skip
    """Procedures, `blockwise_best_of_K(L)`, which of K continuations keeps the best after every L tokens, or
    `tree_of_K(m,L)`, which keeps m."""
    runs: int = 8
    """Responses that each decoder returns to a prompt, on each side."""
    figure: Path | None = None
    """Where the picture goes; by default decoders.png in the work directory."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "figure")
        figure.check(self.figure)
        if self.runs < LEAST_RUNS:
            raise InputError(f"--runs is {self.runs}; an estimate needs at least {LEAST_RUNS}.")


def main(arguments: list[str]) -> int:
    asked = read("decode", Options, arguments)
    decoders = [names.parse(name) for name in asked.options.decoders]
    for one in decoders:
        if isinstance(one, Tree):
            one.check_length(asked.experiment.data.response_length)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, decode
    from ctrl_jax.pipeline.run import prepare

    if asked.options.json:
        be_quiet()
    with started(asked) as workspace, workspace.claimed():
        run = prepare(workspace)
        found = decode.run(run, align.policy(run), decoders, asked.options.runs)
    decodings = [measure(*one, resamples=asked.experiment.evaluation.bootstrap_resamples) for one in found]
    if asked.options.json:
        print(json.dumps([one.as_json() for one in decodings], indent=2))
    else:
        _print(decodings, asked.named.name, asked.options.runs)
    path = asked.options.figure or (None if asked.options.json else asked.work_dir / "decoders.png")
    if path is not None:
        figure.write(path, tokens.panels(decodings), asked.named.name)
        if not asked.options.json:
            say(f"Figure: {path}")
    return 0


def _print(found: list[Decoding], name: str, runs: int) -> None:
    golden = any(one.gold_win_rate is not None for one in found)
    columns = ["decoder", "policy wins, both so decoded", *(["by gold"] if golden else [])]
    columns += ["beats one response: policy", "reference", "tokens drawn: policy", "reference", "scored"]
    rows = [
        [
            one.name, str(one.win_rate), *([str(one.gold_win_rate)] if golden else []),
            *(str(one.against_one[side]) for side in one.against_one),
            *(f"{one.tokens[side]:.0f}" for side in one.tokens), one.scored,
        ]
        for one in found
    ]  # fmt: skip
    table(f"{name}: decoders on test prompts, {runs} responses of each to a prompt, 95 % intervals", columns, rows)
    for one in found:
        if one.nearest is not None:
            say(
                f"{one.name} picks from the reference as {one.nearest.procedure} does, within "
                f"{one.nearest.distance:.3f} of its rank CDF. To train for it: "
                f"--policy.transform optimal --policy.procedure '{one.nearest.procedure}'"
            )
