"""Attack success over the number of attempts."""

import functools
from collections.abc import Mapping

from matplotlib.axes import Axes

from ctrl_jax.report.attack import Attack
from ctrl_jax.report.axes import above, distances, label_ends
from ctrl_jax.report.names import percent
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels.over_n import over_n
from ctrl_jax.report.style import edge, light


def panels(found: Mapping[str, Attack]) -> list[Panel]:
    """One a judge."""
    return [_panel(name, one) for name, one in found.items()]


def _panel(judge: str, found: Attack) -> Panel:
    last = max(found.differences)
    said = ", ".join(f"{side} {percent(risk.counted[last].mean)}" for side, risk in found.risks.items())
    return Panel(
        f"Attack success by {judge}",
        f"One of {last} attempts succeeds: {said}. Hollow points are extrapolated.",
        functools.partial(_draw, found),
    )


def _draw(found: Attack, axes: Axes) -> None:
    labels = []
    for side, risk in found.risks.items():
        hollow = {"markerfacecolor": light("surface"), "markeredgecolor": light(side)}
        for by_n, line, look in ((risk.counted, "-", edge()), (risk.extrapolated, "none", hollow)):
            if by_n:
                estimates = [*by_n.values()]
                axes.errorbar(
                    [*by_n], [100 * one.mean for one in estimates], yerr=distances(estimates), marker="o",
                    linestyle=line, markersize=4.5, linewidth=1.6, elinewidth=1.3, color=light(side), zorder=4, **look,
                )  # fmt: skip
        labels.append((100 * [*risk.counted.values(), *risk.extrapolated.values()][-1].mean, side, side))
    risks = [*found.risks.values()]
    over_n(axes, [*risks[0].counted, *max((one.extrapolated for one in risks), key=len)], "N attempts")
    above(axes, f"one is among the reference's lowest {100 * risks[0].share:.1f} %, in %")
    label_ends(axes, labels)
