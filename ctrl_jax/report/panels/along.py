"""Runs along their trainings, in the plane of win rate against KL: where they meet, they can be compared."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from matplotlib import lines
from matplotlib.axes import Axes

from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above, floor
from ctrl_jax.report.comparison import curve
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import edge, light, looks
from ctrl_jax.steps import comparison
from ctrl_jax.steps.comparison import Curve
from ctrl_jax.theory.precision import double_precision

PLACES = 13
"""KLs at which a band is drawn, besides those that were measured."""


def panels(runs: Mapping[str, Run], procedure: str) -> list[Panel]:
    """The curves of runs by their names, with bands, over the ideal curves of their transforms; none without curves."""
    found: dict[str, tuple[str, Curve]] = {}
    with double_precision():
        for name, run in runs.items():
            measured = curve(run, procedure) if procedure in run.evaluation.win_rates else None
            if measured is not None and comparison.kl_range(measured) is not None:
                found[name] = run.transform, measured
    if not found:
        return []
    return [
        Panel(
            f"Win rate under {spoken(procedure)} along the training",
            f"{len(found)} runs, measured on test prompts at several steps of their trainings, with 95 % bands.",
            functools.partial(_draw, found, procedure),
        )
    ]


def _draw(curves: Mapping[str, tuple[str, Curve]], procedure: str, axes: Axes) -> None:
    look = looks(list(dict.fromkeys(transform for transform, _ in curves.values())))
    kls = ideals.kl_grid(1.06 * max(np.asarray(found.kl)[-1].mean() for _, found in curves.values()))
    for transform in dict.fromkeys([*look, "optimal"]):
        if transform == "raw":
            continue
        color, dashes = ("ink", (0, (1, 1.6))) if transform == "optimal" else (look[transform][0], (0, (5, 2)))
        text = "best possible" if transform == "optimal" else f"ideal {transform}"
        ideal = 100 * ideals.win_rates(transform, procedure, kls)
        axes.plot(kls, ideal, color=light(color), linewidth=1.2, linestyle=dashes, alpha=0.75, zorder=2, label=text)
    lowest = []
    for name, (transform, found) in curves.items():
        lowest.append(_draw_run(axes, name, found, *look[transform]))
    handles = [
        lines.Line2D([], [], color=light(color), marker=marker, **edge(), markersize=6, linewidth=1.8, label=transform)
        for transform, (color, marker) in look.items()
    ]
    for text, color, dashes in (("ideal policies", "muted", (0, (5, 2))), ("best possible", "ink", (0, (1, 1.6)))):
        handles.append(lines.Line2D([], [], color=light(color), linestyle=dashes, label=text))
    axes.legend(handles=handles, loc="lower right", handlelength=1.8)
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=floor(lowest))
    axes.set_xlabel("KL, nats per response")
    above(axes, "win rate against the reference, %")


def _draw_run(axes: Axes, name: str, found: Curve, color: str, marker: str) -> float:
    """Draws a curve with its band and the points that it goes through, the final policy's larger.

    Returns the lowest place of all, in percent.
    """
    places, (mean, low, high) = _band(found)
    axes.fill_between(places, low, high, color=light(color), alpha=0.18, linewidth=0, zorder=3)
    for end, text in ((low, "low"), (high, "high")):
        axes.plot(places, end, color=light(color), linewidth=0.5, alpha=0.4, zorder=3, label=f"{name}, {text}")
    axes.plot(places, mean, color=light(color), linewidth=1.8, zorder=4, label=name)
    points = np.asarray(found.kl).mean(axis=1), 100 * np.asarray(found.win_rate).mean(axis=1)
    axes.plot(*points, marker, color=light(color), markersize=4, **edge(), zorder=5, label=f"{name}, measured")
    last = [places[-1:] for places in points]
    axes.plot(*last, marker, color=light(color), markersize=8, **edge(), zorder=5, label=f"{name}, trained")
    return float(min(points[1].min(), np.nanmin(low) if np.isfinite(low).any() else np.inf))


def _band(found: Curve) -> tuple[np.ndarray, np.ndarray]:
    """KLs [K] from the first to the last measured, and the curve with its interval there, in percent, [3, K]."""
    with double_precision():
        means = np.asarray(found.kl).mean(axis=1)
        places = np.unique(np.concatenate([means, np.linspace(means[0], means[-1], PLACES)]))
        low, high = comparison.kl_range(found) or (means[0], means[-1])
        places = np.clip(places, low, high)
        return places, 100 * np.array([comparison.at_kl(found, float(kl), jax.random.key(0)) for kl in places]).T
