"""What `judge` and `choose-n` found, over N."""

import functools
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.axes import above, distances, label_ends
from ctrl_jax.report.choice import Choice
from ctrl_jax.report.judgement import Judgement
from ctrl_jax.report.names import percent, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.risk import Risk
from ctrl_jax.report.style import edge, light


def of_judgement(found: Judgement) -> list[Panel]:
    """Win rates of best-of-N and of worst-of-N, where either was asked for."""
    return [panel for family in ("best_of", "worst_of") for panel in _of_family(found, family)]


def of_choice(found: Choice) -> list[Panel]:
    """What best-of-N wins against one response of the reference, and the risk of n responses."""
    lines = {"reward": found.win_rates, "judge": found.judge_win_rates}
    first = (found.judge_win_rates or found.win_rates)[1].mean
    shown = f"The win rate of best-of-N, from {percent(first)} at N = 1; N = {found.cheapest} is enough."
    draw = functools.partial(
        _draw_win_rates, lines, marked=found.cheapest, samples="N responses of the policy, one of the reference",
        stopped=[(one.draws.mean, one.deciding.mean) for one in found.early_stops],
    )  # fmt: skip
    risk = found.risk
    return [
        Panel("Best-of-N against one response", shown, draw),
        Panel(
            "One bad response among N",
            f"The risk that one of N responses is among the reference's lowest {100 * risk.share:.1f} %.",
            functools.partial(_draw_risk, risk),
        ),
    ]


def _of_family(found: Judgement, family: str) -> list[Panel]:
    lines = {"reward": _by_n(found.win_rates, family), "judge": _by_n(found.judge_win_rates, family)}
    if max(lines["reward"], default=1) == 1:
        return []
    largest = max(lines["reward"])
    shown = f"Win rate over N, up to {percent(lines['reward'][largest].mean)} at N = {largest}."
    draw = functools.partial(_draw_win_rates, lines, marked=None, samples="N responses a prompt, on both sides")
    return [Panel(f"{spoken(family).capitalize()}-N decoding", shown, draw)]


def _by_n(win_rates: Mapping[str, Estimate], family: str) -> dict[int, Estimate]:
    sizes = {name: re.fullmatch(rf"{family}_(\d+)|sampling", name) for name in win_rates}
    return dict(sorted((int(size[1] or 1), win_rates[name]) for name, size in sizes.items() if size))


def _draw_win_rates(
    lines: Mapping[str, Mapping[int, Estimate]],
    axes: Axes,
    *,
    marked: int | None,
    samples: str,
    stopped: Sequence[tuple[float, float]] = (),
) -> None:
    """`stopped` are (responses in the mean, win rate) where drawing stops early."""
    labels = []
    for (name, by_n), color, shape in zip(lines.items(), ("policy", "gold"), ("o-", "s--"), strict=True):
        if not by_n:
            continue
        estimates = [*by_n.values()]
        axes.errorbar(
            [*by_n], [100 * one.mean for one in estimates], yerr=distances(estimates), fmt=shape, markersize=4.5,
            linewidth=1.6, elinewidth=1.3, color=light(color), **edge(), zorder=4, label=name,
        )  # fmt: skip
        labels.append((100 * estimates[-1].mean, name, color))
    if stopped:
        draws, wins = zip(*sorted(stopped), strict=True)
        axes.plot(draws, [100 * one for one in wins], color=light("muted"), linestyle="dashed", linewidth=1.4, zorder=3)
        axes.annotate(
            "grey: stopping early, over the draws in the mean", (0.98, 0.3), xycoords="axes fraction", ha="right",
            color=light("muted"), fontsize=7.5,
        )  # fmt: skip
    if marked is not None:
        axes.axvline(marked, color=light("rule"), linewidth=8, zorder=0)
        axes.annotate(
            "enough", (marked, 0), xycoords=("data", "axes fraction"), xytext=(7, 4), textcoords="offset points",
            color=light("muted"), fontsize=8,
        )  # fmt: skip
    _over_n(axes, [*next(iter(lines.values()))], samples)
    above(axes, "win rate against the reference, %")
    label_ends(axes, labels)


def _draw_risk(risk: Risk, axes: Axes) -> None:
    filled, hollow = edge(), {"markerfacecolor": light("surface"), "markeredgecolor": light("policy")}
    for by_n, line, look in ((risk.counted, "-", filled), (risk.extrapolated, "none", hollow)):
        if by_n:
            estimates = [*by_n.values()]
            axes.errorbar(
                [*by_n], [100 * one.mean for one in estimates], yerr=distances(estimates), marker="o", linestyle=line,
                markersize=4.5, linewidth=1.6, elinewidth=1.3, color=light("policy"), zorder=4, **look,
            )  # fmt: skip
    sizes = [*risk.counted, *risk.extrapolated]
    of_reference = [100 * risk.of_reference(n) for n in sizes]
    axes.plot(sizes, of_reference, color=light("reference"), linestyle="dashed")
    last = [*risk.counted.values(), *risk.extrapolated.values()][-1]
    _over_n(axes, sizes, "N responses; hollow: extrapolated" if risk.extrapolated else "N responses")
    above(axes, f"one is among the reference's lowest {100 * risk.share:.1f} %, in %")
    label_ends(axes, [(100 * last.mean, "policy", "policy"), (of_reference[-1], "reference", "reference")])


def _over_n(axes: Axes, sizes: list[int], label: str) -> None:
    """A log scale of N, with a mark at each power of 2, or of 10 where they go far."""
    axes.set_xscale("log", base=2)
    far = max(sizes) > 256
    marks = [10**power for power in range(6)] if far else [2**power for power in range(9)]
    shown = [n for n in marks if min(sizes) <= n <= max(sizes)]
    axes.set_xticks(shown, [f"{n:,}" for n in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.margins(x=0.04)
