"""A panel: a titled drawing that becomes an inline SVG (svg.py), a picture (pictures.py) or its numbers (table.py)."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

PANEL_SIZE = (4.2, 2.95)
"""Inches, at font sizes that stay legible when a phone shows the panel 340 pixels wide."""


@dataclass(frozen=True)
class Panel:
    title: str
    description: str
    """What the panel shows, for those who cannot see it."""
    draw: Callable[[Axes], None]
