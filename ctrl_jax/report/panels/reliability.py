"""How well the reward model's probabilities of preferences come true."""

import functools
import math

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from ctrl_jax.evaluation import RELIABILITY_ARRAYS
from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import edge, light
from ctrl_jax.steps.preference import wilson


def panels(run: Run) -> list[Panel]:
    """How often the reward model's preferred response is the chosen one, by how sure the model is."""
    quality = run.evaluation.reward_model
    if quality.accuracy is None or quality.ece is None or not set(RELIABILITY_ARRAYS) <= run.arrays.keys():
        return []
    return [
        Panel(
            "Reward model's reliability",
            f"Observed against predicted preference; accuracy {quality.accuracy:.3f}, "
            f"expected calibration error {quality.ece:.3f}.",
            functools.partial(_draw, run),
        )
    ]


def _draw(run: Run, axes: Axes) -> None:
    predicted, observed, count = (run.arrays[f"reliability_{name}"] for name in ("predicted", "observed", "count"))
    # Each pair counts in both orders, so that the diagram is its own image about (½, ½): half of it says all.
    kept = (count > 0) & np.isfinite(predicted) & np.isfinite(observed) & (predicted >= 0.5)
    predicted, observed, count = predicted[kept], observed[kept], count[kept]
    low, high = wilson(observed, count)
    axes.plot([0.5, 1], [0.5, 1], color=light("muted"), linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "as sure as right", (0.72, 0.72), xytext=(-8, 6), textcoords="offset points", ha="right",
        color=light("muted"), fontsize=8,
    )  # fmt: skip
    axes.errorbar(
        predicted, observed, yerr=[np.maximum(observed - low, 0), np.maximum(high - observed, 0)], fmt="o-",
        markersize=4.5, linewidth=1.4, elinewidth=1.2, color=light("policy"), **edge(), label="observed",
    )  # fmt: skip
    lowest = float(low.min()) if low.size else 0.5
    axes.set_xlim(0.5, 1.005)
    axes.set_ylim(min(0.5, math.floor(10 * lowest) / 10), 1.01)
    axes.yaxis.set_major_locator(ticker.MultipleLocator(0.1))
    axes.tick_params(labelbottom=False)
    above(axes, "share in which it is preferred, with 95 % intervals")
    counts = axes.inset_axes((0, -0.34, 1, 0.24), sharex=axes)
    left = np.minimum(np.floor(predicted * 10), 9) / 10
    counts.bar(left + 0.05, count, width=0.08, color=light("reference"), label="pairs")
    counts.patch.set_alpha(0)
    counts.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    counts.set_xlabel("predicted probability that a response is preferred")
    counts.set_ylabel("pairs", fontsize=8, color=light("muted"))
    counts.grid(False)
