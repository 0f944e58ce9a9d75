"""What tests of panels look at: their artists, and the rows of their tables."""

import csv
import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctrl_jax.report import table
from ctrl_jax.report.panel import PANEL_SIZE, Panel


def drawn(panel: Panel) -> Axes:
    axes = Figure(figsize=PANEL_SIZE).add_subplot()
    panel.draw(axes)
    return axes


def marks(axes: Axes) -> list[tuple[float, float]]:
    """Centres of all points that have error bars."""
    return [tuple(xy) for container in axes.containers if (line := container[0]) for xy in line.get_xydata()]


def rows(panels: Sequence[Panel]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.of_panels(panels))))
