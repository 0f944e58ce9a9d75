from pathlib import Path

import pytest

import ctrl_jax as cj
from tests.pipeline.pretrained import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, whose tokens are bytes."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny-llama", num_hidden_layers=1)


@pytest.fixture(scope="session")
def model(folder: Path) -> cj.Model:
    return cj.load_model(folder, devices=1)
