"""The smoke experiment as a user runs it: in a process of its own, once for all tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Most of a smoke run is LLVM's optimisation; without it the same steps compile in half the time.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclass(frozen=True)
class CommandLine:
    """`python -m ctrl_jax` on one device, with its files in a folder of the tests."""

    runs_dir: Path
    cache_dir: Path

    def command(self, job: str, *options: str) -> list[str]:
        places = ["--runs-dir", str(self.runs_dir), "--cache-dir", str(self.cache_dir)]
        return [job, "smoke", *options, *places]

    def start(self, job: str, *options: str, before: str = "") -> subprocess.Popen[str]:
        """Starts a job, in a process that runs the Python statements `before` first."""
        program = (
            f"{before}\nimport sys\nfrom ctrl_jax.__main__ import main\nsys.exit(main({self.command(job, *options)}))"
        )
        environment = {**os.environ, "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, job: str, *options: str, before: str = "") -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        process = self.start(job, *options, before=before)
        printed, errors = process.communicate(timeout=600)
        return process.returncode, printed, errors


@dataclass(frozen=True)
class Smoke:
    """A finished `train smoke`."""

    command_line: CommandLine
    printed: str

    @property
    def work_dir(self) -> Path:
        return self.command_line.runs_dir / "smoke"

    @property
    def stages_dir(self) -> Path:
        return self.command_line.runs_dir / "stages"


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    folder = tmp_path_factory.mktemp("smoke")
    command_line = CommandLine(folder / "runs", folder / "cache")
    code, printed, errors = command_line.run("train")
    assert code == 0, errors
    return Smoke(command_line, printed)
