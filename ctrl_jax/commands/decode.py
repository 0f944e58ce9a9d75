"""A policy under any decoders: win rates, tokens spent, and the procedure to train for.

The policy and its reference are decoded alike, on test prompts. Where a decoder is no choice by order among whole
responses, as a tree search is not, its runs on the reference say which mixture of procedures comes nearest: train for
that one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_jax.commands import address, figure
from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import Experiment, expand_user
from ctrl_jax.decoding import names
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.errors import InputError
from ctrl_jax.report.decoders import Decoding, measure
from ctrl_jax.report.panels import tokens
from ctrl_jax.runtime.console import be_quiet, say, table
from ctrl_jax.theory.procedures import Procedure

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
    decoders = _decoders(asked.options.decoders, asked.experiment)
    beside = asked.options.beside
    if beside is not None:
        _check_beside(beside, asked.work_dir, asked.experiment)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, decode
    from ctrl_jax.pipeline.run import prepare
    from ctrl_jax.runtime import hosts

    if asked.options.json:
        be_quiet()
    with started(asked) as workspace, workspace.claimed():
        run = prepare(workspace)
        aligned = align.policy(run)
        other = None if beside is None else _policy(beside, workspace, aligned)
        found = decode.run(run, aligned, decoders, asked.options.runs, other)
    if not hosts.first():
        return 0
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


def _decoders(given: Sequence[str], experiment: Experiment) -> list[Procedure | Tree]:
    """Raises InputError for what is no decoder, or cannot be used in the experiment."""
    if not given:
        raise InputError(f"--decoders names none. Give {names.FORMS}.")
    decoders = [names.parse(name) for name in given]
    for one in decoders:
        if isinstance(one, Tree):
            one.check_length(experiment.data.response_length)
            if experiment.calibration.quantiles is not None:
                raise InputError(
                    f"{one} is a search, and calibration.quantiles is {experiment.calibration.quantiles}: quantiles "
                    "are no sample of the reference's rewards, by which to know the procedure that it comes near. "
                    "Leave the searches out, or train without `calibration.quantiles`."
                )
    return decoders


def _check_beside(folder: Path, work_dir: Path, experiment: Experiment) -> None:
    """Raises InputError unless it is another run that is finished and draws at the same temperature."""
    from ctrl_jax.pipeline import results

    if folder.resolve() == work_dir.resolve():
        raise InputError(f"--beside is {folder}, the run itself; give another one.")
    address.check_versions(folder)
    results.check(folder)
    if not (folder / results.RESULTS).exists():
        raise InputError(f"--beside is {folder}, which is not finished. Run `evaluate {folder}` first.")
    other = address.read_experiment(folder).policy.temperature
    if other != experiment.policy.temperature:
        raise InputError(
            f"--beside is {folder}, whose policy.temperature is {other:g}, and here it is "
            f"{experiment.policy.temperature:g}: both would be decoded at the latter. Give a run of that temperature."
        )


def _policy(folder: Path, workspace: "Workspace", aligned: "Aligned") -> Any:
    """The parameters of the finished run in the folder, its adapter merged.

    Raises:
      InputError: if it was trained from another reference, or by another reward.
    """
    from ctrl_jax.models import networks
    from ctrl_jax.pipeline import align, results
    from ctrl_jax.pipeline.run import prepare
    from ctrl_jax.runtime import checksums

    theirs = checksums.about(folder / results.POLICY)
    for name in ("reference", "reward_model"):
        if theirs.get(name) != aligned.depends[name]:
            raise InputError(
                f"--beside is {folder}, which was trained with another {name.replace('_', ' ')}: {theirs.get(name)}, "
                f"and here it is {aligned.depends[name]}. Give a run that shares all but its training with this one."
            )
    experiment, stages_dir = address.read_experiment(folder), address.runs_dir(folder) / "stages"
    its_own = replace(workspace, experiment=experiment, work_dir=folder, stages_dir=stages_dir)
    with its_own.claimed():
        run = prepare(its_own)
        return networks.merged(run.models, align.policy(run).policy)


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
        if one.nearest is not None and not one.nearest.is_near:
            say(
                f"{one.name} picks from the reference as no procedure does: the nearest is {one.nearest.procedure}, "
                f"{one.nearest.distance:.2f} from its rank CDF."
            )
        elif one.nearest is not None:
            say(
                f"{one.name} picks from the reference as {one.nearest.procedure} does, within "
                f"{one.nearest.distance:.3f} of its rank CDF. To train for it: "
                f"--policy.transform optimal --policy.procedure '{one.nearest.procedure}'"
            )
