"""The theory alone: what policies trained with each transform win, if training were perfect. Needs no data."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.axes import Axes

from ctrl_jax.commands import figure
from ctrl_jax.config import expand_user
from ctrl_jax.errors import InputError
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light
from ctrl_jax.runtime import console
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Ideal, Objective, optimal, parse_transform, raw
from ctrl_jax.theory.procedures import Procedure, Sampling

# Each transform with its colour in the report's palette and its dashes: the two signs of a rate differ by both.
LOOKS = {
    "identity": ("reference", "solid"),
    "logarithm": ("green", (0, (1, 1.2))),
    "exponential(5)": ("sky", "solid"),
    "exponential(10)": ("policy", "solid"),
    "exponential(-5)": ("amber", (0, (5, 1.5))),
    "exponential(-10)": ("gold", (0, (5, 1.5))),
    "optimal": ("ink", (0, (3, 1.2, 1, 1.2))),
}
# Of the transforms that have none above, in turn.
OTHER_LOOKS = [
    (color, dashes) for dashes in ((0, (1, 1.5)), (0, (6, 2))) for color in ("sky", "gold", "green", "amber")
]


@dataclass(frozen=True)
class Options:
    procedure: str = "best_of_4"
    """How the policies are decoded: `sampling`, `best_of_N`, `worst_of_N`, `soft_best_of_N(temperature)`,
    `best_of_poisson(mean)`, or a mixture such as `0.5*best_of_2+0.5*best_of_8`."""
    kl: float = 1.0
    """KL to the reference of every policy in the table, in nats per response."""
    transforms: tuple[str, ...] = tuple(LOOKS)
    """The transforms Φ: a row of the table and a line of the figure each."""
    figure: Path | None = None
    """Where the figure of win rate over KL goes, as .png, .svg or .pdf; by default `runs/ideal_<procedure>.png`, and
    nowhere with --json."""
    json: bool = False
    """Print JSON for programs, and nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "figure")


def main(arguments: list[str]) -> int:
    return run(tyro.cli(Options, args=arguments, prog="python -m ctrl_jax ideal", description=__doc__))


def run(options: Options) -> int:
    """Prints the transforms' β and win rates at the KL, and draws their win rates over the KL.

    Raises:
      InputError: for an unknown procedure, transform or kind of figure, and for a KL that is not positive.
    """
    procedure = procedures.parse(options.procedure)
    figure.check(options.figure)
    objectives = _objectives(options.transforms, procedure, options.kl)
    ideals = {name: _ideal(objective) for name, objective in objectives.items()}
    path = options.figure
    if path is None and not options.json:
        path = Path("runs") / f"ideal_{re.sub(r'[^A-Za-z0-9_.-]+', '_', procedure.name)}.png"
    if path is not None:
        _draw(objectives, procedure, options.kl, path)
    if options.json:
        print(json.dumps(_as_json(ideals, procedure, options.kl), indent=2))
        return 0
    shown = _shown_procedures(procedure)
    console.table(
        f"Ideal policies at KL {options.kl:g} nats",
        ["Φ", "β", *(f"win rate, {one}" for one in shown)],
        [
            [
                name,
                "none" if ideal is None else f"{ideal.beta:.4g}{'' if ideal.beta_is_normalized else ' *'}",
                *("" if ideal is None else f"{ideal.win_rate(one):.4f}" for one in shown),
            ]
            for name, ideal in ideals.items()
        ],
    )
    console.say("β weighs the KL against Φ on the range [0, 1]; * against Φ itself, which is infinite at an end.")
    if None in ideals.values():
        console.say("None: Φ is too flat near its top for this KL, which would buy nothing.")
    console.say("What to choose by it: docs/choosing.md")
    console.say(f"Figure: {path}")
    return 0


def _objectives(names: Sequence[str], procedure: Procedure, kl: float) -> dict[str, Objective]:
    """By the names of their transforms.

    Raises:
      InputError: if there is no such transform, or theory knows no ideal policy of it.
    """
    transforms = [parse_transform(name) for name in names]
    if not transforms:
        raise InputError("`transforms` is empty; name at least one, such as identity.")
    if raw() in transforms:
        raise InputError("`transforms` has raw, which has no ideal: only transforms of ranks do. Leave it out.")
    return {str(transform): Objective(transform, procedure, kl) for transform in transforms}


def _ideal(objective: Objective, kl: float | None = None) -> Ideal | None:
    """The ideal policy of that KL, by default the budget; None where the optimal transform has none."""
    try:
        return objective.ideal(kl)
    except InputError:
        if objective.transform != optimal():
            raise
        return None


def _shown_procedures(procedure: Procedure) -> list[Procedure]:
    return list(dict.fromkeys([Sampling(), procedure]))


def _as_json(ideals: dict[str, Ideal | None], procedure: Procedure, kl: float) -> dict[str, object]:
    shown = [one.name for one in _shown_procedures(procedure)]
    return {
        "procedure": procedure.name,
        "kl": kl,
        "transforms": {
            name: {
                "beta": ideal and ideal.beta,
                "beta_of": "normalized" if ideal is None or ideal.beta_is_normalized else "itself",
                "win_rates": dict.fromkeys(shown) if ideal is None else ideal.win_rates,
            }
            for name, ideal in ideals.items()
        },
    }


def _draw(objectives: Mapping[str, Objective], procedure: Procedure, kl: float, path: Path) -> None:
    # A win rate rises as the square root of a small KL.
    kls = max(2.0, 1.5 * kl) * np.linspace(0, 1, 21) ** 2
    policies = {name: [_ideal(objective, value) for value in kls[1:]] for name, objective in objectives.items()}
    others = itertools.cycle(OTHER_LOOKS)
    looks = {name: LOOKS.get(name) or next(others) for name in objectives}

    def panel(decoded_by: Procedure) -> Panel:
        def draw(axes: Axes) -> None:
            for name, (color, dashes) in looks.items():
                curve = [0.5, *(math.nan if one is None else one.win_rate(decoded_by) for one in policies[name])]
                width = 2.0 if name == "optimal" else 1.4
                axes.plot(kls, 100 * np.array(curve), color=light(color), linestyle=dashes, linewidth=width, label=name)
            axes.axvline(kl, color=light("muted"), linewidth=0.8, zorder=1)
            axes.set_xlim(0, kls[-1])
            axes.set_ylim(50, 100)
            axes.set_xlabel("KL, nats per response")
            axes.set_ylabel("win rate against the reference, %")
            axes.legend(loc="lower right", handlelength=3.2)

        title = f"decoded by {spoken(decoded_by.name)}"
        return Panel(title, "win rate of ideal policies over their KL, a line for each transform", draw)

    panels = [panel(one) for one in reversed(_shown_procedures(procedure))]
    optimum = spoken(procedure.name)
    figure.write(path, panels, f"Ideal policies; optimal is the best under {optimum}")
