"""One point of a sweep: an experiment, and where its results are."""

from pathlib import Path
from typing import NamedTuple

from ctrl_jax.config import Experiment


class Point(NamedTuple):
    experiment: Experiment
    work_dir: Path

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def page(self) -> Path:
        return self.work_dir / "report" / "index.html"

    @property
    def log(self) -> Path:
        return self.work_dir / "log.txt"
