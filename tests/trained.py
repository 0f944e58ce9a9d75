"""Experiments as a user runs them, in a process of their own, once for all tests: fixtures that conftest.py names."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.pretrained import write_model

ROOT = Path(__file__).parents[1]
# Most of a smoke run is LLVM's optimisation; without it the same steps compile in half the time.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclass(frozen=True)
class CommandLine:
    """`python -m ctrl_jax` on one device, with its files in a folder of the tests."""

    runs_dir: Path
    cache_dir: Path
    experiment: str = "smoke"

    def command(self, job: str, *options: str) -> list[str]:
        places = ["--runs-dir", str(self.runs_dir), "--cache-dir", str(self.cache_dir)]
        return [job, self.experiment, *options, *places]

    def start(self, job: str, *options: str, before: str = "") -> subprocess.Popen[str]:
        """Starts a job, in a process that runs the Python statements `before` first."""
        program = (
            f"{before}\nimport sys\nfrom ctrl_jax.__main__ import main\nsys.exit(main({self.command(job, *options)}))"
        )
        # jax has lowered the last of these for this process and its children.
        logs = {"COLUMNS": "200", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment = {**os.environ, "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu", **logs}
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


@dataclass(frozen=True)
class Pretrained:
    """A finished `train` of a Hugging Face directory on JSON lines, with an adapter."""

    command_line: CommandLine
    base: Path
    printed: str

    @property
    def work_dir(self) -> Path:
        return self.command_line.runs_dir / "pretrained"

    @property
    def stages_dir(self) -> Path:
        return self.command_line.runs_dir / "stages"


EXPERIMENT = """
from ctrl_jax.config import (
    Calibration, Data, Evaluation, Experiment, Lora, Model, Policy, RewardModel, Supervised
)


def experiment():
    return Experiment(
        name="pretrained",
        data=Data(source="jsonl", path={data!r}, prompt_length=80, response_length=8),
        model=Model(path={base!r}, lora=Lora(rank=2, targets=("q_proj", "down_proj"))),
        sft=Supervised(steps=0),
        reward_model=RewardModel(steps=6, batch_size=16, learning_rate=1e-2, warmup_steps=1),
        calibration=Calibration(prompts=8, samples_per_prompt=8),
        policy=Policy(
            procedure="best_of_2", steps=3, prompts_per_step=8, samples_per_prompt=4, learning_rate=1e-2,
            warmup_steps=1,
        ),
        evaluation=Evaluation(
            prompts=8, responses_per_prompt=8, procedures=("sampling", "best_of_2"), bootstrap_resamples=100
        ),
    )
"""


def write_preferences(folder: Path) -> None:
    """Prompts of which none is in two splits; a sum is better than a shrug."""
    folder.mkdir()
    start = 0
    for split, count in (("train", 60), ("validation", 10), ("test", 20)):
        rows = [
            {
                "prompt": f"What is {i} + {2 * i + 1}?",
                "chosen": f"{3 * i + 1}.",
                "rejected": ["Hm.", "Who knows?"][i % 2],
            }
            for i in range(start, start + count)
        ]
        start += count
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = tmp_path_factory.mktemp("pretrained")
    base = write_model(folder / "tiny-llama", num_hidden_layers=1)  # compiling a second takes long
    write_preferences(folder / "sums")
    file = folder / "sums.py"
    file.write_text(EXPERIMENT.format(data=str(folder / "sums"), base=str(base)))
    command_line = CommandLine(folder / "runs", folder / "cache", str(file))
    code, printed, errors = command_line.run("train")
    assert code == 0, errors
    return Pretrained(command_line, base, printed)
