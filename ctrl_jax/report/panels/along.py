"""Runs along their trainings, in the plane of win rate against KL: where they meet, they can be compared."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

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


class Drawn(NamedTuple):
    """A run's curve with its band, which is the same in every picture of it."""

    transform: str
    curve: Curve
    kls: np.ndarray
    """[K] nats per response, ascending."""
    band: np.ndarray
    """[3, K] the curve, and the ends of its interval, in percent."""


def panels(runs: Mapping[str, Run], procedure: str) -> list[Panel]:
    """The curves of the runs that were trained for a procedure, by their names, with bands, over the ideal curves of
    their transforms; none without curves."""
    found: dict[str, Drawn] = {}
    with double_precision():
        for name, run in runs.items():
            measured = curve(run, procedure) if run.procedure == procedure else None
            ends = None if measured is None else comparison.kl_range(measured)
            if measured is not None and ends is not None:
                found[name] = Drawn(run.transform, measured, *_band(measured, ends))
    if not found:
        return []
    return [
        Panel(
            f"Win rate under {spoken(procedure)} along the training",
            f"{len(found)} runs, measured on test prompts at several steps of their trainings, with 95 % bands.",
            functools.partial(_draw, found, procedure),
        )
    ]


def _draw(curves: Mapping[str, Drawn], procedure: str, axes: Axes) -> None:
    look = looks(list(dict.fromkeys(one.transform for one in curves.values())))
    kls = ideals.kl_grid(1.06 * max(one.kls[-1] for one in curves.values()))
    for transform in dict.fromkeys([*look, "optimal"]):
        if transform == "raw":
            continue
        color, dashes = ("ink", (0, (1, 1.6))) if transform == "optimal" else (look[transform][0], (0, (5, 2)))
        text = "best possible" if transform == "optimal" else f"ideal {transform}"
        ideal = 100 * ideals.win_rates(transform, procedure, kls)
        axes.plot(kls, ideal, color=light(color), linewidth=1.2, linestyle=dashes, alpha=0.75, zorder=2, label=text)
    lowest = [_draw_run(axes, name, one, *look[one.transform]) for name, one in curves.items()]
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


def _draw_run(axes: Axes, name: str, one: Drawn, color: str, marker: str) -> float:
    """Draws a curve with its band and the points that it goes through, the final policy's larger.

    Returns the lowest place of all, in percent.
    """
    places, (mean, low, high) = one.kls, one.band
    axes.fill_between(places, low, high, color=light(color), alpha=0.18, linewidth=0, zorder=3)
    for end, text in ((low, "low"), (high, "high")):
        axes.plot(places, end, color=light(color), linewidth=0.5, alpha=0.4, zorder=3, label=f"{name}, {text}")
    axes.plot(places, mean, color=light(color), linewidth=1.8, zorder=4, label=name)
    points = np.asarray(one.curve.kl).mean(axis=1), 100 * np.asarray(one.curve.win_rate).mean(axis=1)
    axes.plot(*points, marker, color=light(color), markersize=4, **edge(), zorder=5, label=f"{name}, measured")
    last = [places[-1:] for places in points]
    axes.plot(*last, marker, color=light(color), markersize=8, **edge(), zorder=5, label=f"{name}, trained")
    return float(min(points[1].min(), np.nanmin(low) if np.isfinite(low).any() else np.inf))


def _band(found: Curve, ends: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """KLs [K] from the first to the last measured, and the curve with its interval there, in percent, [3, K]."""
    places = np.concatenate([np.asarray(found.kl).mean(axis=1), np.linspace(*ends, PLACES)])
    places = np.unique(np.clip(places, *ends))
    return places, 100 * np.array([comparison.at_kl(found, float(kl), jax.random.key(0)) for kl in places]).T
