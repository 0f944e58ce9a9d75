"""The reference policy: a decoder fine-tuned on the demonstrations."""

from typing import NamedTuple

from ctrl_jax import build
from ctrl_jax.data.pipelines import batches
from ctrl_jax.jobs.fit import fit
from ctrl_jax.jobs.run import Run
from ctrl_jax.types import Params


class Trained(NamedTuple):
    """A network, and the name of the stage that holds it: the key of whatever depends on it."""

    params: Params
    stage: str


def run(run: Run) -> Trained:
    """Trains the reference policy, goes on training it, or reads it where it is done."""
    experiment = run.experiment
    config = experiment.sft
    stage = run.stage("sft", corpus=run.corpus.stage, model=experiment.model, sft=config, seed=experiment.seed)
    optimizer = build.supervised_optimizer(config)
    params = build.init_policy(run.models, run.mesh, build.stage_key(experiment.seed, "sft"))
    with stage.exclusive():
        state = fit(
            "reference policy (sft)",
            build.sft_step(run.models, run.mesh, optimizer),
            build.init_state(params, optimizer, run.mesh),
            batches(run.corpus.demonstrations, batch_size=config.batch_size, seed=experiment.seed),
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
            columns=("loss",),
        )
    return Trained(state.params, stage.directory.name)
