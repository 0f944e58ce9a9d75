"""What is kept on disk between jobs: stages keyed by what they depend on, the claim on a work directory, atomic files.

Every file is written beside its place, synced, and moved there: a kill at any moment leaves the old one or the new. Of
several processes of a job (hosts.py) the first alone writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import socket
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say


def plain(value: Any) -> Any:
    """`value` as JSON would hold it: dataclasses become dicts, tuples lists, numbers that are not finite their names.

    Raises:
      TypeError: on anything but nested dataclasses, dicts with string keys, tuples, lists, numbers, strings and None.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)  # JSON has no nan, and no inf
        case np.generic():
            return plain(value.item())
        case tuple() | list():
            return [plain(item) for item in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: plain(item) for key, item in value.items()}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"{value!r} of type {type(value).__name__} has no plain form that JSON could hold.")


def fingerprint(value: Any) -> str:
    """12 hex digits of the canonical JSON of `value`: equal for equal values, whatever the order of their keys.

    Floats enter by their shortest exact form, so that any two different ones differ here.
    """
    canonical = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Stage:
    """A part of a run that others may share, in the directory `<root>/<name>-<fingerprint of its key>`.

    The job writes there what it wants, its checkpoints too, so that it resumes where it was killed. `finish` comes
    last; a stage is `complete` from then on, and is never written again.
    """

    directory: Path

    @classmethod
    def open(cls, root: Path, name: str, key: dict[str, Any]) -> "Stage":
        """The stage of `key`: everything its results depend on, kept in clear in `stage.json`."""
        stage = cls(Path(root) / f"{name}-{fingerprint(key)}")
        description = stage.directory / "stage.json"
        if not description.exists():
            write_json(description, key)
        elif fingerprint(read_json(description)) != fingerprint(key):
            raise InputError(
                f"{description} is not what its folder is named for. Delete {stage.directory} to run it again."
            )
        return stage

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by one job at a time; another waits here, and may then find the stage complete.

        All processes of the job enter together and leave together: what one wrote within, all see behind it.
        """
        waiting = f"{self.directory.name} is being made by another process; waiting for it."
        with locked(self.directory / "lock", waiting) if hosts.first() else contextlib.nullcontext():
            hosts.wait("stage entered")
            yield
            hosts.wait("stage left")

    @property
    def complete(self) -> bool:
        return (self.directory / "done.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` was given."""
        return read_json(self.directory / "done.json")

    def finish(self, summary: dict[str, Any]) -> None:
        if hosts.first() and self.complete:
            raise RuntimeError(f"{self.directory} is complete already, and a complete stage is never written again.")
        write_json(self.directory / "done.json", summary)


def claim(work_dir: Path, config: Any) -> None:
    """Makes `work_dir` the place of this experiment: writes `config.json`, or checks that it is the same.

    Raises:
      InputError: naming each field that differs, as `a.b: old -> new`.
    """
    path = Path(work_dir) / "config.json"
    if not path.exists():
        write_json(path, config)
        return
    differing = [
        f"{name}: {_shown(old)} → {_shown(new)}" for name, (old, new) in differences(read_json(path), config).items()
    ]
    if differing:
        raise InputError(
            f"{work_dir} belongs to another experiment, which differs in {', '.join(differing)}. Choose another "
            f"--work-dir, or delete {work_dir} to start anew there."
        )


@contextlib.contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds a file's lock, which one process has at a time; another waits here, and says `waiting`, if it is given.

    Raises:
      InputError: if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                say(waiting)
            _lock(file, fcntl.LOCK_EX)
        yield  # released by the system, however the process ends


@contextlib.contextmanager
def exclusive(work_dir: Path) -> Iterator[None]:
    """Holds the work directory for this process alone, however it ends: the system lets go of what a kill leaves.

    Raises:
      InputError: at once, if another process holds it, naming that; or if the file system has no locks.
    """
    path = Path(work_dir) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{work_dir} is in use by {file.read().strip() or 'another process'}. Wait for it or stop it, or "
                "choose another --work-dir."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise InputError(
            f"{file.name} cannot be locked: {error.strerror}. Give --runs-dir (and --work-dir) a folder of a file "
            "system that has locks: a local disk, or an NFS share mounted as version 4.1."
        ) from error


ABSENT = object()
"""Stands in `differences` for a field that one side lacks."""


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, as {"a.b": (old, new)}."""
    before, after = dict(_flat(plain(old))), dict(_flat(plain(new)))
    pairs = {name: (before.get(name, ABSENT), after.get(name, ABSENT)) for name in dict.fromkeys([*before, *after])}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an error of the system that names no file (a full disk) names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its message would go
            error.filename = error.filename or str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing, and makes the folders above it."""
    if not hosts.first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk: what is there of it shall not take the last room
        temporary.unlink(missing_ok=True)
        raise
    _move(temporary, path)


def _move(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    # The move itself is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes `plain(value)`."""
    # Half a character, as in the name of a file that is no UTF-8, becomes its escape, which JSON reads back.
    text = json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes named arrays as one .npz file."""
    buffer, contents = io.BytesIO(), {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(buffer, allow_pickle=False, **contents)
    write_bytes(path, buffer.getvalue())


class RowFile:
    """A .npy file that is written some rows at a time, from the first to the last, by one process at a time.

    Until `finish` it lies beside its place as `<name>.partial`, with a note of how many rows of it are whole. After a
    kill the next process goes on behind those.

    Args:
      path: its place.
      shape: of the whole array, [rows, ...].
      dtype: of the array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any):
        self._path = Path(path)
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._noted = self._path.with_name(f"{self._path.name}.partial.json")
        header = _npy_header(shape, self._dtype)
        row_bytes = math.prod(shape[1:]) * self._dtype.itemsize
        self.rows, self.note = 0, None
        """How many are written, and what the last `append` said of them."""
        if self._noted.exists() and self._partial.exists():
            found = read_json(self._noted)
            whole = len(header) + found["rows"] * row_bytes
            with self._partial.open("rb") as file:
                same = file.read(len(header)) == header
            if same and self._partial.stat().st_size >= whole:
                if hosts.first():
                    os.truncate(self._partial, whole)
                self.rows, self.note = found["rows"], found["note"]
        if self.rows == 0 and hosts.first():
            self._noted.unlink(missing_ok=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.write_bytes(header)

    def append(self, rows: np.ndarray, note: Any = None) -> None:
        """Writes the next rows, and with them `note`, JSON that stands for all so far."""
        if rows.shape[1:] != self._shape[1:] or self.rows + len(rows) > self._shape[0]:
            raise ValueError(f"{rows.shape} rows do not go behind {self.rows} of {self._shape}.")
        if hosts.first():
            with naming(self._partial), self._partial.open("ab") as file:
                file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
        # Only now, so that no row is counted that a power cut may still take.
        self.rows, self.note = self.rows + len(rows), note
        write_json(self._noted, {"rows": self.rows, "note": note})

    def finish(self) -> None:
        """Moves the file to its place."""
        if self.rows != self._shape[0]:
            raise RuntimeError(f"{self._partial} has {self.rows} rows of {self._shape[0]}.")
        if hosts.first():
            _move(self._partial, self._path)
            self._noted.unlink(missing_ok=True)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def read_rows(path: Path) -> np.ndarray:
    """An array of a .npy file that stays on disk: what is indexed is read.

    Raises:
      InputError: if the file is missing or damaged.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
      InputError: if the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote.

    Raises:
      InputError: if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    path = Path(path)
    return InputError(f"{path} cannot be read ({error}). Delete the folder {path.parent} to have it made anew.")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)
