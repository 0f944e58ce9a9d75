"""KL, win rate, rewards, β and response lengths over the steps of the policy's training."""

import functools

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from ctrl_jax.report.axes import ENDS, above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.statistics import smooth
from ctrl_jax.report.style import light


def panels(run: Run) -> list[Panel]:
    """KL against its budget, win rate, calibrated reward, β and response length over the steps of policy training."""
    if "step" not in run.metrics:
        return []
    budget = run.evaluation.kl_budget
    panels = [
        ("kl", "KL from the reference", "nats per response", 1.0, budget, "budget"),
        ("win_rate", f"Win rate under {spoken(run.procedure)}", "% against the reference", 100.0, None, ""),
        ("calibrated_reward", "Calibrated reward", "mean rank among the reference's rewards", 1.0, 0.5, "reference"),
        ("beta", "Weight of the KL, β", "against Φ on [0, 1]; log scale", 1.0, None, ""),
        ("response_length", "Response length", "tokens, mean over rollouts", 1.0, None, ""),
        ("unfinished", "Unfinished responses", "% without an end within the longest length", 100.0, None, ""),
    ]  # fmt: skip
    return [
        Panel(
            title,
            f"{unit} over {len(run.metrics['step'])} training steps, "
            f"ending at {_last(run.metrics[column]) * scale:.4g}.",
            functools.partial(_draw_curve, run, column, unit, scale, level, level_name),
        )
        for column, title, unit, scale, level, level_name in panels
        if np.isfinite(run.metrics.get(column, np.array([]))).any()
    ]


def _draw_curve(
    run: Run, column: str, unit: str, scale: float, level: float | None, level_name: str, axes: Axes
) -> None:
    steps, values = run.metrics["step"], run.metrics[column] * scale
    if column == "kl" and "kl_standard_error" in run.metrics:
        half = 1.96 * run.metrics["kl_standard_error"]
        axes.fill_between(steps, values - half, values + half, color=light("policy"), alpha=0.15, linewidth=0)
        for end, bound in zip(ENDS, (values - half, values + half), strict=True):
            axes.plot(steps, bound, linewidth=0, label=f"95 % interval, {end}")
    if column != "beta":
        axes.plot(steps, values, color=light("policy"), linewidth=0.8, alpha=0.4, label="every step")
        values = smooth(values)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    label = "every step" if column == "beta" else "moving mean"
    axes.plot(steps, values, color=light("policy"), linewidth=1.8, label=label)
    if level is not None:
        axes.axhline(level, color=light("muted"), linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate(
            f"{level_name}\n{level:g}", (1, level), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=light("muted"), fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.margins(x=0.01)
    if column == "kl":
        axes.set_ylim(bottom=0)
    above(axes, unit)


def _last(values: np.ndarray) -> float:
    """The last that is a number."""
    return float(values[np.isfinite(values)][-1])
