from dataclasses import replace

import pytest

from ctrl_jax.config import Model, Policy, Supervised
from tests.pipeline.fakes import fakes as fakes_of_runs  # noqa: F401 (a fixture)
from tests.planning.models import SMALL, config_only


@pytest.fixture
def large(tmp_path):
    """A model of 1.2 billion parameters, trained whole, on whole batches."""
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    path = config_only(tmp_path / "large", vocab_size=128_000, num_key_value_heads=8, **sizes)
    return replace(SMALL, model=Model(path=path), sft=Supervised(steps=0), policy=Policy(micro_batches=1))
