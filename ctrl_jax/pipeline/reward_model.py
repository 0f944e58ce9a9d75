"""The reward: a reward model trained on preference pairs, or what the experiment names in its place."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.data.pipelines import ExampleSet
from ctrl_jax.devices import parameters
from ctrl_jax.devices.mesh import shard
from ctrl_jax.devices.programs import Step
from ctrl_jax.evaluation import VALIDATION_ARRAYS, RewardTraining
from ctrl_jax.models import lora
from ctrl_jax.pipeline import assembly, combine, data, linear, optimizers, randomness, supervised
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.pipeline.validation import LOSS, Validation
from ctrl_jax.rewards import classifier, function, trained
from ctrl_jax.rewards.reward import Reward, scorer
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.runtime.stages import Stage
from ctrl_jax.steps import preference
from ctrl_jax.types import Metric, Params

LABEL = "reward model"
ACCURACY = "validation_accuracy"
_VALIDATED = (Metric(LOSS, "nats per pair", shown=True), Metric(ACCURACY, "share of pairs", shown=True))


class Rewarded(NamedTuple):
    reward: Reward
    """The one that is trained on: the reward model's, with all others that it is combined with."""
    alone: Reward
    """The reward model's own."""
    seconds: float = 0.0
    """What its training took."""
    training: RewardTraining | None = None
    """None where it was not trained here."""
    combine_seconds: float | None = None
    """What it took to draw what a combination compares with."""
    constraints: combine.Constraints | None = None
    """The rewards beside it that are held at floors."""
    curve: dict[str, np.ndarray] = {}  # noqa: RUF012 (nobody writes to it)
    """VALIDATION_ARRAYS, where the training was validated."""
    params: Params | None = None
    """The variables of a network that was trained here."""


def run(run: Run, reference: Trained) -> Rewarded:
    """The experiment's reward: the reward model's, which is trained, trained on, or read, combined with any others.

    Raises:
      InputError: if a directory or function that was given cannot be used.
    """
    rewarded = alone(run, reference)
    found = combine.run(run, reference, rewarded.reward)
    return rewarded._replace(reward=found.reward, combine_seconds=found.seconds, constraints=found.constraints)


def functions(run: Run) -> list[Reward]:
    """Those of its rewards that are Python functions, which take nothing that was trained.

    Raises:
      InputError: if one cannot be used.
    """
    return [
        function.reward(function.found(name, run.functions, field=field), run.corpus)
        for name, field in run.experiment.functions.items()
    ]


def alone(run: Run, reference: Trained) -> Rewarded:
    """The reward model's reward, without any other. Errors: as `run`."""
    config = run.experiment.reward_model
    if config.path is not None:
        dtype = run.experiment.model.dtype
        return _given(classifier.reward(Path(config.path), run.corpus, run.mesh, dtype=dtype))
    if config.function is not None:
        return _given(function.reward(function.found(config.function, run.functions), run.corpus))
    return _fit(run, reference) if config.linear else _train(run, reference)


def _given(reward: Reward) -> Rewarded:
    return Rewarded(reward, reward)


def _train(run: Run, reference: Trained) -> Rewarded:
    experiment = run.experiment
    config = experiment.reward_model
    splits = ("train", "validation") if config.validation.every else ("train",)
    stage = run.stage("reward_model", corpus=data.key(run.corpus, *splits), reference=reference.stage)
    optimizer = optimizers.supervised(config)
    key = randomness.stage_key(experiment.seed, "reward_model")
    frozen, start = parameters.adapt_reward(run.models, run.mesh, key, reference.params)
    pairs = data.pairs(run.corpus, "train", long_prompts=config.long_prompts)
    validation = _validation(run, frozen) if config.validation.every else None
    done = supervised.train(
        run,
        stage,
        LABEL,
        "reward_model",
        batch_size=config.batch_size,
        start=start,
        frozen=frozen,
        optimizer=optimizer,
        step=_step(run, optimizer),
        examples=pairs.examples,
        metrics=BradleyTerry.metrics,
        validation=validation,
    )
    params = lora.overlay(frozen, done.params)
    reward = trained.reward(run.models, run.mesh, params, fingerprint=done.stage, members=_members(run))
    return _described(reward, done, pairs, stage, validation)._replace(params=params)


