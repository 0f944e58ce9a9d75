"""The reward: a reward model trained on preference pairs, or what the experiment names in its place."""

from pathlib import Path

from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, programs
from ctrl_jax.models import lora
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, watch
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.sft import Trained, finish
from ctrl_jax.rewards import classifier, function, trained
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.loop import lowest_loss

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
    with stage.exclusive():
        with run.open_training(
            LABEL,
            programs.init_state(start, optimizer, run.mesh),
            batches(data.pairs(run.corpus, "train"), batch_size=config.batch_size, seed=experiment.seed),
            metrics=BradleyTerry.metrics,
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
        ) as training:
            step = assembly.reward_model_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches)
            see_it_move = watch.moving(LABEL, "reward_model", config)
            for update in training.updates(lambda state, batch: step(state, frozen, batch)):
                training.refuse_unsound(update)
                rows = training.report(update)
                see_it_move(rows)
                training.save(update, score=lowest_loss(rows))
        summary = finish(stage, training.state.params)
    params = lora.overlay(frozen, training.state.params)
    name = f"{stage.directory.name}-{summary['params']}"
    return trained.reward(run.models, run.mesh, params, fingerprint=name), summary["seconds"]
