"""Rows of tables: CSV, Parquet, and the Arrow files of a folder that `datasets` saved."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from ctrl_jax.data import jsonl
from ctrl_jax.data.rows import Row, shown
from ctrl_jax.errors import InputError

ROWS_AT_A_TIME = 256


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a CSV file with a header, plain or .gz, after its place: `file, line 3`. An empty cell is None.

    Errors: InputError with the file and line where a line is not UTF-8 or not of the header's columns.
    """
    csv.field_size_limit(jsonl.LONGEST_LINE)  # the library's own limit is shorter than some conversations
    texts = (jsonl.decoded(line, f"{path}, line {number}") for number, line in jsonl.lines(path))
    reader = csv.reader(texts, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{place} is not CSV: {error}.",
                field=place,
                value=str(error),
                remedy="Write a header, and quote texts that have commas.",
            ) from error
        if header is None:
            header = cells
            _check_names(header, place)
        elif cells:
            if len(cells) != len(header):
                raise InputError(
                    f"{place} has {len(cells)} cells, and the header {len(header)} columns, {shown(header)}",
                    field=place,
                    value=cells,
                    remedy="quote texts that have commas or line ends.",
                )
            yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a Parquet file, after its place: `file, row 3`. Errors: InputError where it cannot be read."""
    with _whole(path), pyarrow.parquet.ParquetFile(path) as file:
        _check_names(file.schema_arrow.names, str(path))
        yield from _numbered(file.iter_batches(ROWS_AT_A_TIME, use_threads=False), path)


def arrow_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of an Arrow file as `datasets` saves it, after its place: `file, row 3`.

    Errors: InputError where it cannot be read.
    """
    with _whole(path), pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        _check_names(stream.schema.names, str(path))
        yield from _numbered(iter(stream), path)


def _numbered(batches: Iterator[pyarrow.RecordBatch], path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets and lengths are the file's, and reach into memory
        for start in range(0, len(batch), ROWS_AT_A_TIME):
            for row in batch.slice(start, ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _check_names(names: list[str], place: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"{place} has two columns {shown(twice[0])}",
            field=place,
            value=twice[0],
            remedy="give each a name of its own.",
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Within, whatever the library raises says that the file is damaged, or of another form.

    An import that fails is of a time zone's library, which a column of times may ask for.
    """
    try:
        yield
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read: {shown(reason or type(error).__name__)}.",
            field=str(path),
            value=reason,
            remedy="Write or copy it again, in the form that its name promises.",
        ) from error
