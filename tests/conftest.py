"""Strictness and devices for every test, set before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from jax.sharding import AxisType, Mesh

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:ctrl_jax")


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """Eight CPU devices on the axis `data`."""
    axes = ("data", "fsdp", "model")
    return jax.make_mesh((8, 1, 1), axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices("cpu")[:8])


from tests.trained import pretrained, smoke  # noqa: E402, F401 (fixtures of all folders)
