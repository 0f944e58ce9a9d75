"""The numbers that panels draw, as CSV, read back from the artists themselves."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patches, ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from ctrl_jax.report.axes import ENDS, Y_AXIS
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import settings

TABLE_COLUMNS = ("panel", "series", "x", "y", "x_low", "x_high", "y_low", "y_high", "x_axis", "y_axis")


def of_panels(panels: Sequence[Panel]) -> str:
    """The numbers that the panels draw, in the units of their axes, as CSV: a row for each point of each series."""
    text = io.StringIO()
    writer = csv.DictWriter(text, TABLE_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for panel in panels:
        with mpl.rc_context(settings()):
            figure = Figure(figsize=panel.size)
            panel.draw(figure.add_subplot())
        for axes in (figure.axes[0], *figure.axes[0].child_axes):
            assert isinstance(axes, Axes)
            y_axis = next((text.get_text() for text in axes.texts if text.get_gid() == Y_AXIS), axes.get_ylabel())
            about = {"panel": panel.title, "x_axis": axes.get_xlabel(), "y_axis": y_axis}
            for row in _rows(axes):
                named = {key: _named(axes, key, value) for key, value in row.items()}
                writer.writerow(about | named)
    return text.getvalue()


def _rows(axes: Axes) -> Iterator[dict[str, Any]]:
    """Of all artists with a label: points with their intervals, lines, histograms and bars."""
    within = set()
    for container in axes.containers:
        series = str(container.get_label())
        if isinstance(container, ErrorbarContainer):
            points, _, bars = container.lines
            within |= {points}
            sides = [side for side, has in (("x", container.has_xerr), ("y", container.has_yerr)) if has]
            ends = {
                side: np.array(bar.get_segments())[:, :, "xy".index(side)]
                for side, bar in zip(sides, bars, strict=True)
            }
            for index, (x, y) in enumerate(np.asarray(points.get_xydata())):
                bounds = {f"{side}_{end}": of[index, i] for side, of in ends.items() for i, end in enumerate(ENDS)}
                yield {"series": series, "x": x, "y": y, **bounds}
        elif isinstance(container, BarContainer):
            for bar in container.patches:
                low = bar.get_x()
                yield {"series": series, "x_low": low, "x_high": low + bar.get_width(), "y": bar.get_height()}
    for line in axes.lines:
        if line not in within and _has_name(line):
            for x, y in np.asarray(line.get_xydata()):
                yield {"series": line.get_label(), "x": x, "y": y}
    for patch in axes.patches:
        if isinstance(patch, patches.StepPatch) and _has_name(patch):
            values, edges, _ = patch.get_data()
            for index, value in enumerate(values):
                yield {"series": patch.get_label(), "x_low": edges[index], "x_high": edges[index + 1], "y": value}


def _has_name(artist: Artist) -> bool:
    """Whether its label was given; Matplotlib's own begin with an underscore."""
    label = str(artist.get_label())
    return bool(label) and not label.startswith("_")


def _named(axes: Axes, key: str, value: Any) -> Any:
    """A place on an axis whose ticks have names, such as procedures or the N of a logarithm, by its name."""
    if key == "series":
        return value
    axis = axes.xaxis if key.startswith("x") else axes.yaxis
    formatter = axis.get_major_formatter()
    name = formatter(float(value)) if isinstance(formatter, ticker.FuncFormatter) else ""
    return name or f"{value:.6g}"
