"""The reward: a reward model trained on preference pairs, or what the experiment names in its place."""

from pathlib import Path

from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.devices import parameters
from ctrl_jax.models import lora
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, supervised
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards import classifier, function, trained
from ctrl_jax.rewards.reward import Reward

LABEL = "reward model"


def run(run: Run, reference: Trained) -> tuple[Reward, float]:
    """The experiment's reward, and the seconds that its training took. A reward model is trained, trained on, or read.

    Raises:
      InputError: if the directory or function that was given cannot be used.
    """
    config = run.experiment.reward_model
    if config.path is not None:
        return classifier.reward(Path(config.path), run.corpus, run.mesh, dtype=run.experiment.model.dtype), 0.0
    if config.function is not None:
        return function.reward(run.reward_function or function.load(config.function), run.corpus), 0.0
    return _train(run, reference)


def _train(run: Run, reference: Trained) -> tuple[Reward, float]:
    experiment = run.experiment
    config = experiment.reward_model
    stage = run.stage("reward_model", corpus=data.key(run.corpus, "train"), reference=reference.stage)
    optimizer = optimizers.supervised(config)
    key = randomness.stage_key(experiment.seed, "reward_model")
    frozen, start = parameters.adapt_reward(run.models, run.mesh, key, reference.params)
    done = supervised.train(
        run,
        stage,
        LABEL,
        "reward_model",
        batch_size=config.batch_size,
        start=start,
        frozen=frozen,
        optimizer=optimizer,
        step=assembly.reward_model_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches),
        examples=data.pairs(run.corpus, "train"),
        metrics=BradleyTerry.metrics,
    )
    params = lora.overlay(frozen, done.params)
    return trained.reward(run.models, run.mesh, params, fingerprint=done.stage), done.seconds
