"""A training on given examples, as the stage that it is: the reference policy's, the reward model's, a start's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import programs
from ctrl_jax.pipeline import watch
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.validation import Validation, starting, without_best
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.loop import lowest_loss, never
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.runtime.stages import Stage
from ctrl_jax.types import Metric, Params


class Trained(NamedTuple):
    """A network."""

    params: Params
    stage: str
    """Names what it is, by content: the key of whatever depends on it."""
    seconds: float = 0.0
    """What its training took."""


def train(
    run: Run,
    stage: Stage,
    label: str,
    section: str,
    *,
    batch_size: int,
    start: Params,
    frozen: Params,
    optimizer: optax.GradientTransformation,
    step: programs.Step,
    examples: Any,
    metrics: Sequence[Metric],
    validation: Validation | None = None,
) -> Trained:
    """Trains `start`, continues, or reads what is done.

    Args:
      run: has the data and the devices.
      stage: where checkpoints and metrics go.
      label: names the training in the progress bar and in messages.
      section: of the experiment, which has the options.
      batch_size: examples of an update.
      start: the parameters that are trained, as they start.
      frozen: those that are not.
      optimizer: of the updates.
      step: (state, frozen, examples) to (state, metrics).
      examples: of the data.
      metrics: the algorithm's.
      validation: chooses the parameters that are used, and may stop the training; without one, all steps are made, and
        the last parameters are used.

    Raises:
      InputError: if a step is not finite, or the parameters stop changing.
    """
    config = getattr(run.experiment, section)
    state, checkpoint_every, finished = programs.init_state(start, optimizer, run.mesh), config.checkpoint_every, never
    if validation is not None:
        state, step = starting(run.mesh, state), without_best(step)
        checkpoint_every, finished = validation.every, validation.stops
    with stage.exclusive():
        with run.open_training(
            label,
            state,
            batches(examples, batch_size=batch_size, seed=run.experiment.seed),
            metrics=[*metrics, *(validation.metrics if validation else ())],
            devices=programs.Devices(run.mesh),
            steps=config.steps,
            checkpoint_every=checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
            finished=finished,
        ) as training:
            see_it_move = watch.moving(label, section, config)
            for update in training.updates(lambda state, batch: step(state, frozen, batch)):
                training.refuse_unsound(update)
                if validation is not None and update.at_rest and validation.due(update.step):
                    training.state, measured = validation.validated(run.mesh, training.state, update.step)
                    update = update._replace(metrics={**update.metrics, **measured})
                rows = training.report(update)
                see_it_move(rows)
                training.save(update, score=lowest_loss(rows))
                if update.at_rest and finished(training.state):
                    break
        trained = training.state.params if validation is None else training.state.extra.params
        summary = _finish(stage, trained)
    return Trained(trained, f"{stage.directory.name}-{summary['params']}", summary["seconds"])


def _finish(stage: Stage, params: Params) -> dict[str, Any]:
    """Finishes the stage of a training that is at its end; returns a digest of what was trained, and its seconds."""
    if not stage.whole:  # new, or gone on from an earlier checkpoint because its last was damaged
        digest = checksums.of_arrays(params)[:16]
        stage.reopen()
        stage.finish({"params": digest, "seconds": training_seconds(stage.directory)})
        hosts.wait("training finished")
    return stage.summary


def training_seconds(directory: Path) -> float:
    """What the updates of a training took, by its metrics; 0 where they are lost."""
    path = directory / "metrics.jsonl"
    return float(read_metrics(path).get("seconds", np.zeros(1)).sum()) if path.exists() else 0.0
