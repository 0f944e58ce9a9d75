"""The reference policy: a model fine-tuned on the demonstrations, or a pretrained one as it is."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctrl_jax.algorithms.sft import Sft
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, partitioning, programs
from ctrl_jax.models import lora, networks
from ctrl_jax.models import pretrained as pretrained_model
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, watch
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.loop import lowest_loss
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.runtime.stages import Stage, fingerprint
from ctrl_jax.types import Params

LABEL = "reference policy (sft)"


class Trained(NamedTuple):
    """A network."""

    params: Params
    stage: str
    """Names what it is, by content: the key of whatever depends on it."""
    seconds: float = 0.0
    """What its training took."""


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
    demonstrations = data.demonstrations(run.corpus, experiment.data.demonstrations)
    with stage.exclusive():
        with run.open_training(
            LABEL,
            programs.init_state(parameters.adapt_decoder(run.models, run.mesh, key, start), optimizer, run.mesh),
            batches(demonstrations, batch_size=config.batch_size, seed=experiment.seed),
            metrics=Sft.metrics,
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
        ) as training:
            step = assembly.sft_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches)
            see_it_move = watch.moving(LABEL, "sft", config)
            for update in training.updates(lambda state, batch: step(state, frozen, batch)):
                training.refuse_unsound(update)
                rows = training.report(update)
                see_it_move(rows)
                training.save(update, score=lowest_loss(rows))
        trained = training.state.params
        summary = finish(stage, trained)
    # Merged, so that the reference is one copy of weights without an adapter, which the policy may then have.
    params = networks.merged(run.models, lora.overlay(frozen, trained))
    # What was trained in float32 is frozen from here on.
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    return Trained(params, f"{stage.directory.name}-{summary['params']}", summary["seconds"])


def finish(stage: Stage, params: Params) -> dict[str, Any]:
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


def pretrained(workspace: Workspace) -> Params:
    """The variables of the model at `model.path`, of which each device reads its part alone."""
    model = workspace.experiment.model
    assert model.path is not None, "Experiment.__post_init__ lets no model without a path go untrained"
    place = partial(partitioning.sharding, workspace.mesh)
    return pretrained_model.load(Path(model.path), model.adapter_path, dtype=model.dtype, place=place)
