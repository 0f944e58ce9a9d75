"""A linear reward as the stage that it is: the reference's features of all pairs, and a head that is fitted to them."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.data.pipelines import ExampleSet
from ctrl_jax.devices import parameters
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly, data, rollouts
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import RowFile, Stage, read_arrays, read_rows, write_arrays
from ctrl_jax.steps import ensemble, linear_reward, preference
from ctrl_jax.types import Params, PreferencePairs

LABEL = "reward model's features"
FEATURES, HEAD = "features.npy", "head.npz"


class Fitted(NamedTuple):
    params: Params
    """Of the reward model, or of the ensemble."""
    stage: str
    """Names them, by content."""
    seconds: float
    pairs: ExampleSet


def fit(run: Run, reference: Trained) -> Fitted:
    """The linear reward of the training pairs: fitted, or read where it is done."""
    config = run.experiment.reward_model
    stage = run.stage("reward_model", corpus=data.key(run.corpus, "train"), reference=reference.stage)
    pairs = data.pairs(run.corpus, "train", count=config.steps * config.batch_size, long_prompts=config.long_prompts)
    with stage.exclusive():
        if not stage.complete:
            _make(run, stage, reference.params, pairs.examples)
    head, summary = read_arrays(stage.directory / HEAD), stage.summary
    low, high = preference.wilson(summary["accuracy"], len(pairs.examples.prompts.ids))
    count = len(pairs.examples.prompts.ids)
    say(
        f"The reward is linear in the reference's features, fitted to {count} pairs with a penalty of "
        f"{summary['strength']:.2g}: of several the best on pairs that it is not fitted on. These have "
        f"{summary['loss']:.3f} nats a pair, where guessing has {np.log(2):.3f}, and an accuracy of "
        f"{summary['accuracy']:.3f} [{low:.3f}, {high:.3f}].",
        style="yellow" if low <= 0.5 else None,
    )
    params = parameters.reward_of(run.models, run.mesh, reference.params, jnp.asarray(head["kernel"]))
    return Fitted(params, f"{stage.directory.name}-{summary['params']}", summary["seconds"], pairs)


def _make(run: Run, stage: Stage, reference: Params, pairs: PreferencePairs) -> None:
    """Writes the head, from the features of the pairs; goes on where an earlier process was killed."""
    config = run.experiment.reward_model
    seconds, started = _read(run, stage, reference, pairs), time.monotonic()
    found = np.asarray(read_rows(stage.directory / FEATURES), np.float64)
    if not np.isfinite(found).all():
        raise InputError(
            f"Some of the reference's features of the preference pairs are not finite, in {run.experiment.model.dtype}",
            field="model.dtype",
            value=run.experiment.model.dtype,
            remedy="Its weights are damaged, or too large for that type: try `model.dtype=float32`.",
        )
    spread = linear_reward.spread(found)
    differences = (found[:, 0] - found[:, 1]) / spread
    chosen = linear_reward.choose(differences, np.asarray(pairs.prompts.ids))
    drawn: list[np.ndarray | None] = [None]
    if config.members > 1:
        key = jax.random.key(run.experiment.seed)
        drawn = [*np.asarray(ensemble.bootstrap_weights(jnp.asarray(pairs.prompts.ids), key, config.members)).T]
    weights = [linear_reward.fit(differences, chosen.strength, counts) / spread for counts in drawn]
    kernel = np.stack(weights, axis=-1).astype(np.float32)
    write_arrays(stage.directory / HEAD, kernel=kernel)
    hosts.wait("head fitted")
    if hosts.first():
        (stage.directory / FEATURES).unlink()  # of many pairs it is large, and nothing reads it again
    digest, seconds = checksums.of_arrays(kernel)[:16], seconds + time.monotonic() - started
    stage.finish({**chosen._asdict(), "params": digest, "seconds": seconds})


def _read(run: Run, stage: Stage, reference: Params, pairs: PreferencePairs) -> float:
    """Writes the features of the pairs, or what is missing of them; returns the seconds that this took now."""
    path, count = stage.directory / FEATURES, len(pairs.prompts.ids)
    if hosts.agree(path.exists()):  # whole: it was killed in the fit
        return 0.0
    file = RowFile(path, (count, 2, run.architecture.width), np.float32)
    features, before, started = assembly.reward_features(run.models, run.mesh), file.note or 0.0, time.monotonic()
    read = rollouts.batches(
        run, LABEL, lambda batch: features(reference, batch.prompts, batch.responses), pairs,
        together=run.experiment.reward_model.batch_size, done=file.rows,
    )  # fmt: skip
    for rows in read:
        file.append(rows, before + time.monotonic() - started)
    seconds: float = file.note or 0.0
    file.finish()
    hosts.wait("features written")
    return seconds
