"""By how much the reward prefers the chosen responses of held-out pairs."""

import functools

import numpy as np
from matplotlib.axes import Axes

from ctrl_jax.evaluation import MARGINS_ARRAY
from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light

BINS = 30


def panels(run: Run) -> list[Panel]:
    """How the margins of held-out pairs are spread: those below 0 are ranked the other way than their labels."""
    if MARGINS_ARRAY not in run.arrays:
        return []
    margins = run.arrays[MARGINS_ARRAY]
    correlation = run.evaluation.reward_model.length_correlation
    follows = "" if correlation is None else f"; rank correlation with length {correlation:.2f}"
    return [
        Panel(
            "Margins of held-out pairs",
            f"Raw reward of the chosen response less the rejected one's, median {np.median(margins):.3g}{follows}.",
            functools.partial(_draw, margins),
        )
    ]


def _draw(margins: np.ndarray, axes: Axes) -> None:
    widest = float(np.abs(margins).max()) or 1.0
    edges = np.linspace(-widest, widest, BINS + 1)  # an edge at 0, where right and wrong part
    counts = np.histogram(margins, edges)[0]
    middle = (edges[:-1] + edges[1:]) / 2
    for label, color, side in (
        ("ranked as labelled", "policy", middle > 0),
        ("the other way", "reference", middle < 0),
    ):
        axes.bar(middle[side], counts[side], width=0.9 * (edges[1] - edges[0]), color=light(color), label=label)
    axes.axvline(0, color=light("rule"), linewidth=1.2, zorder=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", handlelength=1.2)
    axes.set_xlabel("raw reward, chosen less rejected")
    above(axes, "pairs")
