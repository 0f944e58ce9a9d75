"""Takes the step of a training again that was not made, from the state and the batch that `fit` kept of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ctrl_jax.build import TrainState
from ctrl_jax.devices.mesh import shard
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import train
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.loop import Batches, abstract, failed_batch, named
from ctrl_jax.runtime.stages import read_arrays

QUANTITIES = {
    "raw_reward": "reward",
    "sampler_scorer_gap": "log-probs",
    "kl": "KL",
    "loss": "loss",
    "gradient_norm": "gradient",
}
"""Metrics that go wrong where something does, in the order in which a step computes what they are made of."""


class Replayed(Exception):
    """The step was taken again, and was told of: what would come behind it is not wanted."""


def run(run: Run) -> None:
    """Finds the first training of the experiment that has stopped at a step that is not finite, and takes it again.

    Nothing is trained, and nothing is written.

    Raises:
      InputError: if there is no such step.
    """
    try:
        train.run(dataclasses.replace(run, fit=fit))
    except Replayed:
        return
    raise InputError(f"No step of {run.work_dir} has failed, nor of the stages that it stands on: nothing to replay.")


def fit(
    label: str,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Batches,
    *,
    mesh: Mesh,
    steps: int,
    directory: Path,
    fingerprint: str,
    **others: Any,
) -> TrainState:
    """In place of `jobs.fit.fit`: the final state of a training that is done; of one that failed, its failed step."""
    with closing(Checkpoints(directory / "checkpoints", fingerprint=fingerprint)) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(abstract, state))
    if restored is None or (restored[0] < steps and not failed_batch(directory, restored[0] + 1).exists()):
        raise InputError(
            f"{label} has no failed step to replay: {directory} is at step {restored[0] if restored else 0} of "
            f"{steps}. The same command with `train` goes on."
        )
    done, state, _ = restored
    if done >= steps:
        return state
    kept = read_arrays(failed_batch(directory, done + 1))
    like = next(batches)
    batch = shard(mesh, jax.tree.unflatten(jax.tree.structure(like), [kept[name] for name, _ in named(like)]))
    names = [name for name, _ in named(state.params)]
    say(f"{label}, step {done + 1} again:")
    try:
        _, metrics = step(state, batch)
    except InputError as error:
        say(f"First to go wrong: reward. {error}", style="bold")
        raise Replayed from error
    _tell(jax.device_get(metrics), names)
    raise Replayed


def _tell(metrics: dict[str, Any], parameters: Sequence[str]) -> None:
    values = {told: float(metrics[name]) for name, told in QUANTITIES.items() if name in metrics}
    gradients = dict(zip(parameters, metrics["gradient_norms"].tolist(), strict=True))
    values |= {f"gradient of {name}": norm for name, norm in gradients.items() if not math.isfinite(norm)}
    table("by order of computation", ["quantity", "mean or norm"], [[name, value] for name, value in values.items()])
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        say(f"First to go wrong: {wrong[0]}.", style="bold")
    else:
        say(
            "Every quantity is finite this time: what was wrong came from outside, such as a reward function, or from "
            "another program than this one. `train` goes on behind the step before."
        )
