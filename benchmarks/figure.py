"""The picture of a bench: one panel a case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Medians as bars, the floor as a line."""
