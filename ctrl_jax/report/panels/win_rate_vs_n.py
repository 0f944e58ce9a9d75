"""Win rates of best-of-N and worst-of-N over N."""

import functools
import re
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from ctrl_jax.report.axes import above, distances, label_ends
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import percent, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import edge, light


def panels(run: Run) -> list[Panel]:
    """Best-of-N and worst-of-N win rates over N, the ideal policies at the measured KL behind them."""
    return [*of_family(run, "best_of"), *of_family(run, "worst_of")]


def of_family(run: Run, family: str) -> list[Panel]:
    """The panel of best_of or worst_of; none where nothing but sampling was measured."""
    sizes = {1: "sampling"} | {
        int(name.removeprefix(f"{family}_")): name
        for name in run.evaluation.win_rates
        if re.fullmatch(rf"{family}_\d+", name)
    }
    if len(sizes) < 2:
        return []
    largest = sizes[max(sizes)]
    return [
        Panel(
            f"{spoken(family).capitalize()}-N decoding",
            f"Win rate over N, from {percent(run.evaluation.win_rates['sampling'].mean)} for one sample to "
            f"{percent(run.evaluation.win_rates[largest].mean)} at N = {max(sizes)}.",
            functools.partial(_draw, run, dict(sorted(sizes.items()))),
        )
    ]


def _draw(run: Run, sizes: Mapping[int, str], axes: Axes) -> None:
    where = np.log2(list(sizes))
    labels = []
    theory = (
        ("optimal", "best possible", "ink", (0, (1, 1.6))),
        ("transform", f"ideal {run.transform}", "policy", (0, (5, 2))),
        ("identity", "ideal identity", "reference", (0, (5, 2))),
    )
    for field, text, color, dashes in theory:
        if field == "transform" and run.transform in ("identity", "optimal"):
            continue
        heights = np.array(
            [
                np.nan if (known := run.evaluation.ideal.get(name)) is None or getattr(known, field) is None
                else 100 * getattr(known, field)
                for name in sizes.values()
            ]
        )  # fmt: skip
        if np.isfinite(heights).any():
            axes.plot(where, heights, color=light(color), linewidth=1.2, linestyle=dashes, zorder=2, label=text)
            labels.append((float(heights[np.isfinite(heights)][-1]), text, color))
    estimates = [run.evaluation.win_rates[name] for name in sizes.values()]
    axes.errorbar(
        where, [100 * e.mean for e in estimates], yerr=distances(estimates), fmt="o-", markersize=5.5, linewidth=1.8,
        elinewidth=1.4, color=light("policy"), **edge(), zorder=4, label="policy",
    )  # fmt: skip
    labels.append((100 * estimates[-1].mean, "policy", "policy"))
    if run.procedure in sizes.values():
        n = next(n for n, name in sizes.items() if name == run.procedure)
        axes.axvline(np.log2(n), color=light("rule"), linewidth=8, zorder=0)
        side = -1 if n == max(sizes) else 1
        axes.annotate(
            "trained for", (np.log2(n), 0), xycoords=("data", "axes fraction"), xytext=(7 * side, 4),
            textcoords="offset points", ha="right" if side < 0 else "left", color=light("muted"), fontsize=8,
        )  # fmt: skip
    axes.set_xticks(where, [str(n) for n in sizes])
    axes.set_xlabel("N responses a prompt, on both sides")
    axes.margins(x=0.04)
    above(axes, "win rate against the reference, %")
    label_ends(axes, labels)
