"""The reference policy: a model fine-tuned on the demonstrations, or a pretrained one as it is."""

from functools import partial
from pathlib import Path

import jax

from ctrl_jax.algorithms.sft import Sft
from ctrl_jax.devices import parameters, partitioning
from ctrl_jax.models import lora, networks
from ctrl_jax.models import pretrained as pretrained_model
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, supervised
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Params

LABEL = "reference policy (sft)"


def run(run: Run) -> Trained:
    """Trains the reference policy, goes on training it, or reads it where it is done."""
    experiment = run.experiment
    config, model = experiment.sft, experiment.model
    parameters.check_they_divide(run.models, run.mesh)
    if config.steps == 0:
        weights_and_adapter = {"path": run.contents["model"]["weights"], "adapter": run.contents["adapter"]}
        return Trained(pretrained(run), f"model-{fingerprint({**weights_and_adapter, 'dtype': model.dtype})}")
    stage = run.stage("sft", corpus=data.key(run.corpus, "train"), vocabulary_size=run.architecture.vocabulary_size)
    optimizer = optimizers.supervised(config)
    key = randomness.stage_key(experiment.seed, "sft")
    start = pretrained(run) if model.path is not None else parameters.init_decoder(run.models, run.mesh, key)
    frozen = start if model.lora.rank else {}
    trained = supervised.train(
        run,
        stage,
        LABEL,
        "sft",
        batch_size=config.batch_size,
        start=parameters.adapt_decoder(run.models, run.mesh, key, start),
        frozen=frozen,
        optimizer=optimizer,
        step=assembly.sft_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches),
        examples=data.demonstrations(run.corpus, experiment.data.demonstrations),
        metrics=Sft.metrics,
    )
    # Merged, so that the reference is one copy of weights without an adapter, which the policy may then have.
    params = networks.merged(run.models, lora.overlay(frozen, trained.params))
    # What was trained in float32 is frozen from here on.
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    return trained._replace(params=params)


def pretrained(workspace: Workspace) -> Params:
    """The variables of the model at `model.path`, of which each device reads its part alone."""
    model = workspace.experiment.model
    assert model.path is not None, "Experiment.__post_init__ lets no model without a path go untrained"
    place = partial(partitioning.sharding, workspace.mesh)
    return pretrained_model.load(Path(model.path), model.adapter_path, dtype=model.dtype, place=place)
