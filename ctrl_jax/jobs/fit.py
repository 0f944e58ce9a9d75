"""The loop of every training job: step, report the step before, checkpoint, and go on where an earlier run stopped."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from ctrl_jax.build import TrainState
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.console import progress
from ctrl_jax.runtime.mesh import shard
from ctrl_jax.runtime.metrics import MetricWriter


class Batches(Protocol):
    """An endless iterator whose position is JSON."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def fit(
    label: str,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Batches,
    *,
    mesh: Mesh,
    steps: int,
    checkpoint_every: int,
    directory: Path,
    fingerprint: str,
    columns: Sequence[str],
    wandb: bool = False,
) -> TrainState:
    """Takes `state` to `steps` updates, and returns it at once where that is done already.

    A checkpoint holds the state, the controller in it, and the position in the data; all randomness is a function of
    the step. So a run that was killed goes on from its last checkpoint to the same final parameters, bit for bit.

    Args:
      label: shown beside the progress bar.
      step: one update; it may donate its state.
      state: where a first run starts.
      batches: what `step` is fed, split over the mesh.
      mesh: the devices.
      steps: updates to make in all.
      checkpoint_every: updates between checkpoints; the last is always kept.
      directory: holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      fingerprint: of all that the final state depends on; a checkpoint of another is refused.
      columns: metrics to show while it runs.
      wandb: whether metrics go to Weights & Biases too.

    Raises:
      InputError: if the loss or its gradient is no longer finite; the last good checkpoint stays.
    """
    with closing(Checkpoints(directory / "checkpoints", fingerprint=fingerprint)) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(_abstract, state))
        start = 0
        if restored is not None:
            start, state, position = restored
            batches.set_state(position)
        if start >= steps:
            return state
        with (
            closing(MetricWriter(directory, resume_step=start if restored else None, wandb=wandb)) as writer,
            progress(label, steps, start=start) as bar,
        ):
            last = time.monotonic()

            def report(index: int, metrics: dict[str, jax.Array]) -> None:
                nonlocal last
                values = {name: float(value) for name, value in metrics.items()}
                if not math.isfinite(values["loss"] + values["gradient_norm"]):
                    raise InputError(
                        f"{label} diverged at step {index}: the loss is {values['loss']} and the gradient's norm "
                        f"{values['gradient_norm']}. Nothing of this step was saved; {directory} holds what "
                        "was before. Try again with a smaller learning rate."
                    )
                values["seconds"], last = time.monotonic() - last, time.monotonic()
                writer.write(index, values)
                bar.update(index, {name: values[name] for name in columns if name in values})

            pending = None
            for index in range(start + 1, steps + 1):
                state, metrics = step(state, shard(mesh, next(batches)))
                # The step before this one: to read the one just dispatched would leave the device idle.
                if pending is not None:
                    report(*pending)
                pending = index, metrics
                if index % checkpoint_every == 0 or index == steps:
                    report(*pending)
                    pending = None
                    checkpoints.save(index, state, batches.get_state())
    return state


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
