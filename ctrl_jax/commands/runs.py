"""The runs in a folder, with their states and main numbers, read from their files alone."""

import dataclasses
import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ctrl_jax.commands import address
from ctrl_jax.config import Experiment, expand_user
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate, Evaluation
from ctrl_jax.runtime import console
from ctrl_jax.runtime.metrics import read_metrics

MARKS = ("config.json", "point.json", "metrics.jsonl", "evaluation.json")
"""A folder with one of these is a run, however damaged."""


@dataclass(frozen=True)
class Options:
    runs_dir: Path = Path("runs")
    """The folder with the runs, and with the folders of sweeps."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "runs_dir")


@dataclass(frozen=True)
class Row:
    run: str
    """Its address: `sample`, `evaluate`, `export` and `report` take it in place of an experiment's name."""
    state: str
    transform: str | None = None
    procedure: str | None = None
    kl: Estimate | None = None
    """Nats per response."""
    win_rate: Estimate | None = None
    """Under the procedure that the policy was trained for."""
    sampling_win_rate: Estimate | None = None


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m ctrl_jax runs", description=__doc__)
    if not options.runs_dir.is_dir():
        raise InputError(f"{options.runs_dir} is not a folder; name the one that holds the runs, --runs-dir.")
    found = rows(options.runs_dir)
    if options.json:
        print(json.dumps([_as_json(row) for row in found], indent=2))
        return 0
    shown = [
        [row.run, row.state, row.transform or "", row.procedure or "", *map(_shown, _numbers(row))] for row in found
    ]
    columns = ["run", "state", "Φ", "procedure", "KL, nats", "win rate, procedure", "win rate, sampling"]
    console.table(f"Runs in {options.runs_dir}, with 95 % intervals", columns, shown)
    return 0


def rows(runs_dir: Path) -> list[Row]:
    """A row for each run, by name, points of sweeps included. The state of a run that cannot be read says why."""
    folders = [folder for name in ("*", "*.sweep/*") for folder in runs_dir.glob(name) if folder != runs_dir / "stages"]
    return [_row(folder) for folder in sorted(folders) if any((folder / mark).exists() for mark in MARKS)]


def _row(folder: Path) -> Row:
    row = Row(str(folder), "")
    try:
        if not (folder / "config.json").exists():
            return dataclasses.replace(row, state=_reason(folder) or "without config.json")
        experiment = address.read_experiment(folder)
        policy = experiment.policy
        row = dataclasses.replace(row, transform=policy.transform, procedure=policy.procedure)
        if not (folder / "evaluation.json").exists():
            return dataclasses.replace(row, state=_progress(folder, experiment))
        tree = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        evaluation = Evaluation.from_json(tree, source="evaluation.json", remedy="evaluate the run again.")
        return dataclasses.replace(
            row,
            state="done",
            kl=evaluation.kl,
            win_rate=evaluation.win_rates.get(policy.procedure),
            sampling_win_rate=evaluation.win_rates.get("sampling"),
        )
    except Exception as error:  # one damaged folder should not hide the others
        return dataclasses.replace(row, state=f"damaged: {error or type(error).__name__}"[:300])


def _progress(folder: Path, experiment: Experiment) -> str:
    metrics = folder / "metrics.jsonl"
    steps = read_metrics(metrics)["step"].tolist()
    so_far = f"step {steps[-1] if steps else 0} of {experiment.policy.steps}"
    if _in_use(folder / "lock"):
        return f"running, {so_far}"
    if any((folder / "failed").glob("step-*.npz")):
        return f"failed, {so_far}"
    return _reason(folder) or so_far


def _reason(folder: Path) -> str | None:
    """Why a point of a sweep failed."""
    path = folder / "point.json"
    reason = json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else None
    return None if reason is None else f"failed: {reason}"[:300]


def _in_use(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without them
        pass
    return False


def _numbers(row: Row) -> tuple[Estimate | None, ...]:
    return row.kl, row.win_rate, row.sampling_win_rate


def _shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _as_json(row: Row) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name, value in ((field.name, getattr(row, field.name)) for field in dataclasses.fields(row))
    }
