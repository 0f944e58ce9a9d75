"""Prompts, demonstrations and preference pairs from files of one's own: JSON lines, CSV, Parquet, saved `datasets`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_jax.data import jsonl, tables
from ctrl_jax.data.conversations import Record
from ctrl_jax.data.forms import Format
from ctrl_jax.data.rows import Row, listed, read_plain_row, read_row, shown
from ctrl_jax.data.splits import SPLITS, Loaded, collected
from ctrl_jax.errors import InputError

READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": jsonl.rows,
    ".jsonl.gz": jsonl.rows,
    ".csv": tables.csv_rows,
    ".csv.gz": tables.csv_rows,
    ".parquet": tables.parquet_rows,
    ".arrow": tables.arrow_rows,
}
"""What reads a file, by the end of its name. JSON lines under another name are read too."""
SUFFIXES = tuple(READERS)
LONGEST_NAME = 200
"""Characters of a file's name; file systems take little more."""
FORMS = (
    "a .jsonl, .csv (or .gz of them) or .parquet file, a folder with train.jsonl (and validation.jsonl, test.jsonl; or "
    ".csv, .parquet), nor a folder that `datasets` saved"
)


def load(path: Path, mapping: Mapping[str, tuple[str, ...]] | None = None, format: Format = "chat") -> Loaded:
    """The records of a file, or of a folder of train, validation and test (see `splits.arranged`).

    A row is read by `rows.read_row`, or by `rows.read_plain_row`, with `mapping`. Rows with an empty reply, whose two
    replies are equal, or follow different turns, are dropped and counted.

    Errors: InputError with the file and line (or row) for what is not such a row, and where `mapping` names a column
    that no row has.
    """
    mapping = mapping or {}
    reader = {"chat": read_row, "plain": read_plain_row}[format]
    seen: dict[str, None] = {}

    def read(row: Row, place: str) -> Record | str:
        seen.update(dict.fromkeys(row))
        return reader(row, place, mapping)

    found = files(path)
    loaded = collected({split: _rows(parts) for split, parts in found.items()}, read, _origin(path, found))
    missing = [column for columns in mapping.values() for column in columns if column not in seen]
    if missing and loaded.rows:
        raise InputError(
            f"`data.columns` reads {listed(missing)}, which no row of {path} has",
            field="data.columns",
            value=missing,
            remedy=f"the columns are {listed(seen)}.",
        )
    return loaded


def files(path: Path) -> dict[str, list[Path]]:
    """By split, the files at a path; a file alone is called train. Errors: InputError where there is none."""
    if path.is_file():
        return {"train": [path]}
    for name, saved in (("dataset_dict.json", _saved_splits), ("state.json", _saved)):
        if (path / name).is_file():
            return saved(path)
    found = {split: parts for split in SPLITS if (parts := _parts(path, split))}
    if not found:
        other = " (it is no regular file)" if path.exists() and not path.is_dir() else ""
        raise InputError(
            f"There is no data at {path}{other}: it is neither {FORMS}.",
            field="data.path",
            value=str(path),
            remedy="Give `data.path` one of them.",
        )
    return found


def _parts(folder: Path, split: str) -> list[Path]:
    """The one file of a split, or its shards: train.parquet, or train-00000-of-00002.parquet and so on."""
    known = SUFFIXES[:-1]
    whole = [file for suffix in known if (file := folder / f"{split}{suffix}").is_file()]
    for place in (folder, folder / "data"):
        whole = whole or sorted(file for file in place.glob(f"{split}-*.parquet") if file.is_file())
    if len({_suffix(file) for file in whole}) > 1:
        raise InputError(
            f"{folder} has {' and '.join(file.name for file in whole)}, and one of them can be {split}",
            field="data.path",
            value=str(folder),
            remedy="move the others elsewhere.",
        )
    return whole


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    names = _json(folder / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names or any(name not in SPLITS for name in names):
        raise InputError(
            f"{folder / 'dataset_dict.json'} has the splits {shown(names)}; they are read as {', '.join(SPLITS)}.",
            field=str(folder / "dataset_dict.json"),
            value=names,
            remedy="Give `data.path` the folder of one of them, or rename them.",
        )
    return {name: _saved(folder / name)["train"] for name in SPLITS if name in names}


def _saved(folder: Path) -> dict[str, list[Path]]:
    entries = _json(folder / "state.json").get("_data_files")
    entries = entries if isinstance(entries, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    if not names or any(Path(name).name != name or "\0" in name or len(name) > LONGEST_NAME for name in names):
        raise InputError(
            f"{folder / 'state.json'} names no files of the data set",
            field=str(folder / "state.json"),
            value=names,
            remedy="save it again with save_to_disk.",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]!r}, which its state.json names",
            field=str(folder),
            value=missing[0],
            remedy="copy it there, or save it again.",
        )
    return {"train": [folder / name for name in names]}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.",
            field=str(path),
            value=str(error),
            remedy="Save the data set again with save_to_disk.",
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} is no object", field=str(path), value=value, remedy="save the data set again with save_to_disk."
        )
    return value


def _origin(path: Path, found: Mapping[str, Sequence[Path]]) -> str:
    """Where the splits come from; and which other files of the folder are not read."""
    if path.is_file():
        return path.name
    read = {file.name for parts in found.values() for file in parts}
    others = sorted(file.name for file in path.iterdir() if _suffix(file) in SUFFIXES and file.name not in read)
    names = ", ".join(
        parts[0].name if len(parts) == 1 else f"{len(parts)} files of {split}" for split, parts in found.items()
    )
    return f"{names} of {path}" + (f"; not read there: {', '.join(others)}" if others else "")


def _rows(parts: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    for file in parts:
        yield from READERS.get(_suffix(file), jsonl.rows)(file)


def _suffix(file: Path) -> str:
    return next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), "")
