"""A policy under any decoders: win rates, tokens spent, and the procedure to train for.

The policy and its reference are decoded alike, on test prompts. Where a decoder is no choice by order among whole
responses, as a tree search is not, its runs on the reference say which mixture of procedures comes nearest: train for
that one.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_jax.commands import address, figure
from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import expand_user
from ctrl_jax.decoding import names
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.errors import InputError
from ctrl_jax.report.decoders import Decoding, measure
from ctrl_jax.report.panels import tokens
from ctrl_jax.runtime.console import be_quiet, say, table

if TYPE_CHECKING:
    from ctrl_jax.pipeline.train import Aligned
    from ctrl_jax.pipeline.workspace import Workspace

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
    beside: Path | None = None
    """The folder of another finished run, of the same reference and reward: what this policy wins more than that one
    under each decoder, on the same prompts and by the same draws."""
    figure: Path | None = None
    """Where the picture goes; by default decoders.png in the work directory."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "figure", "beside")
        figure.check(self.figure)
        if self.runs < LEAST_RUNS:
            raise InputError(f"--runs is {self.runs}; an estimate needs at least {LEAST_RUNS}.")


def main(arguments: list[str]) -> int:
    asked = read("decode", Options, arguments)
    decoders = [names.parse(name) for name in asked.options.decoders]
    for one in decoders:
        if isinstance(one, Tree):
            one.check_length(asked.experiment.data.response_length)
    beside = asked.options.beside
    if beside is not None:
        address.check_versions(beside)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, decode, results
    from ctrl_jax.pipeline.run import prepare

    if beside is not None:
        results.check(beside)

    if asked.options.json:
        be_quiet()
    with started(asked) as workspace, workspace.claimed():
        run = prepare(workspace)
        aligned = align.policy(run)
        other = None if beside is None else _policy(beside, workspace, aligned)
        found = decode.run(run, aligned, decoders, asked.options.runs, other)
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


def _policy(folder: Path, workspace: "Workspace", aligned: "Aligned") -> Any:
    """The parameters of the run in the folder.

    Raises:
      InputError: if it was trained from another reference, or is scored by another reward.
    """
    from ctrl_jax.pipeline import align
    from ctrl_jax.pipeline.run import prepare

    experiment = address.read_experiment(folder)
    its_own = replace(workspace, experiment=experiment, work_dir=folder)
    with its_own.claimed():
        other = align.policy(prepare(its_own))
    for name, ours, theirs in (
        ("reference", aligned.reference.stage, other.reference.stage),
        ("reward", aligned.reward.fingerprint, other.reward.fingerprint),
    ):
        if ours != theirs:
            raise InputError(
                f"--beside is {folder}, whose {name} is another one: {theirs}, and here {ours}. Give a run that shares "
                "all but its training with this one."
            )
    return other.policy


def _print(found: list[Decoding], name: str, runs: int) -> None:
    golden = any(one.gold_win_rate is not None for one in found)
    beside = any(one.difference is not None for one in found)
    columns = ["decoder", "policy wins, both so decoded", *(["more than beside"] if beside else [])]
    columns += ["by gold"] if golden else []
    columns += ["beats one response: policy", "reference", "tokens drawn: policy", "reference", "scored"]
    rows = [
        [
            one.name, str(one.win_rate), *([f"{one.difference:+.3f}"] if beside else []),
            *([str(one.gold_win_rate)] if golden else []),
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
