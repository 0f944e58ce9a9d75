"""By how much the reward prefers the chosen responses of held-out pairs."""

import functools

import numpy as np
from matplotlib.axes import Axes

from ctrl_jax.evaluation import MARGINS_ARRAY
from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light

BINS = 15
"""On either side of 0."""


def panels(run: Run) -> list[Panel]:
    """How the margins of held-out pairs are spread: those below 0 are ranked the other way than their labels."""
    if MARGINS_ARRAY not in run.arrays:
        return []
    margins = run.arrays[MARGINS_ARRAY]
    return [
        Panel(
            "Margins of held-out pairs",
            f"Raw reward of the chosen response less the rejected one's, median {np.median(margins):.3g}; the "
            "outermost bars have all beyond them.",
            functools.partial(_draw, margins),
        )
    ]


def _draw(margins: np.ndarray, axes: Axes) -> None:
    # A few far away would squeeze the rest into one bar.
    widest = float(np.quantile(np.abs(margins), 0.99)) or float(np.abs(margins).max()) or 1.0
    edges, width = widest * np.arange(-BINS, BINS + 1) / BINS, widest / BINS  # 0 itself is an edge
    shown = np.clip(margins, -widest, widest)
    sides = {"ranked as labelled": ("policy", margins > 0), "the other way": ("reference", margins < 0)}
    for label, (color, kept) in sides.items():
        counts, _ = np.histogram(shown[kept], edges)
        axes.bar(edges[:-1] + width / 2, counts, width=0.9 * width, color=light(color), label=label)
    if ties := int(np.sum(margins == 0)):
        axes.bar([0.0], [ties], width=0.3 * width, color=light("amber"), label="equal")
    axes.axvline(0, color=light("rule"), linewidth=1.2, zorder=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", handlelength=1.2)
    axes.set_xlabel("raw reward, chosen less rejected")
    above(axes, "pairs")
