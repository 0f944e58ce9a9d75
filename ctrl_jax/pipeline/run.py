"""What every stage is given: the workspace, the data, and the networks' shapes."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.devices.mesh import batch_parts
from ctrl_jax.models import architecture, attention, networks
from ctrl_jax.pipeline import checks
from ctrl_jax.pipeline import data as data_stage
from ctrl_jax.pipeline.directories import pretrained_architecture
from ctrl_jax.pipeline.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Run(Workspace):
    """A workspace whose data is prepared. Plain data: nothing is computed behind an attribute."""

    corpus: Corpus
    models: networks.Networks
    fingerprints: dict[str, Any]
    """The workspace's: what changes on disk after the claim is not taken for what was claimed."""

    def __post_init__(self) -> None:
        """Checks nothing: the workspace has."""

    @property
    def architecture(self) -> architecture.Architecture:
        return self.models.architecture


def prepare(workspace: Workspace) -> Run:
    """The first stage: generates, downloads or reads the data, and checks that it has enough for the experiment.

    Of several processes all have to call it together.

    Raises:
      InputError: with every problem of the data, and the options that mend them.
    """
    experiment, mesh = workspace.experiment, workspace.mesh
    data, model = experiment.data, experiment.model
    tokenizer = sizes = None
    if model.path is not None:
        sizes = pretrained_architecture(experiment)
    if sizes is not None and workspace.given is None:
        tokenizer = pretrained_tokenizers.load(
            Path(str(model.path)), embedding_rows=sizes.vocabulary_size, format=data.format
        )
    corpus = workspace.given
    if corpus is None:
        stage = workspace.stage("data", tokenizer=tokenizer and tokenizer.fingerprint)
        corpus = data_stage.prepare(data, stage, tokenizer)
        checks.check(experiment, corpus, parts=batch_parts(mesh), at_hand=workspace.functions)
    models = networks_of(workspace, sizes or model.architecture(corpus.tokenizer.vocabulary_size))
    given = {field.name: getattr(workspace, field.name) for field in fields(Workspace)}
    return Run(**given, corpus=corpus, models=models, fingerprints=workspace.fingerprints)


def networks_of(workspace: Workspace, sizes: architecture.Architecture) -> networks.Networks:
    """The networks of these sizes, with the attention that runs on the workspace's devices."""
    model, reward = workspace.experiment.model, workspace.experiment.reward_model
    return networks.create(
        sizes, model.lora,
        members=reward.members, pooling="mean" if reward.linear else "last",
        rematerialize=model.rematerialize, fused_attention=attention.has_kernel(workspace.mesh),
    )  # fmt: skip
