"""Files that outlive a job: stages keyed by what they depend on, the claim on a work directory, atomic writes.

Every file is written beside its place, synced, and moved there: a kill at any moment leaves the old one or the new. Of
several processes of a job (hosts.py) the first alone writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import socket
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import checksums, hosts
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


DONE = "done.json"
"""The seal of a stage (checksums.py), written when all else is there."""

# A training goes on from these, which look after themselves: a checkpoint has a seal of its own, and of the metrics
# the rows that are whole are read.
_RESUMED = ("checkpoints", "metrics.jsonl", "tensorboard")


@dataclass(frozen=True)
class Stage:
    """A part of a run that others may share, in the directory `<root>/<name>-<fingerprint of its key>`.

    The job writes there what it wants, its checkpoints too, so that it resumes where it was killed. `finish` comes
    last; a stage is `complete` from then on, and is never written again.
    """

    directory: Path
    key: dict[str, Any]

    @classmethod
    def open(cls, root: Path, name: str, key: dict[str, Any]) -> "Stage":
        """The stage of `key`: everything its results depend on, kept in clear in `stage.json`."""
        stage = cls(Path(root) / f"{name}-{fingerprint(key)}", key)
        description = stage.directory / "stage.json"
        if not description.exists():
            write_json(description, key)
        return stage

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One job at a time is within; another waits here, and may then find the stage complete.

        Damaged files are set aside on entry: the rest is whole and of this key. All processes of the job enter and
        leave together, so that afterwards all see what one wrote.
        """
        waiting = f"{self.directory.name} is being made by another process; waiting for it."
        with locked(self.directory / "lock", waiting) if hosts.first() else contextlib.nullcontext():
            if hosts.first():
                self._check()
            hosts.wait("stage entered")
            yield
            hosts.wait("stage left")

    @property
    def complete(self) -> bool:
        return (self.directory / DONE).exists()

    @property
    def whole(self) -> bool:
        """Whether it is complete, and all its files are what was written. All processes of the job ask together."""
        return bool(hosts.agree(not checksums.broken(self.directory / DONE)))

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` was given."""
        return checksums.about(self.directory / DONE)["summary"]

    @property
    def files(self) -> list[str]:
        """What `finish` covers: all that is there, but of the checkpoints the seal of the newest alone."""
        found = []
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory)
            top = name.parts[0]
            if path.is_file() and top not in ("lock", "stage.json", DONE, "checkpoints") and not _aside(top):
                found.append(str(name))
        seals = self.directory.glob("checkpoints/*/checksums.json")
        steps = {int(path.parent.name): path for path in seals if path.parent.name.isdecimal()}
        newest = [str(steps[max(steps)].relative_to(self.directory))] if steps else []
        return found + newest

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the seal of all files, and with it `summary`, JSON."""
        if not hosts.first():
            return
        if self.complete:
            raise RuntimeError(f"{self.directory} is complete already, and a complete stage is never written again.")
        about = {"stage": self.directory.name, "summary": plain(summary)}
        write_json(self.directory / DONE, checksums.sealed(self.directory, self.files, about))

    def reopen(self) -> None:
        """Removes the seal, so that the stage can be finished again."""
        if hosts.first():
            (self.directory / DONE).unlink(missing_ok=True)

    def supersede(self) -> Path:
        """Sets all files aside, whole as they are, so that the stage is made anew. Returns their folder."""
        place = str(set_aside(self.directory, "superseded", self._entries())) if hosts.first() else None
        return Path(hosts.agree(place))

    def _check(self) -> None:
        """Sets aside what is damaged, or of another key."""
        damaged = self._damaged()
        if not damaged:
            return
        place = set_aside(self.directory, "damaged", damaged)
        write_json(self.directory / "stage.json", self.key)
        say(
            f"{self.directory} is damaged: {', '.join(damaged)} is missing or not what "
            f"was written. The damaged part is set aside in {place.name}, and made again.",
            style="yellow",
        )

    def _damaged(self) -> list[str]:
        """The entries of the directory that have to be set aside."""
        damaged, seal = [], self.directory / DONE
        try:
            described = fingerprint(read_json(self.directory / "stage.json")) == fingerprint(self.key)
        except (InputError, RecursionError):
            described = False
        if not described:
            damaged.append("stage.json")
        if seal.exists():
            broken = checksums.broken(seal)
            if broken == [DONE] or checksums.about(seal)["stage"] != self.directory.name:
                damaged += [DONE, *(name for name in self._entries() if name not in _RESUMED)]
            elif broken:
                tops = (Path(name).parts[0] for name in broken)
                damaged += [DONE, *(name for name in tops if name != "checkpoints")]
        elif not described:
            damaged += self._entries()  # unfinished, and perhaps of another key
        return list(dict.fromkeys(damaged))

    def _entries(self) -> list[str]:
        names = (path.name for path in self.directory.iterdir())
        return sorted(name for name in names if name not in ("lock", "stage.json") and not _aside(name))


def _aside(name: str) -> bool:
    return name.startswith((".", "damaged-", "superseded-", "unfinished-"))


def _free(directory: Path, kind: str) -> str:
    return next(name for n in itertools.count(1) if not (directory / (name := f"{kind}-{n}")).exists())


def set_aside(directory: Path, kind: str, names: Iterable[str]) -> Path:
    """Moves the existing ones of `names` into a new folder `<kind>-<n>` of the directory, and returns it."""
    place = directory / _free(directory, kind)
    place.mkdir(parents=True)
    for name in names:
        if os.path.lexists(directory / name):
            os.rename(directory / name, place / name)
    return place


def _none(names: set[str]) -> set[str]:
    return set()


def claim(work_dir: Path, config: Any, *, may_differ: Callable[[set[str]], set[str]] = _none) -> list[str]:
    """Checks that `work_dir` is the place of this experiment, by its `config.json`, or writes that.

    Args:
      may_differ: of the names of the fields that differ, `a.b`, those that may.

    Returns:
      The fields that differ, as `a.b: old → new`.

    Raises:
      InputError: naming each other field that differs.
    """
    path = Path(work_dir) / "config.json"
    if path.exists():
        try:
            before = read_json(path)
            if not isinstance(before, dict):
                raise InputError(f"{path} is {before!r:.80}, where an object is expected.")
        except InputError as error:
            # What another configuration made here is refused by its checkpoints.
            place = set_aside(path.parent, "damaged", [path.name]) if hosts.first() else path.parent
            say(f"{error} It is set aside in {place}, and written again.", style="yellow")
    if not path.exists():
        write_json(path, config)
        return []
    found = differences(before, config)
    refused = found.keys() - may_differ(set(found))
    shown = {name: f"{name}: {_shown(old)} → {_shown(new)}" for name, (old, new) in found.items()}
    if refused:
        raise InputError(
            f"{work_dir} belongs to another experiment: its config.json differs in "
            f"{', '.join(text for name, text in shown.items() if name in refused)}. Choose another `work_dir`, or move "
            f"{work_dir} away to start anew there."
        )
    return [*shown.values()]


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
                "choose another `work_dir`."
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
            f"{file.name} cannot be locked: {error.strerror}. Give `runs_dir` (and `work_dir`) a folder of a file "
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
    except OSError:  # a full disk: the torn file must not take the last room
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

    Until `finish` it is beside its place as `<name>.partial`, with a note of how many rows of it are whole. After a
    kill the next process goes on behind those.

    Args:
      path: its place.
      shape: of the whole array, [rows, ...].
      dtype: of the array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._noted = self.path.with_name(f"{self.path.name}.partial.json")
        header = _npy_header(shape, self.dtype)
        self.rows, self.note = 0, None
        """How many are written, and what the last `append` said of them."""
        self._checksum = zlib.crc32(header)
        """Of the rows so far."""
        self._resume(header, math.prod(shape[1:]) * self.dtype.itemsize)
        if self.rows == 0 and hosts.first():
            self._noted.unlink(missing_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.write_bytes(header)

    def _resume(self, header: bytes, row: int) -> None:
        """Takes the rows that the note names, if they are what was written, and cuts off what is behind them."""
        try:
            found = json.loads(self._noted.read_bytes())
            end = len(header) + found["rows"] * row
            with self._partial.open("rb") as file:
                same, checksum = file.read(len(header)) == header, self._checksum
                while block := file.read(max(0, min(2**20, end - file.tell()))):
                    checksum = zlib.crc32(block, checksum)
                same &= file.tell() == end and found["crc32"] == _of_note(checksum, found["rows"], found["note"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return
        if same:
            self.rows, self.note, self._checksum = found["rows"], found["note"], checksum
            if hosts.first():
                os.truncate(self._partial, end)

    def append(self, rows: np.ndarray, note: Any = None) -> None:
        """Writes the next rows, and with them `note`, JSON that stands for all so far."""
        if rows.shape[1:] != self.shape[1:] or self.rows + len(rows) > self.shape[0]:
            raise ValueError(f"{rows.shape} rows do not go behind {self.rows} of {self.shape}.")
        data = np.ascontiguousarray(rows, self.dtype).tobytes()
        self._checksum = zlib.crc32(data, self._checksum)
        if hosts.first():
            with naming(self._partial), self._partial.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        # Only now, so that no row is counted that a power cut may still take.
        self.rows, self.note = self.rows + len(rows), note
        crc32 = _of_note(self._checksum, self.rows, plain(note))
        write_json(self._noted, {"rows": self.rows, "note": note, "crc32": crc32})

    @property
    def complete(self) -> bool:
        """Whether all rows are written."""
        return self.rows == self.shape[0]

    def finish(self) -> None:
        """Moves the file to its place."""
        if self.rows != self.shape[0]:
            raise RuntimeError(f"{self._partial} has {self.rows} rows of {self.shape[0]}.")
        if hosts.first():
            _move(self._partial, self.path)
            self._noted.unlink(missing_ok=True)


def _of_note(rows_checksum: int, rows: int, note: Any) -> int:
    return zlib.crc32(json.dumps([rows, note]).encode(), rows_checksum)


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
    except (OSError, ValueError, RecursionError) as error:
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
    return InputError(
        f"{path} cannot be read ({error}). Move this file away, and run the same command again: it is made anew."
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)
