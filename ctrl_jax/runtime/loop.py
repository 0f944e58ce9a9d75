"""The loop of every training: a generator of its updates, and what is done with each of them.

    with open_training("policy", state, batches, ...) as training:
        for update in training.updates(step):  # the next one is under way when an update's metrics are read
            training.refuse_unsound(update)
            rows = training.report(update)
            training.save(update, score=lowest_loss(rows))
    return training.state

A checkpoint holds the state and the position in the data, and all randomness is a function of the step. So a training
that was killed goes on from its last checkpoint to the same final state, bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.compilations import compilations
from ctrl_jax.runtime.console import Bar, progress, say
from ctrl_jax.runtime.metrics import MetricWriter, Row
from ctrl_jax.runtime.stages import write_arrays
from ctrl_jax.types import Metric


class State(Protocol):
    """What a training changes, on the devices."""

    step: jax.Array
    params: Any

    def last_sound(self) -> "State":
        """As it was after the last step that was made."""


class Devices(Protocol):
    """Where a training runs."""

    def place(self, batch: Any) -> Any:
        """A batch, split over them."""

    def first_rows(self, params: Any) -> jax.Array:
        """The first row of every parameter, one after the other; a step's metrics have those behind it."""


class Batches(Protocol):
    """An endless iterator of host arrays whose position is JSON."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Update(NamedTuple):
    """An update that was dispatched, and all that is needed to take it again."""

    step: int
    """Its number, from 1."""
    position: dict[str, Any]
    """Of the data, before the batch."""
    batch: Any
    metrics: Mapping[str, jax.Array] = {}
    error: InputError | None = None
    """Why it was not made: a reward function failed on the host."""
    at_rest: bool = False
    """Whether the training's state is the one behind this update: no later one is dispatched yet."""


Step = Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]
"""(state, batch on the devices) to (state, metrics); it may donate the state, which is a `State`."""


def never(state: Any) -> bool:
    """Of a training that is finished when all its steps are made."""
    return False


