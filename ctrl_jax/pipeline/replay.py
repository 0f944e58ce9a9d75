"""Takes the step again at which a training failed, from the state and the batch that the training kept (loop.py)."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import align
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.loop import Batches, Devices, Step, Update, abstract, failed_batch, named, never
from ctrl_jax.runtime.stages import read_arrays
from ctrl_jax.types import Metric


class Replayed(Exception):
    """Raised after the replayed step is reported, to stop the run."""


def run(run: Run) -> None:
    """Finds the experiment's first training that stopped at a step that is not finite, and takes this step again.

    Nothing is trained, and nothing is written.

    Raises:
      InputError: if there is no such step.
    """
    try:
        align.policy(dataclasses.replace(run, open_training=open_training))
    except Replayed:
        return
    raise InputError(f"No step of {run.work_dir} has failed, nor of the stages that it stands on: nothing to replay.")


@contextlib.contextmanager
def open_training(
    label: str,
    state: Any,
    batches: Batches,
    *,
    metrics: Sequence[Metric],
    devices: Devices,
    steps: int,
    directory: Path,
    fingerprint: str,
    finished: Callable[[Any], bool] = never,
    **others: Any,
) -> Iterator["FailedTraining"]:
    """In place of `loop.open_training`: opens a training that is done, or one that has failed.

    Raises:
      InputError: if the training is neither.
    """
    with contextlib.closing(Checkpoints(directory / "checkpoints", fingerprint=fingerprint)) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(abstract, state))
    if restored is not None and finished(restored[1]):
        steps = restored[0]
    if restored is None or (restored[0] < steps and not failed_batch(directory, restored[0] + 1).exists()):
        raise InputError(
            f"{label} has no failed step to replay: {directory} is at step {restored[0] if restored else 0} of "
            f"{steps}. The same command with `train` goes on."
        )
    done, state, _ = restored
    if done >= steps:
        yield FailedTraining(label, state, metrics, done, None)
        return
    kept = read_arrays(failed_batch(directory, done + 1))
    like = next(batches)
    batch = jax.tree.unflatten(jax.tree.structure(like), [kept[name] for name, _ in named(like)])
    yield FailedTraining(label, state, metrics, done, devices.place(batch))


@dataclasses.dataclass(frozen=True)
class FailedTraining:
    """A training whose next step is the one that failed."""

    label: str
    state: Any
    metrics: Sequence[Metric]
    done: int
    """Updates that were made."""
    batch: Any
    """Of the failed step, on the devices; None where the training is done."""

    def updates(self, step: Step) -> Sequence[Update]:
        """Takes the failed step again, and none behind it.

        Raises:
          Replayed: after the step was reported.
        """
        if self.batch is None:
            return ()
        names = [name for name, _ in named(self.state.params)]
        say(f"{self.label}, step {self.done + 1} again:")
        try:
            _, metrics = step(self.state, self.batch)
        except InputError as error:
            say(f"First to go wrong: reward. {error}", style="bold")
            raise Replayed from error
        _report(jax.device_get(metrics), self.metrics, names)
        raise Replayed


def _report(measured: dict[str, Any], metrics: Sequence[Metric], parameters: Sequence[str]) -> None:
    signs = [metric for metric in metrics if metric.quantity and metric.name in measured]
    values = {metric.quantity: float(measured[metric.name]) for metric in signs}
    gradients = dict(zip(parameters, measured["gradient_norms"].tolist(), strict=True))
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
