"""What the disk refuses, in a paragraph that a user can act on."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from ctrl_jax.errors import InputError, causes

_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def check_writable(folder: Path) -> None:
    """Makes the folder, and a file in it, which it removes.

    Raises:
      InputError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        told = explain(error)
        if told is None:
            raise
        raise InputError(told) from error


def remove_leftovers(folder: Path, *, now: float) -> None:
    """Removes what kills have left of files in the making (stages.write_bytes): `.<name>.<32 hex digits>.tmp`.

    Args:
      folder: with the folders right below it.
      now: the time of the file system that it is on. A file younger than an hour may be another process's, and stays.
    """
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name) and path.stat().st_mtime < now - 3600:
                    path.unlink()


def explain(error: BaseException) -> str | None:
    """What to do about a disk that is full or may not be written, or None where the error is another.

    Libraries wrap such errors, or put them into their text alone: the causes are looked through as well.
    """
    for cause in causes(error):
        named = _file_of(cause)
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return (
                f"{named or 'A file'}: {cause.strerror}. Give this user access to it, or choose another place: "
                "`runs_dir`, `work_dir`, `cache_dir`."
            )
        text = str(cause)
        code = cause.errno if isinstance(cause, OSError) else None
        reason = _FULL.get(code or 0) or next((reason for reason in _FULL.values() if reason in text), None)
        if reason is not None:
            return _full(reason, named or _path_in(text))
    return None


def _file_of(error: BaseException) -> str | None:
    """The file that an error of the system names; of a copy or a move the one that was to be written."""
    if not isinstance(error, OSError):
        return None
    name = error.filename if error.filename2 is None else error.filename2
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None


def _full(reason: str, path: str | None) -> str:
    after = (
        "What was saved before is whole. Make room, and run the same command again: it goes on from the last "
        "checkpoint."
    )
    if path is None:
        return (
            f"A file could not be written: {reason}. The error does not say which: `df -h` shows whether the disk of "
            f"`runs_dir`, `work_dir`, `output` or the temporary folder, {tempfile.gettempdir()}, is full. {after}"
        )
    place = os.path.abspath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    usage = shutil.disk_usage(place)
    room = f"{usage.free / 2**20:,.0f} MiB of {usage.total / 2**20:,.0f} MiB are free there"
    return f"{path} could not be written: {reason} ({room}). {after}"


def _path_in(text: str) -> str | None:
    """The first absolute path in a text, in quotes or not."""
    found = re.search(r"""(["'])(/.+?)\1|(?:^|\s)(/[^\s"',]+)""", text)
    return found and (found[2] or found[3].rstrip(".,:;)"))
