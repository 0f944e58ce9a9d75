"""Decoders by what they cost: tokens drawn for a response, and what it wins."""

import functools
from collections.abc import Sequence

from matplotlib.axes import Axes

from ctrl_jax.report.axes import above, distances, label_ends
from ctrl_jax.report.decoders import SIDES, Decoding
from ctrl_jax.report.names import percent, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import edge, light


def panels(found: Sequence[Decoding]) -> list[Panel]:
    """Against one plain response of the reference, so that policy and reference are on one scale, and decoded alike."""
    highest = max(found, key=lambda one: one.against_one["policy"].mean)
    shown = (
        f"The policy beats one response of the reference up to {percent(highest.against_one['policy'].mean)} of the "
        f"time, under {spoken(highest.name)}."
    )
    return [Panel("Win rate against tokens spent", shown, functools.partial(_draw, found))]


MARKS = ("D", "s", "^", "v", "P", "X")
"""Of searches, in turn; procedures are points on a line."""


def _draw(found: Sequence[Decoding], axes: Axes) -> None:
    procedures = sorted((one for one in found if not one.is_search), key=lambda one: one.tokens["policy"])
    searches = [one for one in found if one.is_search]
    labels = []
    for side in SIDES:
        if procedures:
            _points(axes, procedures, side, "o-")
        labels.append((100 * (procedures or searches)[-1].against_one[side].mean, side, side))
        for place, one in enumerate(searches):
            _points(axes, [one], side, MARKS[place % len(MARKS)])
    for one in procedures:
        axes.annotate(
            spoken(one.name), (one.tokens["policy"], 100 * one.against_one["policy"].mean), xytext=(-5, 6),
            textcoords="offset points", ha="right", color=light("muted"), fontsize=7,
        )  # fmt: skip
    for place, one in enumerate(searches):
        axes.plot([], [], MARKS[place % len(MARKS)], color=light("muted"), markersize=5, label=spoken(one.name))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens drawn for a response")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.margins(x=0.14, y=0.1)
    above(axes, "beats one response of the reference, %")
    label_ends(axes, labels)
    if searches:
        axes.legend(loc="lower right", fontsize=7)


def _points(axes: Axes, those: Sequence[Decoding], side: str, look: str) -> None:
    estimates = [one.against_one[side] for one in those]
    axes.errorbar(
        [one.tokens[side] for one in those], [100 * one.mean for one in estimates], yerr=distances(estimates),
        fmt=look, markersize=5, linewidth=1.6, elinewidth=1.3, color=light(side), zorder=4, **edge(),
    )  # fmt: skip
