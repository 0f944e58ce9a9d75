"""Strictness and devices for every test, set before jax is imported."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from jax.sharding import AxisType, Mesh

from ctrl_jax.runtime import platform

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the tests' time is compilation: what one process has compiled, the others and the next run read.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    platform.setup_compilation_cache(Path(__file__).parents[1] / ".cache" / "tests")
)


ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    help = f"fail where a test is skipped for a reason that is not in {ALLOWED_SKIPS.name}"
    parser.addoption("--forbid-skips", action="store_true", help=help)


def forbidden(reasons: list[str]) -> list[str]:
    """The reasons that no line of allowed_skips.txt matches."""
    lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    allowed = [re.compile(line) for line in lines if line and not line.startswith("#")]
    return [reason for reason in reasons if not any(pattern.search(reason) for pattern in allowed)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--forbid-skips") or reporter is None:  # the latter in a worker of xdist
        return
    # A report's longrepr is (file, line, reason).
    skips = [str(report.longrepr[-1]).removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])]
    if found := forbidden(skips):
        reporter.write_line("")
        for reason in dict.fromkeys(found):
            reporter.write_line(
                f"{found.count(reason)} tests skipped, which --forbid-skips forbids: {reason}", red=True
            )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:ctrl_jax")


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """Eight CPU devices on the axis `data`."""
    axes = ("data", "fsdp", "model")
    return jax.make_mesh((8, 1, 1), axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices("cpu")[:8])


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """For modules of which nearly all of the time is LLVM's optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def modules_of_a_test_end_with_it() -> Iterator[None]:
    """Reward functions of two tests may have one module's name. The checkout's own stay, wherever that is."""
    before, checkout = set(sys.modules), Path(__file__).parents[1]
    yield
    for name in set(sys.modules) - before:
        path = Path(str(getattr(sys.modules[name], "__file__", None)))
        if path.is_relative_to(tempfile.gettempdir()) and not path.is_relative_to(checkout):
            del sys.modules[name]


from tests.trained import pretrained, smoke  # noqa: E402, F401 (fixtures of all folders)
