"""Experiments and model directories that tests plan for."""

import json

from ctrl_jax.config import Experiment
from tests.pipeline.pretrained import CONFIG

SMALL = Experiment(name="small")


def config_only(folder, **changes):
    """A model directory as it is before its weights are fetched."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)
