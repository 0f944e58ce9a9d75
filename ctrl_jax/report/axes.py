"""What panels have in common on an Axes: labels, error bars and marks. Win rates are drawn in percent."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.style import edge, light

ENDS = ("low", "high")
Y_AXIS = "y axis"
"""Marks the text that stands above a panel in place of its vertical axis's label."""


def above(axes: Axes, text: str) -> None:
    """What the vertical axis shows, said level, above it: it reads without a turned head."""
    axes.annotate(
        text,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        color=light("muted"),
        fontsize=8.5,
        gid=Y_AXIS,
    )


def legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, borderpad=0.1, handletextpad=0.3)


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, pushed apart where they would overlap."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    gap = 10.5 / 72 * figure.dpi / axes.get_window_extent().height * (top - bottom)
    heights = [height for height, _, _ in labels]
    order = np.argsort(heights)
    placed = np.array(heights)[order]
    for _ in range(50):
        for lower in range(len(placed) - 1):
            overlap = gap - (placed[lower + 1] - placed[lower])
            if overlap > 0:
                placed[lower] -= overlap / 2
                placed[lower + 1] += overlap / 2
    for height, index in zip(placed, order, strict=True):
        _, text, color = labels[index]
        axes.annotate(
            text, (1, height), xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points",
            color=light("muted" if color == "reference" else color), fontsize=8.5, va="center", annotation_clip=False,
            fontweight="bold" if text == "policy" else "normal",
        )  # fmt: skip


def distances(estimates: Sequence[Estimate]) -> np.ndarray:
    """Percent below and above the means, as Matplotlib's error bars want them."""
    low, high = np.array([estimate.bounds for estimate in estimates]).T
    means = np.array([estimate.mean for estimate in estimates])
    return 100 * np.maximum([means - low, high - means], 0)


def cross(
    axes: Axes, kl: Estimate, win_rate: Estimate, color: str, marker: str, *, label: str, size: float = 5.0
) -> None:
    """A point with its intervals in both directions; larger marks stand behind smaller ones."""
    low, high = kl.bounds
    axes.errorbar(
        [kl.mean], [100 * win_rate.mean], xerr=[[max(kl.mean - low, 0)], [max(high - kl.mean, 0)]],
        yerr=distances([win_rate]), fmt=marker, markersize=size, elinewidth=1.4, capsize=2.5, color=light(color),
        **edge(), zorder=6 - size / 100, label=label,
    )  # fmt: skip


def nested_sizes(axes: Axes, places: Sequence[tuple[float, float]]) -> list[float]:
    """Sizes of marks at places in data units: those that would cover each other are nested, the first the largest."""
    low, high = axes.get_xlim(), axes.get_ylim()
    unit = np.array([low[1] - low[0], high[1] - high[0]])
    near = 0.03
    sizes = []
    for index, place in enumerate(places):
        behind = sum(
            bool(np.hypot(*((np.array(place) - other) / unit)) < near) for other in places[index + 1 :]
        )  # fmt: skip
        sizes.append(5.0 + 4.0 * behind)
    return sizes


def floor(percents: Sequence[float]) -> float:
    """Where an axis of win rates starts: at 50 %, or a little below the lowest of them."""
    lowest = min(percents)
    return 50.0 if lowest >= 50 else max(0.0, lowest - 1.5)
