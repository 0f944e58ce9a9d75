"""What every job is given: the experiment, where its files go, and the devices it runs on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ctrl_jax import build
from ctrl_jax.config import Experiment
from ctrl_jax.jobs import corpus
from ctrl_jax.runtime.platform import environment
from ctrl_jax.runtime.stages import Stage, claim, write_json


@dataclass(frozen=True)
class Run:
    experiment: Experiment
    work_dir: Path
    """What belongs to this experiment alone."""
    stages_dir: Path
    """What experiments share, by content."""
    mesh: Mesh

    def stage(self, name: str, **key: Any) -> Stage:
        return Stage.open(self.stages_dir, name, key)

    def claim(self) -> None:
        """Makes the work directory this experiment's, or refuses one that is another's."""
        claim(self.work_dir, self.experiment)
        write_json(self.work_dir / "environment.json", environment())

    @cached_property
    def corpus(self) -> corpus.Corpus:
        return corpus.prepare(self.experiment.data, self.stages_dir)

    @cached_property
    def models(self) -> build.Models:
        return build.models(self.experiment.model, self.corpus.tokenizer.vocabulary_size)
