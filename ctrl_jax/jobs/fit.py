"""The loop of every training job: step, report the step before, checkpoint, and go on where an earlier run stopped."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from rich.markup import escape

from ctrl_jax.build import TrainState
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.compilations import compilations
from ctrl_jax.runtime.console import progress, say
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

    A step that compiles again after the first is warned of, once a program, and is no error: its results are right, it
    is only slow, and some rewards must (a classifier compiles for every length of its own tokens). A run of days shall
    not end of it.

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
            told = set[str]()
            for index in range(start + 1, steps + 1):
                batch = shard(mesh, next(batches))
                with compilations() as compiled:
                    state, metrics = step(state, batch)
                if index > start + 1:
                    _tell_recompiled(label, index, {name: compiled[name] for name in compiled if name not in told})
                    told.update(compiled)
                # The step before this one: to read the one just dispatched would leave the device idle.
                if pending is not None:
                    report(*pending)
                pending = index, metrics
                if index % checkpoint_every == 0 or index == steps:
                    report(*pending)
                    pending = None
                    checkpoints.save(index, state, batches.get_state())
    return state


def _tell_recompiled(label: str, step: int, compiled: Mapping[str, float]) -> None:
    for name, seconds in compiled.items():
        say(
            f"[yellow]{escape(label)}: step {step} compiled `{escape(name)}` again ({seconds:.1f} s): a shape, a type "
            "or a placement is not what it was in the step before. The results are right, but if it goes on so, the "
            "training is slow; JAX_EXPLAIN_CACHE_MISSES=1 tells what changed. This is said once a program."
        )


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
