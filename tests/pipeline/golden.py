"""What every stage of `train smoke` gives, as a few numbers, kept in golden.json beside the stage's version.

A stage whose numbers change needs another version in pipeline/stages.py: else a run takes what older code left on disk
for its own. After the version is raised, `.venv/bin/python -m tests.pipeline.golden` writes golden.json anew.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from ctrl_jax.pipeline.stages import TABLE, VERSIONS
from ctrl_jax.runtime import checksums
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.runtime.stages import read_arrays, read_json
from tests.trained import CommandLine

FILE = Path(__file__).with_name("golden.json")
# Rounding differs between platforms, and grows over the steps of a training; a response may then end otherwise.
TOLERANCE = {
    "data": 0.0, "sft": 1e-3, "reward_model": 3e-3, "calibration": 2e-2, "reference_evaluation": 2e-2, "policy": 3e-2,
    "evaluation": 5e-2,
}  # fmt: skip
"""By stage, how far a number may be from the golden one, as a share of the largest of its row."""

Numbers = dict[str, list[float]]


def moments(*arrays: Any) -> list[float]:
    """Mean and root mean square of each array."""
    wide = [np.asarray(array, np.float64) for array in arrays]
    return [float(number) for array in wide for number in (array.mean(), np.sqrt((array**2).mean()))]


def trained(directory: Path) -> Numbers:
    """Of a training: its final parameters by leaf, and its metrics over all steps."""
    newest = max(
        (path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
    state = ocp.StandardCheckpointer().restore((newest / "state").absolute())
    metrics = read_metrics(directory / "metrics.jsonl")
    names = sorted(set(metrics) - {"step", "seconds", "largest_update", "sampler_scorer_gap"})
    of_leaves = {name: moments(state[name]) for name in sorted(state) if name.startswith("params.")}
    return {**of_leaves, **{f"metric {name}": moments(metrics[name]) for name in names}}


def outputs(work_dir: Path, stages_dir: Path) -> dict[str, Numbers]:
    """By stage, what a finished `train smoke` has of it."""

    def folder(name: str) -> Path:
        (found,) = stages_dir.glob(f"{name}-*")
        return found

    sizes = checksums.about(folder("data") / "done.json")["summary"]
    table = folder("calibration")
    reference = read_arrays(folder("reference_evaluation") / "responses.npz")
    evaluation = read_json(work_dir / "evaluation.json")
    means = {name: [rate["mean"] for rate in evaluation[name].values()] for name in ("win_rates", "gold_win_rates")}
    return {
        "data": {
            "records": [float(sizes[split]) for split in ("train", "validation", "test")],
            "prompts": read_arrays(table / "ids.npz")["ids"].astype(float).tolist(),
        },
        "sft": trained(folder("sft")),
        "reward_model": trained(folder("reward_model")),
        "calibration": {"rewards": moments(np.load(table / "rewards.npy"))},
        "reference_evaluation": {name: moments(array) for name, array in sorted(reference.items())},
        "policy": trained(work_dir),
        "evaluation": {
            **means,
            "kl": [evaluation["kl"]["mean"]],
            "accuracy": [evaluation["reward_model"]["accuracy"]],
            "lengths": [evaluation["response_length"][side]["mean"] for side in ("policy", "reference")],
        },
    }


def differing(stage: str, found: Numbers, golden: Numbers) -> list[str]:
    """The rows of a stage that are not the golden ones."""

    def same(name: str) -> bool:
        here, there = (np.array(numbers.get(name, [])) for numbers in (found, golden))
        most = TOLERANCE[stage] * np.abs(there).max(initial=0.0)
        return here.shape == there.shape and bool(np.all(np.abs(here - there) <= most))

    return [name for name in {**golden, **found} if not same(name)]


def forgotten(changed: set[str], versions: dict[str, int], golden_versions: dict[str, int]) -> list[str]:
    """The stages whose results changed though none before them did, and whose version did not."""
    return [
        stage.name
        for stage in TABLE
        if stage.name in changed
        and not changed & set(stage.needs.values())
        and versions[stage.name] == golden_versions[stage.name]
    ]


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command_line = CommandLine(Path(folder) / "runs", Path(folder) / "cache")
        code, _, errors = command_line.run("train")
        assert code == 0, errors
        found = outputs(command_line.runs_dir / "smoke", command_line.runs_dir / "stages")
    rounded = {
        stage: {
            name: [float(f"{number:.6g}") if stage != "data" else number for number in row]
            for name, row in rows.items()
        }
        for stage, rows in found.items()
    }
    tree = {stage: {"version": VERSIONS[stage], **rows} for stage, rows in rounded.items()}
    lines = [
        f'  "{stage}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        + "\n  }"
        for stage, rows in tree.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
