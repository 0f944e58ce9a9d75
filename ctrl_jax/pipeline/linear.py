"""A linear reward as the stage that it is: the reference's features of all pairs, and a head that is fitted to them."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.data.pipelines import ExampleSet
from ctrl_jax.devices import parameters
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
    say(
        f"The reward is linear in the reference's features, fitted to {len(pairs.examples.prompts.ids)} pairs with a "
        f"penalty of {summary['strength']:.2g}. Pairs that it was not fitted on: {summary['loss']:.3f} nats a pair, "
        f"where guessing has {np.log(2):.3f}, accuracy {summary['accuracy']:.3f} [{low:.3f}, {high:.3f}].",
        style="yellow" if low <= 0.5 else None,
    )
    params = parameters.reward_of(run.models, run.mesh, reference.params, jnp.asarray(head["kernel"]))
    return Fitted(params, f"{stage.directory.name}-{summary['params']}", summary["seconds"], pairs)


def _make(run: Run, stage: Stage, reference: Params, pairs: PreferencePairs) -> None:
    """Writes the features of the pairs, or goes on where an earlier process was killed, and then the head."""
    config, count = run.experiment.reward_model, len(pairs.prompts.ids)
    file = RowFile(stage.directory / FEATURES, (count, 2, run.architecture.width), np.float32)
    features, before, started = assembly.reward_features(run.models, run.mesh), file.note or 0.0, time.monotonic()
    read = rollouts.batches(
        run, LABEL, lambda batch: features(reference, batch.prompts, batch.responses), pairs,
        together=config.batch_size, done=file.rows,
    )  # fmt: skip
    for rows in read:
        file.append(rows, before + time.monotonic() - started)
    file.finish()
    hosts.wait("features written")
    found = np.asarray(read_rows(stage.directory / FEATURES), np.float64)
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
    digest, seconds = checksums.of_arrays(kernel)[:16], before + time.monotonic() - started
    stage.finish({**chosen._asdict(), "params": digest, "seconds": seconds})
