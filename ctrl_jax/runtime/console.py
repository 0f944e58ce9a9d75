"""What a person sees of a run. On a terminal a live bar, in a log plain lines; nothing after `be_quiet`.

All text is literal: a path or a name with brackets is shown as it is, never read as rich's markup.
"""

import codecs
import contextlib
import datetime
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from rich import get_console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class Bar(Protocol):
    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        """Shows that `step` steps are done, and the metrics of the last one."""


def be_quiet() -> None:
    """Prints nothing from here on: standard output is a program's to read (`--json`)."""
    get_console().quiet = True


def printable(text: str) -> str:
    r"""`text` without what a terminal would obey instead of showing it, for the text of a model or of a file.

    Control characters, so escape sequences too, halves of characters, and marks that turn the direction of writing are
    spelled out (`\x1b`, `\u202e`). Line breaks and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


# C0 and C1 without \t and \n; the marks, embeddings, overrides and isolates of bidirectional text; lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


SPELLED = {
    "Φ": "Phi", "β": "beta", "−": "-", "–": "-", "→": "->", "×": "x", "·": "*", "…": "...", "▸": ">", "≤": "<=",
    "≥": ">=", "±": "+-", "½": "1/2", "•": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
"""Letters of ours that a terminal may lack, in ASCII."""


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if letter in SPELLED:
        return SPELLED[letter], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


def print_anything() -> None:
    """From here on every letter prints: one that the terminal's encoding lacks is spelled, or shown by its code."""
    codecs.register_error("spelled", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled")


_spell_fields: Callable[[str], str] = str


@contextlib.contextmanager
def spelling_fields(function: Callable[[str], str]) -> Iterator[None]:
    """Within, `function` spells the fields of an experiment that a line names: the command line, as its options."""
    global _spell_fields
    before, _spell_fields = _spell_fields, function
    try:
        yield
    finally:
        _spell_fields = before


def say(text: str, *, style: str | None = None) -> None:
    """Prints a line, in a style of rich such as "bold" or "yellow". Lines of a log are not wrapped."""
    get_console().print(
        printable(_spell_fields(text)), style=style, markup=False, emoji=False, highlight=style is None, soft_wrap=True
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table: the first column to the left, the others, numbers, to the right; floats with four digits."""
    drawn = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_shown(cell)) for cell in row))
    console = get_console()
    if not console.is_terminal:  # a log is as wide as its lines
        drawn.width = console.measure(drawn, options=console.options.update(max_width=10_000)).maximum
    console.print(drawn, crop=False)


@contextlib.contextmanager
def progress(name: str, total: int, *, start: int = 0, every: float = 10.0) -> Iterator[Bar]:
    """Shows how far a job is, how long it will take, and its latest metrics.

    Args:
      name: of the job.
      total: steps.
      start: steps done before, where it resumes.
      every: seconds between the lines of a log; a terminal has a live bar instead.
    """
    clock = _Clock(total)
    if not get_console().is_terminal:
        yield _Lines(name, total, clock, every)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remaining]}"),
        TextColumn("{task.fields[metrics]}", style="cyan", markup=False),
    )
    with Progress(*columns, console=get_console()) as bar:
        task = bar.add_task(name, total=total, completed=start, remaining="", metrics="")
        yield _Live(bar, task, clock)


@contextlib.contextmanager
def latest_lines() -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Shows, on a terminal, one line a job under all that is said: its name and the latest line of its own log.

    Yields:
      What to call with {name: line} of the jobs that run; it redraws them.
    """
    console = get_console()
    if not console.is_terminal:
        yield lambda lines: None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(lines: Mapping[str, str]) -> None:
            drawn = Table.grid(padding=(0, 2))
            drawn.add_column(no_wrap=True)
            drawn.add_column(no_wrap=True, overflow="ellipsis")
            for name, line in lines.items():
                drawn.add_row(Text(name, style="bold"), Text(printable(line)))
            live.update(drawn, refresh=True)

        yield show


class _Clock:
    """Time left, from the pace since the first step: that one compiles."""

    def __init__(self, total: int):
        self._total = total
        self._first: tuple[int, float] | None = None

    def remaining(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, since = self._first
        if step <= first:
            return ""
        seconds = (now - since) / (step - first) * (self._total - step)
        return f"ETA {datetime.timedelta(seconds=round(seconds))}"


class _Live:
    def __init__(self, bar: Progress, task: TaskID, clock: _Clock):
        self._bar, self._task, self._clock = bar, task, clock

    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        self._bar.update(self._task, completed=step, remaining=self._clock.remaining(step))
        if values is not None:
            self._bar.update(self._task, metrics=_metrics(values))


class _Lines:
    def __init__(self, name: str, total: int, clock: _Clock, every: float):
        self._name, self._total, self._clock, self._every = name, total, clock, every
        self._next = time.monotonic()

    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        remaining = self._clock.remaining(step)
        if time.monotonic() < self._next and step < self._total:
            return
        self._next = time.monotonic() + self._every
        parts = [f"{self._name} {step}/{self._total}", remaining, _metrics(values or {})]
        line = "  ".join(part for part in parts if part)
        get_console().print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)


def _metrics(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {_shown(float(value))}" for name, value in values.items())


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else printable(str(cell))
