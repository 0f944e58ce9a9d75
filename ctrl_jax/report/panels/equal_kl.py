"""Methods of a sweep beside a baseline at equal KL: a row a method, the best on top."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import lines
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from ctrl_jax.report.axes import above
from ctrl_jax.report.methods import AtEqualKl
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light

LOOKS = (("sky", "o"), ("policy", "s"), ("ink", "D"), ("pink", "v"), ("amber", "P"))
"""Colour and mark of each KL, from the lowest."""
ROW = 0.19
"""Inches."""
BESIDES = 0.9
"""Inches above and below the rows."""


def panels(found: Sequence[AtEqualKl], procedure: str) -> list[Panel]:
    """One panel of the methods that are trained for a procedure, at every KL that they are compared at; none for fewer
    than two methods, of which the table is enough."""
    here = [one for one in found if one.procedure == procedure]
    methods = dict.fromkeys(one.method for one in here)
    if len(methods) < 2:
        return []
    baseline = here[0].baseline
    return [
        Panel(
            f"{spoken(procedure).capitalize()} at equal KL",
            f"{len(methods)} methods, each less {baseline} in percentage points, with paired 95 % intervals.",
            functools.partial(_draw, here),
            BESIDES + ROW * len(methods),
        )
    ]


def _draw(found: Sequence[AtEqualKl], axes: Axes) -> None:
    by_method: dict[str, list[float]] = {}
    for one in found:
        by_method.setdefault(one.method, []).append(one.difference.difference.mean)
    order = sorted(by_method, key=lambda name: float(np.mean(by_method[name])))
    kls = sorted({round(one.kl, 3) for one in found})
    handles = []
    for index, kl in enumerate(kls):
        color, mark = LOOKS[index % len(LOOKS)]
        here = [one for one in found if round(one.kl, 3) == kl]
        means = np.array([one.difference.difference.mean for one in here])
        ends = np.array([one.difference.difference.bounds for one in here])
        apart = 0.5 * ((index + 0.5) / len(kls) - 0.5)
        axes.errorbar(
            100 * means, [order.index(one.method) + apart for one in here],
            xerr=100 * np.maximum([means - ends[:, 0], ends[:, 1] - means], 0),
            fmt=mark, markersize=4, elinewidth=1.3, color=light(color), label=f"KL {kl:.3g}", zorder=4,
        )  # fmt: skip
        handles.append(
            lines.Line2D([], [], color=light(color), marker=mark, markersize=5, linestyle="none", label=f"KL {kl:.2f}")
        )
    axes.axvline(0, color=light("muted"), linewidth=1, zorder=2)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.yaxis.set_major_locator(FixedLocator(range(len(order))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda place, _: order[min(max(round(place), 0), len(order) - 1)]))
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel(f"points more than {found[0].baseline}")
    above(axes, "win rate, percentage points")
    axes.legend(handles=handles, loc="upper left", handletextpad=0.2)
