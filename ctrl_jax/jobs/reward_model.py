"""The reward model: the reference policy's trunk, trained on preference pairs by Bradley-Terry."""

from ctrl_jax import build
from ctrl_jax.data.pipelines import batches
from ctrl_jax.jobs.fit import fit
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.sft import Trained


def run(run: Run, reference: Trained) -> Trained:
    """Trains the reward model, goes on training it, or reads it where it is done."""
    experiment = run.experiment
    config = experiment.reward_model
    stage = run.stage("reward_model", reference=reference.stage, reward_model=config, seed=experiment.seed)
    optimizer = build.supervised_optimizer(config)
    key = build.stage_key(experiment.seed, "reward_model")
    params = build.init_reward(run.models, run.mesh, key, reference.params)
    with stage.exclusive():
        state = fit(
            "reward model",
            build.reward_model_step(run.models, run.mesh, optimizer),
            build.init_state(params, optimizer, run.mesh),
            batches(run.corpus.pairs("train"), batch_size=config.batch_size, seed=experiment.seed),
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
            columns=("loss", "accuracy"),
        )
    return Trained(state.params, stage.directory.name)
