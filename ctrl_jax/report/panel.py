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
    height: float = PANEL_SIZE[1]
    """Inches."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, inches."""
        return PANEL_SIZE[0], self.height
