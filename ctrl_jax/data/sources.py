"""The data of an experiment, whatever its source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ctrl_jax.data import chitchat, dialogues, downloads, files, hh_rlhf, rows, tldr
from ctrl_jax.data.forms import Format
from ctrl_jax.data.splits import Loaded
from ctrl_jax.errors import InputError


class Source(Protocol):
    """Where records come from; `config.Data` is one."""

    @property
    def source(self) -> str:
        """One of `config.SOURCES`."""

    @property
    def path(self) -> str | None:
        """A local copy, or the file or folder of one's own rows."""

    @property
    def mapping(self) -> Mapping[str, tuple[str, ...]]:
        """Fields of a row of one's own, with the columns that hold them."""

    @property
    def format(self) -> Format:
        """What a prompt is."""

    @property
    def seed(self) -> int:
        """Of generated dialogues."""

    @property
    def dialogues(self) -> int:
        """How many dialogues to generate for training."""


def load(data: Source, data_dir: Path) -> Loaded:
    """The records of every split; what is generated or downloaded is kept in `data_dir`.

    Raises:
      InputError: if a file is missing, unreadable or not of its source's form, a download fails, or nothing is left to
        train on.
    """
    kind, _, subset = data.source.partition("/")
    path = _path(data)
    match kind:
        case rows.GIVEN:
            raise InputError(
                "The prompts of this run were given by a Python program (ctrl_jax.align), and lie in no file.",
                field="data.source",
                value=data.source,
                remedy="Continue it there; `report` works here too.",
            )
        case "dialogues":
            records = dialogues.load(subset, seed=data.seed, count=data.dialogues, data_dir=data_dir)
            loaded = Loaded(records, sum(map(len, records.values())), {}, "generated here")
        case "hh_rlhf":
            loaded = hh_rlhf.load(subset, path=path, data_dir=data_dir)
        case "chitchat":
            loaded = chitchat.load(path)
        case "tldr":
            loaded = tldr.load(path=path, data_dir=data_dir, format=data.format)
        case _:
            assert path is not None, "config.Data asks for the path of files"
            loaded = files.load(path, data.mapping, data.format)
    if not loaded.records["train"]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in loaded.dropped.items())
        raise InputError(
            f"The source {data.source}{f' at {path}' if path else ''} gave no record to train on: {loaded.rows} rows "
            f"were read, and {sum(loaded.dropped.values())} dropped{f' ({dropped})' if dropped else ''}.",
            field="data.source",
            value=data.source,
            remedy="Give it more.",
        )
    return loaded


def fingerprint(data: Source) -> str | None:
    """Names the contents of the local files that are read, at `data.path` or of an installed package; None where the
    data is generated or downloaded.

    Raises:
      InputError: if the files are missing.
    """
    path = _path(data)
    kind, _, subset = data.source.partition("/")
    if kind == "chitchat":
        path = chitchat.file(path)
    if path is None:
        return None
    match kind:
        case "chitchat":
            found = {"conversations": path}
        case "hh_rlhf":
            found = hh_rlhf.files(path, subset)
        case "tldr":
            found = tldr.files(path)
        case _:
            parts = files.files(path)
            found = {f"{split}/{i}": file for split, of_split in parts.items() for i, file in enumerate(of_split)}
    try:
        return downloads.fingerprint(found)
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read: {error.strerror}.",
            field="data.path",
            value=str(error.filename or path),
            remedy="Give this user access to it.",
        ) from error


def _path(data: Source) -> Path | None:
    if data.path is None:
        return None
    try:
        path = Path(data.path).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a character that none has, an unknown ~user
        raise InputError(
            f"`data.path` {data.path[:80]!r} cannot be a path: {error}.",
            field="data.path",
            value=data.path,
            remedy="Give it one.",
        ) from error
    return path
