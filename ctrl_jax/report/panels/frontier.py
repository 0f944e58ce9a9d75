"""A run in the plane of win rate against KL."""

import functools

import numpy as np
from matplotlib.axes import Axes

from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above, cross, floor, label_ends
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import percent, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.statistics import smooth
from ctrl_jax.report.style import light


def panels(run: Run) -> list[Panel]:
    """The run in the plane of win rate against KL: its training path and its test point over the ideal curves."""
    return [
        Panel(
            f"Win rate under {spoken(run.procedure)} against KL",
            f"Measured on test prompts: {percent(run.evaluation.win_rates[run.procedure].mean)} at "
            f"{run.evaluation.kl.mean:.3f} nats per response.",
            functools.partial(_draw, run),
        )
    ]


def _draw(run: Run, axes: Axes) -> None:
    measured, kl = run.evaluation.win_rates[run.procedure], run.evaluation.kl
    path = _path(run)
    before = [(point.kl, point.win_rates[run.procedure]) for point in run.evaluation.along]
    widest = max(kl.bounds[1], run.evaluation.kl_budget or 0, 0.05, *path[0], *(one.bounds[1] for one, _ in before))
    kls = ideals.kl_grid(1.08 * widest)
    labels: list[tuple[float, str, str]] = []
    for transform, text, color, dashes in (
        ("optimal", "best possible", "ink", (0, (1, 1.6))),
        (run.transform, f"ideal {run.transform}", "policy", (0, (5, 2))),
        ("identity", "ideal identity", "reference", (0, (5, 2))),
    ):
        if (transform != "optimal" and text in {f"ideal {name}" for name in ("optimal", "raw")}) or any(
            text == label[1] for label in labels
        ):
            continue
        curve = 100 * ideals.win_rates(transform, run.procedure, kls)
        if np.isfinite(curve).sum() < 2:
            continue  # a function of the user's, which its name does not give
        axes.plot(kls, curve, color=light(color), linewidth=1.2, linestyle=dashes, zorder=2, label=text)
        labels.append((float(curve[np.isfinite(curve)][-1]), text, color))
    if path[0].size:
        axes.plot(*path, color=light("policy"), linewidth=1.2, alpha=0.55, zorder=3, label="training, moving mean")
    if run.evaluation.kl_budget is not None:
        axes.axvline(run.evaluation.kl_budget, color=light("rule"), linewidth=1.2, zorder=1)
        axes.annotate(
            "budget", (run.evaluation.kl_budget, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", color=light("muted"), fontsize=8, va="bottom", ha="right",
        )  # fmt: skip
    for point, (its_kl, its_win_rate) in zip(run.evaluation.along, before, strict=True):
        cross(axes, its_kl, its_win_rate, "sky", "o", label=f"policy after step {point.step}", size=3.5)
    cross(axes, kl, measured, "policy", "o", label="policy")
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=floor([100 * measured.bounds[0], *path[1], *(100 * one.bounds[0] for _, one in before)]))
    axes.set_xlabel("KL, nats per response")
    above(axes, "win rate against the reference, %")
    label_ends(axes, labels)


def _path(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(KL, win rate in percent) through training, where both are known; smoothed as the training's curves are."""
    if not {"kl", "win_rate"} <= run.metrics.keys():
        return np.empty(0), np.empty(0)
    path = np.stack([smooth(run.metrics["kl"]), 100 * smooth(run.metrics["win_rate"])])
    kl, win_rate = path[:, np.isfinite(path).all(axis=0)]
    return kl, win_rate
