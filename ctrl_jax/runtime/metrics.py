"""Metrics of a run: JSON lines for programs, TensorBoard for the eye, wandb where it is asked for."""

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.stages import fingerprint, naming, plain, write_bytes

FLUSH_SECONDS = 10
"""Between what TensorBoard sees."""

RECENT = 5
"""Rows that are remembered: what is judged by them does not hang on a single step."""

Row = dict[str, float]
"""A step's metrics, and `step`."""


class MetricWriter:
    """Writes `metrics.jsonl`, one object a line such as {"step": 3, "kl": 0.21}, and `tensorboard/`.

    Both at once and in this thread, so that a full disk is an error here. (SummaryWriter of tensorboardX has a thread:
    a full disk ends it, and then its queue fills up and the training waits for ever.)
    """

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
        self._path = path = Path(directory) / "metrics.jsonl"
        kept = [row for row in _rows(path) if resume_step is not None and row["step"] <= resume_step]
        write_bytes(path, "".join(_line(row) for row in kept).encode())
        self.recent: deque[Row] = deque(kept, maxlen=RECENT)
        """The last rows, those from before a resume too."""
        self._writes = hosts.first()
        if not self._writes:
            return
        # Without a buffer, whose rest a full disk would refuse again at the end.
        self._file = path.open("ab", buffering=0)
        events = path.with_name("tensorboard")
        events.mkdir(exist_ok=True)
        # The second of its start names the file; after a clock jumped back, it must not write over an older one.
        self._tensorboard = EventsWriter(str(events / "events"), filename_suffix=f".{os.getpid()}")
        self._next_flush = time.monotonic()
        # Points of an earlier run from this step on are hidden.
        start = SessionLog(status=SessionLog.START)
        self._event(Event(step=0 if resume_step is None else resume_step + 1, session_log=start))
        self._wandb = _start_wandb(Path(directory).absolute()) if wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one row at once."""
        values = {name: float(value) for name, value in values.items()}
        self.recent.append({"step": step, **values})
        if not self._writes:
            return
        with naming(self._path):
            line = _line({"step": step, **values}).encode()
            written = self._file.write(line)
            if written < len(line):  # the last bytes of a disk: writing the rest raises the reason
                self._file.write(line[written:])
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(Event(step=step, summary=Summary(value=points)))
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Puts the rows on disk before a checkpoint that counts on them: a power cut must not take the rows alone."""
        if self._writes:
            with naming(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        with naming(self._path.with_name("tensorboard")):
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()  # for the eye: nothing here is computed from it
        with naming(self._path.with_name("tensorboard")):
            self._tensorboard.write_event(event)
            if time.monotonic() >= self._next_flush:
                self._tensorboard.flush()
                self._next_flush = time.monotonic() + FLUSH_SECONDS


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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