@contextlib.contextmanager
def open_training(
    label: str,
    state: Any,
    batches: Batches,
    *,
    metrics: Sequence[Metric],
    devices: Devices,
    steps: int,
    checkpoint_every: int,
    directory: Path,
    fingerprint: str,
    rest_at: Collection[int] = (),
    finished: Callable[[Any], bool] = never,
    wandb: bool = False,
) -> Iterator["Training"]:
    """Opens a training: at its newest checkpoint, or at the start where there is none.

    Within, SIGTERM waits for an update to end.

    Args:
      label: names the training in the progress bar and in messages.
      state: where a first run starts.
      batches: moved to the checkpoint's position.
      metrics: the algorithm's, in the order in which a step computes them.
      devices: they hold the state, and a batch is split over them.
      steps: updates in all. Where they are all made, nothing is written.
      checkpoint_every: updates between checkpoints; the last is always kept.
      directory: holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      fingerprint: of all that the final state depends on; a checkpoint of another is refused.
      rest_at: further steps after which the state is at rest, and saved.
      finished: whether a state is the last, before all steps are made.
      wandb: whether metrics go to Weights & Biases too.

    Raises:
      InputError: if the newest checkpoint is another training's.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(directory / "checkpoints", fingerprint=fingerprint)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(jax.tree.map(abstract, state))
        start = 0
        if restored is not None:
            start, state, position = restored
            batches.set_state(position)
            steps = start if finished(state) else steps
        training = Training(
            label, state, batches, metrics, devices, start, steps, checkpoint_every, directory, checkpoints, rest_at
        )
        if start < steps:
            training.stop_asked = stack.enter_context(preemption.deferred())
            resume_step = None if restored is None else start
            training.writer = MetricWriter(directory, resume_step=resume_step, wandb=wandb)
            stack.callback(training.writer.close)
            training.bar = stack.enter_context(progress(label, steps, start=start))
            training.saved, training.reported = resume_step, time.monotonic()
            training.rows = np.asarray(devices.first_rows(state.params))
        yield training


@dataclass
class Training:
    """A training that `open_training` has opened."""

    label: str
    state: Any
    """The newest; where an update is under way, the one behind that."""
    batches: Batches
    metrics: Sequence[Metric]
    devices: Devices
    start: int
    """Updates that were made before."""
    steps: int
    checkpoint_every: int
    directory: Path
    checkpoints: Checkpoints
    rest_at: Collection[int] = ()
    writer: MetricWriter = field(init=False)
    bar: Bar = field(init=False)
    stop_asked: Callable[[], bool] = field(init=False)
    """Whether SIGTERM came; asked once an update, for several processes answer together."""
    stopping: bool = False
    saved: int | None = None
    """The step of the newest checkpoint."""
    score: float = -math.inf
    """Of the newest rows."""
    reported: float = 0.0
    """When the last update was, by the monotonic clock."""
    rows: np.ndarray = field(init=False)
    """The first row of every parameter behind the update reported last."""
    recompiled: set[str] = field(default_factory=set)
    """The programs that were warned of."""

    def updates(self, step: Step) -> Iterator[Update]:
        """Makes the updates that are missing, and yields each after the next one is dispatched.

        To read the metrics of the update just dispatched would leave the devices idle. Only before a checkpoint, and
        at the end, is an update yielded at once.

        Raises:
          Preempted, KeyboardInterrupt: if a reward function swallowed the signal; its update is not kept.
        """
        late = None
        for index in range(self.start + 1, self.steps + 1):
            update = Update(index, self.batches.get_state(), next(self.batches))
            batch = self.devices.place(update.batch)
            try:
                with compilations() as compiled:
                    self.state, metrics = step(self.state, batch)
            except InputError as error:  # of a function of the host; the state is as it was
                preemption.check()
                if late is not None:
                    yield late
                yield update._replace(error=error)
                return
            if index > self.start + 1:
                self._warn_of_recompilation(index, compiled)
            if late is not None:
                yield late
            late = update._replace(metrics=metrics)
            preemption.check()
            self.stopping = self.stop_asked()
            if index % self.checkpoint_every == 0 or index in (*self.rest_at, self.steps) or self.stopping:
                yield late._replace(at_rest=True)
                late = None

    def refuse_unsound(self, update: Update) -> None:
        """Ends the training at an update that was not made: its metrics are not finite, or a reward function failed.

        The state before it becomes the newest checkpoint, and its batch is kept beside the checkpoints: from these
        `replay` takes the step again.

        Raises:
          InputError: naming what was not finite, and the files.
        """
        reasons = [str(update.error)] if update.error else not_finite(update.metrics, self.metrics, self.state)
        if not reasons:
            return
        self._save(update.step - 1, update.position)
        path = failed_batch(self.directory, update.step)
        write_arrays(path, **dict(named(update.batch)))
        raise InputError(
            f"{self.label}: step {update.step} was not made: {' and '.join(reasons[:2])}. The state before it is the "
            f"newest checkpoint, and its batch is {path}; `replay` in place of `train`, with the same options, takes "
            "this step again and reports what went wrong first. Most often the learning rate is too large: try a "
            "smaller one."
        ) from update.error

    def report(self, update: Update) -> Sequence[Row]:
        """Writes a row of metrics and shows some. Returns the last rows, this one at their end."""
        values = {name: float(value) for name, value in update.metrics.items() if value.ndim == 0}
        if "first_rows" in update.metrics:
            before, self.rows = self.rows, np.asarray(update.metrics["first_rows"])
            values["largest_update"] = float(np.max(np.abs(self.rows - before)))
        values["seconds"], self.reported = time.monotonic() - self.reported, time.monotonic()
        self.writer.write(update.step, values)
        shown = [metric.name for metric in self.metrics if metric.shown and metric.name in values]
        self.bar.update(update.step, {name: values[name] for name in shown})
        return self.writer.recent

    def save(self, update: Update, *, score: float) -> None:
        """Saves a checkpoint where one is due; the one with the highest `score` is kept beside the newest.

        Raises:
          Preempted: on SIGTERM, after the step at hand was saved.
        """
        self.score = score
        if not update.at_rest:
            return
        self._save(update.step, self.batches.get_state())
        if self.stopping:
            raise preemption.Preempted(
                f"Stopped by SIGTERM. {self.label}: step {update.step} of {self.steps} is saved in {self.directory}."
            )

    def _save(self, step: int, position: dict[str, Any]) -> None:
        if self.saved != step:
            self.writer.sync()
            self.checkpoints.save(step, self.state.last_sound(), position, score=self.score)
            self.saved = step

    def _warn_of_recompilation(self, step: int, compiled: Mapping[str, float]) -> None:
        """Warns once a program. It is no error: the results are right, and some rewards must compile again (a
        classifier does for every length of its own tokens). A training of days should not end because of it."""
        for name in [name for name in compiled if name not in self.recompiled]:
            say(
                f"{self.label}: step {step} compiled `{name}` again ({compiled[name]:.1f} s): a shape, a type "
                "or a placement is not what it was in the step before. The results are right, but if it goes on so, "
                "the training is slow; JAX_EXPLAIN_CACHE_MISSES=1 shows what changed. Each program is reported once.",
                style="yellow",
            )
        self.recompiled.update(compiled)


def lowest_loss(rows: Sequence[Row]) -> float:
    """The score of a checkpoint by the loss alone: its mean over the last rows, negated."""
    return -sum(row["loss"] for row in rows) / len(rows)


def not_finite(values: Mapping[str, jax.Array], metrics: Sequence[Metric], state: Any) -> list[str]:
    """What is not finite in a step's metrics, in the order of its computation: `the loss is nan`.

    Of a gradient also the parameters that it goes wrong in.
    """
    wrong = [
        f"the {name.replace('_', ' ')} is {float(values[name])}"
        for name in (metric.name for metric in metrics if metric.guarded)
        if name in values and not math.isfinite(values[name])
    ]
    if "gradient_norms" in values and not math.isfinite(values["gradient_norm"]):
        names = [name for name, _ in named(state.params)]
        norms = values["gradient_norms"].tolist()
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


def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    """What a checkpoint is restored to: shape, type and placement of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
