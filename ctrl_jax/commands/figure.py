"""The figure of a command, at the path that its `--figure` names."""

from collections.abc import Sequence
from pathlib import Path

from ctrl_jax.errors import InputError
from ctrl_jax.report import pictures
from ctrl_jax.report.panel import Panel
from ctrl_jax.runtime.stages import write_bytes


def check(path: Path | None) -> None:
    """Raises InputError for a path that names no kind of picture."""
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure is {path}, which names no kind of picture; end it in .png, .svg or .pdf.")


def write(path: Path, panels: Sequence[Panel], title: str) -> None:
    """The panels side by side, in the form that the path's ending names."""
    kind = path.suffix.removeprefix(".")
    write_bytes(path, pictures.draw(panels, (kind,), columns=2, title=title)[kind])
