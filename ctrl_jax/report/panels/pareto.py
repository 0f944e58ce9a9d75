"""A sweep's points in the plane of win rate against KL."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import lines
from matplotlib.axes import Axes

from ctrl_jax.evaluation import Evaluation
from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above, cross, floor, nested_sizes
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.status import Status
from ctrl_jax.report.style import light, looks


def title(procedure: str) -> str:
    return f"Win rate under {spoken(procedure)} against KL"


def panels(points: Sequence[Status], procedure: str) -> list[Panel]:
    """A sweep's measured points with intervals in both directions, over the ideal curves of their transforms."""
    measured = [point for point in points if point.evaluation and procedure in point.evaluation.win_rates]
    if not measured:
        return []
    methods = dict.fromkeys(point.method for point in measured)
    if len(set(looks(list(methods)).values())) < len(methods):  # colours and marks do not tell them apart
        return [
            Panel(
                method,
                f"{title(procedure)}: its runs with 95 % intervals, beside CTRL's.",
                functools.partial(_draw_one, method, measured, procedure),
            )
            for method in methods
        ]
    return [
        Panel(
            title(procedure),
            f"{len(measured)} runs with 95 % intervals over the ideal curves of their transforms.",
            functools.partial(_draw, measured, procedure),
        )
    ]


def _draw(points: Sequence[Status], procedure: str, axes: Axes) -> None:
    evaluated = [(point, point.evaluation) for point in points if point.evaluation is not None]
    names = list(dict.fromkeys(point.method for point in points))
    kls = ideals.kl_grid(1.06 * max(0.1, *(evaluation.kl.bounds[1] for _, evaluation in evaluated)))
    look = looks(names)
    # The first method with a transform gives the ideal curve its colour: "identity with a critic", say.
    colors = {point.transform: look[point.method][0] for point in reversed(points)}
    for name in dict.fromkeys([*colors, "identity", "optimal"]):
        _draw_ideal(axes, name, procedure, kls, colors.get(name, "reference"))
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
            if point.method == name:
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


def _draw_one(method: str, points: Sequence[Status], procedure: str, axes: Axes) -> None:
    """A method's runs beside those of CTRL, all methods' panels on the same axes."""
    runs: dict[str, list[Evaluation]] = {}
    for point in points:
        if point.evaluation is not None:
            runs.setdefault(point.method, []).append(point.evaluation)
    transforms = [name for name in runs if name in {point.transform for point in points}]
    far = max(0.1, *(run.kl.bounds[1] for found in runs.values() for run in found))
    kls = ideals.kl_grid(1.06 * far)
    _draw_ideal(axes, "optimal", procedure, kls, "ink")
    handles = [lines.Line2D([], [], color=light("ink"), linestyle=(0, (1, 1.6)), linewidth=1.2, label="best possible")]
    look = looks(list(dict.fromkeys([*transforms, method])))
    for name, (color, marker) in look.items():
        found = sorted(runs[name], key=lambda run: run.kl.mean)
        where = [run.kl.mean for run in found], [100 * run.win_rates[procedure].mean for run in found]
        axes.plot(*where, color=light(color), linewidth=1.6 if name == method else 0.9, zorder=3)
        for run in found if name == method else ():
            cross(axes, run.kl, run.win_rates[procedure], color, marker, label=name)
        handle = lines.Line2D([], [], color=light(color), linewidth=1.2, label=name, markeredgecolor=light("surface"))
        handle.set_marker(marker if name == method else "")
        handles.append(handle)
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(
        floor([100 * run.win_rates[procedure].bounds[0] for found in runs.values() for run in found]),
        min(100.0, 100 * float(ideals.win_rates("optimal", procedure, kls)[-1]) + 2),
    )
    axes.set_xlabel("KL, nats per response")
    above(axes, "win rate against the reference, %")
    axes.legend(handles=handles, loc="lower right", handlelength=1.8)


def _draw_ideal(axes: Axes, name: str, procedure: str, kls: np.ndarray, color: str) -> None:
    """The curve of a transform's ideal policies; of raw rewards there is none."""
    if name == "raw":
        return
    best = name == "optimal"
    axes.plot(
        kls, 100 * ideals.win_rates(name, procedure, kls), color=light("ink" if best else color), linewidth=1.2,
        linestyle=(0, (1, 1.6)) if best else "solid", alpha=0.75, zorder=2,
        label="best possible" if best else f"ideal {name}",
    )  # fmt: skip