def _fit(run: Run, reference: Trained) -> Rewarded:
    fitted = linear.fit(run, reference)
    reward = trained.reward(run.models, run.mesh, fitted.params, fingerprint=fitted.stage, members=_members(run))
    return Rewarded(reward, reward, fitted.seconds, _counts(fitted.pairs))


def _step(run: Run, optimizer: optax.GradientTransformation) -> Step:
    config = run.experiment.reward_model
    if config.members == 1:
        return assembly.reward_model_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches)
    return assembly.reward_ensemble_step(
        run.models, run.mesh, optimizer, seed=run.experiment.seed, micro_batches=config.micro_batches
    )


def _members(run: Run) -> str | None:
    """What makes one reward of the members'; None where there is one."""
    return run.experiment.combine.ensemble if run.experiment.reward_model.members > 1 else None


def _validation(run: Run, frozen: Params) -> Validation:
    """How the training is validated on pairs of the validation split.

    Raises:
      InputError: if there are none.
    """
    config = run.experiment.reward_model
    options = config.validation
    pairs = data.pairs(run.corpus, "validation", count=options.pairs, long_prompts=config.long_prompts).examples
    score, several, count = scorer(run.models, run.mesh), config.members > 1, len(pairs.prompts.ids)
    # Of one size, so that it compiles once; the last is filled up from the first pairs.
    batches = [np.arange(start, start + config.batch_size) % count for start in range(0, count, config.batch_size)]

    def measure(params: Params) -> dict[str, float]:
        whole, found = lora.overlay(frozen, params), []
        for index in batches:
            batch = shard(run.mesh, jax.tree.map(lambda x, index=index: np.asarray(x)[index], pairs))
            found.append(np.asarray(hosts.fetch(score(whole, batch.prompts, batch.responses))))
        rewards = np.concatenate(found)[:count]
        return _quality(rewards.mean(axis=-1) if several else rewards)

    return Validation(options.every, options.patience, config.steps, count, measure, _VALIDATED)


def _quality(rewards: np.ndarray) -> dict[str, float]:
    """The validation metrics of raw rewards [n, 2], the chosen response's first."""
    chosen, rejected = jnp.asarray(rewards[:, 0]), jnp.asarray(rewards[:, 1])
    loss, accuracy = preference.bradley_terry(chosen, rejected), preference.accuracy(chosen, rejected)
    return {LOSS: float(loss.value), ACCURACY: float(accuracy.value)}


def _described(
    reward: Reward, done: Trained, pairs: ExampleSet, stage: Stage, validation: Validation | None
) -> Rewarded:
    """The reward with how its training went; says which step's reward model is used, where several were compared."""
    metrics = read_metrics(stage.directory / "metrics.jsonl")
    if validation is None or LOSS not in metrics:
        return Rewarded(reward, reward, done.seconds, _counts(pairs))
    rows = np.flatnonzero(np.isfinite(metrics[LOSS]))
    best = rows[np.argmin(metrics[LOSS][rows])]
    steps, used = (int(metrics["step"][row]) for row in (-1, best))
    _say_which(metrics[LOSS][best], metrics[ACCURACY][best], used, steps, validation)
    since = np.concatenate([[0], rows[:-1] + 1])
    means = np.array([metrics["loss"][start : end + 1].mean() for start, end in zip(since, rows, strict=True)])
    columns = (metrics["step"][rows], means, metrics[LOSS][rows], metrics[ACCURACY][rows])
    training = _counts(pairs)._replace(steps=steps, used_step=used, validation_pairs=validation.size)
    return Rewarded(reward, reward, done.seconds, training, curve=dict(zip(VALIDATION_ARRAYS, columns, strict=True)))


def _counts(pairs: ExampleSet) -> RewardTraining:
    return RewardTraining(len(pairs.examples.prompts.ids), pairs.cut, pairs.dropped)


def _say_which(loss: float, accuracy: float, used: int, steps: int, validation: Validation) -> None:
    low, high = preference.wilson(accuracy, validation.size)
    ended = f"ended at step {steps} of {validation.steps}" if steps < validation.steps else f"made all {steps} steps"
    say(
        f"The training of the {LABEL} {ended}; that of step {used} is used, the best on {validation.size} validation "
        f"pairs: {loss:.3f} nats a pair, where guessing has {math.log(2):.3f}, accuracy {accuracy:.3f} "
        f"[{low:.3f}, {high:.3f}]{', no better than chance' if low <= 0.5 else ''}.",
        style="yellow" if low <= 0.5 else None,
    )
