"""Metrics of a run: JSON lines for programs, TensorBoard for the eye, wandb where it is asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from ctrl_jax.errors import InputError
from ctrl_jax.runtime.stages import fingerprint, plain, write_bytes


class MetricWriter:
    """Writes `metrics.jsonl`, one object a line such as {"step": 3, "kl": 0.21}, and `tensorboard/`."""

    def __init__(self, directory: Path, *, resume_step: int | None, wandb: bool = False):
        """
        Args:
          directory: of the run; made if missing.
          resume_step: the checkpoint's step. Rows after it are of steps that will be taken again, and are dropped, as
            is a last line that a kill tore. None starts anew.
          wandb: also log to Weights & Biases, under the directory's name.

        Raises:
          InputError: if wandb is asked for and not installed.
        """
        path = Path(directory) / "metrics.jsonl"
        kept = [row for row in _rows(path) if resume_step is not None and row["step"] <= resume_step]
        write_bytes(path, "".join(_line(row) for row in kept).encode())
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(
            str(path.with_name("tensorboard")),
            purge_step=0 if resume_step is None else resume_step + 1,
            flush_secs=10,
        )
        self._wandb = _start_wandb(Path(directory).absolute()) if wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one row and flushes it."""
        values = {name: float(value) for name, value in values.items()}
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a `metrics.jsonl`, `step` among them, all as long as it has rows; nan where a row lacks a name."""
    rows = _rows(Path(path))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([float(row.get(name, "nan")) for row in rows]) for name in names}
    return columns | {"step": np.array([row["step"] for row in rows], dtype=int)}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are whole."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(plain(row)) + "\n"


def _start_wandb(directory: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("wandb was asked for and is not installed. Install it: make setup EXTRA=wandb") from error
    identity = f"{directory.name}-{fingerprint(str(directory))}"
    return wandb.init(project="ctrl_jax", name=directory.name, id=identity, resume="allow", dir=str(directory))
