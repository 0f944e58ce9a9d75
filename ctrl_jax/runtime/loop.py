"""The loop of every training job: step, report the step before, checkpoint, and go on where an earlier run stopped."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ctrl_jax import build
from ctrl_jax.build import TrainState
from ctrl_jax.devices.mesh import shard
from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts, preemption
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.compilations import compilations
from ctrl_jax.runtime.console import progress, say
from ctrl_jax.runtime.metrics import MetricWriter, Row
from ctrl_jax.runtime.stages import write_arrays


class Batches(Protocol):
    """An endless iterator whose position is JSON."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Taken(NamedTuple):
    """A step that was dispatched, and what is needed to take it again."""

    step: int
    position: dict[str, Any]
    """Of the data, before its batch."""
    batch: Any
    metrics: Mapping[str, jax.Array]


def lowest_loss(recent: Sequence[Row]) -> float:
    return -sum(row["loss"] for row in recent) / len(recent)


def no_watch(recent: Sequence[Row]) -> None:
    pass


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
    score: Callable[[Sequence[Row]], float] = lowest_loss,
    watch: Callable[[Sequence[Row]], None] = no_watch,
    wandb: bool = False,
) -> TrainState:
    """Takes `state` to `steps` updates, and returns it at once where that is done already.

    A checkpoint holds the state, the controller in it, and the position in the data; all randomness is a function of
    the step. So a run that was killed goes on from its last checkpoint to the same final parameters, bit for bit.

    A step that is not finite is not made (build.py). The state before it is saved, and its batch beside the
    checkpoints, from where `replay` takes the step again.

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
      score: of a checkpoint, by the metrics of the last steps before it; the one with the highest is kept.
      watch: sees the metrics of the last steps after each, and raises InputError where the training should end.
      wandb: whether metrics go to Weights & Biases too.

    Raises:
      InputError: if a step is not finite, or `watch` says so.
      Preempted: on SIGTERM, after the step at hand was saved.
    """
    with closing(Checkpoints(directory / "checkpoints", fingerprint=fingerprint)) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(abstract, state))
        start = 0
        if restored is not None:
            start, state, position = restored
            batches.set_state(position)
        if start >= steps:
            return state
        with (
            preemption.deferred() as preempted,
            closing(MetricWriter(directory, resume_step=start if restored else None, wandb=wandb)) as writer,
            progress(label, steps, start=start) as bar,
        ):
            last, saved = time.monotonic(), start if restored else None
            rows = np.asarray(build.first_rows(mesh, state.params))  # behind the step reported last

            def save(index: int, position: dict[str, Any]) -> None:
                nonlocal saved
                if saved != index:
                    worth = score(writer.recent) if writer.recent else -math.inf
                    writer.sync()
                    checkpoints.save(index, build.last_sound(state), position, score=worth)
                    saved = index

            def unsound(taken: Taken, what: str) -> InputError:
                save(taken.step - 1, taken.position)
                path = failed_batch(directory, taken.step)
                _write_batch(path, taken.batch)
                return InputError(
                    f"{label}: step {taken.step} was not made: {what}. The state before it is the newest checkpoint, "
                    f"and its batch is {path}; `replay` in place of `train`, with the same options, takes this step "
                    "again and tells what went wrong first. Most often the learning rate is too large: try a smaller "
                    "one."
                )

            def report(taken: Taken) -> None:
                nonlocal last, rows
                wrong = not_finite(taken.metrics, state)
                if wrong:
                    raise unsound(taken, " and ".join(wrong[:2]))
                values = {name: float(value) for name, value in taken.metrics.items() if value.ndim == 0}
                if "first_rows" in taken.metrics:
                    before, rows = rows, np.asarray(taken.metrics["first_rows"])
                    values["largest_update"] = float(np.max(np.abs(rows - before)))
                values["seconds"], last = time.monotonic() - last, time.monotonic()
                writer.write(taken.step, values)
                bar.update(taken.step, {name: values[name] for name in columns if name in values})
                watch(writer.recent)

            pending = None
            told = set[str]()
            for index in range(start + 1, steps + 1):
                position = batches.get_state()
                batch = shard(mesh, next(batches))
                try:
                    with compilations() as compiled:
                        state, metrics = step(state, batch)
                except InputError as error:  # of a reward that is a function of the host; the state is as it was
                    preemption.check()
                    if pending is not None:
                        report(pending)
                    raise unsound(Taken(index, position, batch, {}), str(error)) from error
                if index > start + 1:
                    _tell_recompiled(label, index, {name: compiled[name] for name in compiled if name not in told})
                    told.update(compiled)
                # The step before this one: to read the one just dispatched would leave the device idle.
                if pending is not None:
                    report(pending)
                pending = Taken(index, position, batch, metrics)
                preemption.check()  # Ctrl-C within a reward function that catches everything: its step is not kept
                stop = preempted()
                if index % checkpoint_every == 0 or index == steps or stop:
                    report(pending)
                    pending = None
                    save(index, batches.get_state())
                if stop:
                    raise preemption.Preempted(
                        f"Stopped by SIGTERM. {label}: step {index} of {steps} is saved in {directory}."
                    )
    return state


def not_finite(metrics: Mapping[str, jax.Array], state: TrainState) -> list[str]:
    """What is not finite in a step's metrics, in the order of its computation: `the loss is nan`.

    Of a gradient also the parameters that it goes wrong in.
    """
    wrong = [
        f"the {name.replace('_', ' ')} is {float(metrics[name])}"
        for name in build.GUARDED
        if name in metrics and not math.isfinite(metrics[name])
    ]
    if "gradient_norms" in metrics and not math.isfinite(metrics["gradient_norm"]):
        names = [name for name, _ in named(state.params)]
        norms = metrics["gradient_norms"].tolist()
        bad = [name for name, norm in zip(names, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            wrong[-1] += f" (in {len(bad)} of {len(names)} parameters, {bad[0]} the first)"
    return wrong


def named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, such as `params.layers_0.o_proj`."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator=".") or "all", leaf) for path, leaf in leaves]


def failed_batch(directory: Path, step: int) -> Path:
    """Where the batch of a step that was not made is kept."""
    return directory / "failed" / f"step-{step}.npz"


def _write_batch(path: Path, batch: Any) -> None:
    write_arrays(path, **dict(named(hosts.fetch(batch))))


def _tell_recompiled(label: str, step: int, compiled: Mapping[str, float]) -> None:
    for name, seconds in compiled.items():
        say(
            f"{label}: step {step} compiled `{name}` again ({seconds:.1f} s): a shape, a type "
            "or a placement is not what it was in the step before. The results are right, but if it goes on so, the "
            "training is slow; JAX_EXPLAIN_CACHE_MISSES=1 tells what changed. This is said once a program.",
            style="yellow",
        )


def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    """What a checkpoint is restored to: shape, type and placement of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
