"""How the reward that is trained on and the gold reward grow with the distance from the reference."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import lines
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from ctrl_jax.report.axes import above
from ctrl_jax.report.overoptimization import BestOf, Gains, Method
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import edge, light

LOOKS = {"proxy": ("policy", "o", "reward trained on"), "gold": ("gold", "D", "gold reward")}
TICKS = (0.1, 0.5, 1, 2, 4, 8, 16, 32, 64)
"""KLs that the axis names, nats."""


def panels(found: Sequence[Method]) -> list[Panel]:
    """A panel for each method, and one for each reward of best-of-n of the references by it, all on the same axes."""
    if not found:
        return []
    everything: list[Gains | BestOf] = [seed for method in found for seed in method.seeds]
    references: dict[str, dict[int, BestOf]] = {}
    for method in found:
        of_reward = references.setdefault(method.reward, {})
        of_reward |= {seed.seed: seed.best_of for seed in method.seeds}
    everything += [one for seeds in references.values() for one in seeds.values()]
    ends = (
        1.03 * max(float(np.sqrt(one.kl.max())) for one in everything),
        min(float(gain.min()) for one in everything for gain in one.gains.values()),
        max(float(gain.max()) for one in everything for gain in one.gains.values()),
    )
    return [
        *(
            Panel(
                method.name,
                f"Mean reward less the reference's against √KL: the policies of {method.name}, by the reward that they "
                "were trained on and by gold, with Gao et al.'s law fitted to each seed.",
                functools.partial(_draw, method, ends),
            )
            for method in found
        ),
        *(
            Panel(
                f"best-of-n{f' by {reward}' if reward else ''}",
                "Mean reward of best-of-n of the reference by the reward less that of one sample, against √KL: by that "
                "reward and by gold, for each seed.",
                functools.partial(_draw_best_of, seeds, ends),
            )
            for reward, seeds in references.items()
        ),
    ]


def _draw(method: Method, ends: tuple[float, float, float], axes: Axes) -> None:
    for judge, (color, marker, text) in LOOKS.items():
        for seed in method.seeds:
            name = f"{text}, seed {seed.seed}"
            axes.plot(
                np.sqrt(seed.kl), seed.gains[judge], marker, color=light(color), markersize=4.5, **edge(), zorder=4,
                label=name,
            )  # fmt: skip
            distance = np.linspace(0.01, seed.kl[-1] ** 0.5, 120)
            gain = seed.law(judge).gain(distance**2)
            axes.plot(distance, gain, color=light(color), linewidth=1.3, alpha=0.8, zorder=3, label=f"law of {name}")
    _finish(axes, ends)


def _draw_best_of(references: Mapping[int, BestOf], ends: tuple[float, float, float], axes: Axes) -> None:
    for judge, (color, marker, text) in LOOKS.items():
        for seed, one in references.items():
            axes.plot(
                np.sqrt(one.kl), one.gains[judge], f"{marker}-", color=light(color), markersize=4.5, linewidth=1.3,
                **edge(), zorder=4, label=f"{text}, seed {seed}",
            )  # fmt: skip
    _finish(axes, ends)


def _finish(axes: Axes, ends: tuple[float, float, float]) -> None:
    right, low, high = ends
    room = 0.06 * (high - low)
    axes.axhline(0, color=light("muted"), linewidth=0.8, zorder=1)
    axes.set_xlim(0, right)
    axes.set_ylim(low - room, high + room)
    named = [kl for kl in TICKS if kl**0.5 <= right]
    axes.xaxis.set_major_locator(FixedLocator([0, *np.sqrt(named)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda distance, _: f"{distance**2:.4g}"))
    axes.set_xlabel("KL, nats per response (on a scale of its root)")
    above(axes, "mean reward less the reference's")
    handles = [
        lines.Line2D([], [], color=light(color), marker=marker, **edge(), markersize=5, linewidth=1.3, label=text)
        for color, marker, text in LOOKS.values()
    ]
    axes.legend(handles=handles, loc="upper left", handlelength=1.8)
