"""A sweep's points in the plane of win rate against KL."""

import functools
from collections.abc import Sequence

from matplotlib import lines
from matplotlib.axes import Axes

from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above, cross, nested_sizes
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.status import Status
from ctrl_jax.report.style import light, looks


def panels(points: Sequence[Status], procedure: str) -> list[Panel]:
    """A sweep's measured points with intervals in both directions, over the ideal curves of their transforms."""
    measured = [point for point in points if point.evaluation and procedure in point.evaluation.win_rates]
    if not measured:
        return []
    return [
        Panel(
            f"Win rate under {spoken(procedure)} against KL",
            f"{len(measured)} runs with 95 % intervals over the ideal curves of their transforms.",
            functools.partial(_draw, measured, procedure),
        )
    ]


def _draw(points: Sequence[Status], procedure: str, axes: Axes) -> None:
    evaluated = [(point, point.evaluation) for point in points if point.evaluation is not None]
    names = list(dict.fromkeys(point.transform for point in points))
    kls = ideals.kl_grid(1.06 * max(0.1, *(evaluation.kl.bounds[1] for _, evaluation in evaluated)))
    look = looks(names)
    shown = dict.fromkeys([*names, "identity", "optimal"])
    for name in shown:
        if name == "raw":
            continue
        color, dashes = (
            ("ink", (0, (1, 1.6))) if name == "optimal" else (look.get(name, ("reference", "o"))[0], "solid")
        )
        curve = 100 * ideals.win_rates(name, procedure, kls)
        text = "best possible" if name == "optimal" else f"ideal {name}"
        axes.plot(kls, curve, color=light(color), linewidth=1.2, linestyle=dashes, alpha=0.75, zorder=2, label=text)
    # From 10 points below the lowest run: on the whole range down to 50 the intervals are smaller than their marks.
    win_rates = [evaluation.win_rates[procedure] for _, evaluation in evaluated]
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=100 * min(win_rate.bounds[0] for win_rate in win_rates) - 10)
    sizes = nested_sizes(
        axes, [(run.kl.mean, 100 * win_rate.mean) for (_, run), win_rate in zip(evaluated, win_rates, strict=True)]
    )
    handles = []
    for name in names:
        color, marker = look[name]
        for (point, run), win_rate, size in zip(evaluated, win_rates, sizes, strict=True):
            if point.transform == name:
                cross(axes, run.kl, win_rate, color, marker, label=point.name, size=size)
        handles.append(
            lines.Line2D(
                [],
                [],
                color=light(color),
                marker=marker,
                markeredgecolor=light("surface"),
                markersize=6,
                linestyle="none" if name in ("raw", "optimal") else "solid",
                linewidth=1.2,
                label=name,
            )
        )
    handles.append(
        lines.Line2D([], [], color=light("ink"), linestyle=(0, (1, 1.6)), linewidth=1.2, label="best possible")
    )
    axes.set_xlabel("KL, nats per response")
    above(axes, "win rate against the reference, %")
    axes.legend(handles=handles, loc="lower right", handlelength=1.8)
