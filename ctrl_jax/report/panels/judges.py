"""The training reward against other judges of the same picks."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.axes import above, distances, legend_above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import procedure_order, short_name, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.statistics import binned
from ctrl_jax.report.style import edge, light
from ctrl_jax.steps import calibration


def panels(run: Run) -> list[Panel]:
    """The training reward against other judges: win rates by procedure, and gold rank by the reward's rank."""
    panels = []
    others = [name for name, *_ in _judges(run)[1:]]
    if others:
        panels.append(
            Panel(
                "Win rates of the same picks, by who judges",
                f"The training reward's picks, judged by itself and by {' and '.join(others)}, procedure by procedure.",
                functools.partial(_draw_dumbbells, run),
            )
        )
    if {"policy_gold", "reference_gold"} <= run.arrays.keys():
        panels.append(
            Panel(
                "Gold rank at each proxy rank",
                "Mean calibrated gold reward of responses binned by their calibrated reward, policy and reference.",
                functools.partial(_draw_gold_by_proxy, run),
            )
        )
    return panels


def _judges(run: Run) -> list[tuple[str, Mapping[str, Estimate], str, str, float]]:
    """(name, win rates, colour, mark, its size) of each judge; larger marks first, so that equal ones stay visible."""
    evaluation = run.evaluation
    judges = [
        ("training reward", evaluation.win_rates, "policy", "o", 8.0),
        ("gold", evaluation.gold_win_rates, "gold", "D", 5.0),
        (short_name(evaluation.judge), evaluation.judge_win_rates, "green", "^", 4.5),
    ]
    return [judge for judge in judges if judge[1]]


def _draw_dumbbells(run: Run, axes: Axes) -> None:
    judges = _judges(run)
    names = sorted(set.intersection(*(set(table) for _, table, *_ in judges)), key=procedure_order)
    heights = np.arange(len(names))[::-1]
    for text, source, color, marker, size in judges:
        estimates = [source[name] for name in names]
        means = np.array([100 * e.mean for e in estimates])
        axes.errorbar(
            means, heights, xerr=distances(estimates), fmt=marker, markersize=size, elinewidth=1.3,
            color=light(color), **edge(), label=text, zorder=3,
        )  # fmt: skip
    for height, name in zip(heights, names, strict=True):
        ends = [100 * table[name].mean for _, table, *_ in judges]
        axes.plot([min(ends), max(ends)], [height] * 2, color=light("rule"), linewidth=3, zorder=1)
    axes.axvline(50, color=light("muted"), linewidth=1)
    axes.set_yticks(heights, [spoken(name) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(light("ink" if name == run.procedure else "muted"))
        label.set_fontweight("bold" if name == run.procedure else "normal")
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("win rate against the reference, %")
    legend_above(axes)


def _draw_gold_by_proxy(run: Run, axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=light("muted"), linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    ranks = _gold_ranks(run)
    for name, color, marker in (("reference", "reference", "s"), ("policy", "policy", "o")):
        where, means, half = binned(run.arrays[f"{name}_calibrated"], ranks[name], bins=10)
        axes.errorbar(
            where, means, yerr=half, fmt=f"{marker}-", markersize=4.5, linewidth=1.4, elinewidth=1.2,
            color=light(color), **edge(), label=name, zorder=3,
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("calibrated reward, in ten bins of equal count")
    above(axes, "calibrated gold reward")
    axes.legend(loc="upper left")


def _gold_ranks(run: Run) -> dict[str, np.ndarray]:
    """Calibrated gold rewards [B, M] of each side; the reference's leave themselves out."""
    policy, reference = (jnp.asarray(run.arrays[f"{side}_gold"]) for side in ("policy", "reference"))
    ranks = {"policy": calibration.calibrate(policy, reference), "reference": calibration.leave_one_out(reference)}
    return {side: np.asarray(values, float) for side, values in ranks.items()}
