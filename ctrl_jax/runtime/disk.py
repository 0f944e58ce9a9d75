"""What the disk refuses, in a paragraph that a user can act on."""

import errno
import re
import shutil
import tempfile
from pathlib import Path

from ctrl_jax.errors import InputError

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


def explain(error: BaseException) -> str | None:
    """What to do about a disk that is full or may not be written, or None where the error is another.

    Libraries wrap such errors, or tell them by their text alone: the causes are looked through as well.
    """
    while True:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return (
                f"{error.filename or 'A file'}: {error.strerror}. Give this user access to it, or choose another "
                "place: --runs-dir, --work-dir, --cache-dir."
            )
        text = str(error)
        code = error.errno if isinstance(error, OSError) else None
        reason = _FULL.get(code or 0) or next((reason for reason in _FULL.values() if reason in text), None)
        if reason is not None:
            named = error.filename if isinstance(error, OSError) else None
            return _full(reason, str(named) if named else _path_in(text))
        # What is raised `from None` has nothing to do with what was handled then: it may be a bug.
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return None
        error = cause


def _full(reason: str, path: str | None) -> str:
    place = Path(path).absolute() if path else Path.cwd()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return (
        f"{path or 'A file'} could not be written: {reason} ({usage.free / 2**20:,.0f} MiB of "
        f"{usage.total / 2**20:,.0f} MiB are free there). What was saved before is whole. Make room, and run the same "
        "command again: it goes on from the last checkpoint."
    )


def _path_in(text: str) -> str | None:
    found = re.search(r"(?:^|[\s\"'])(/[^\s\"',]+)", text)
    return found[1] if found else None
