"""The figures of docs/theory.md: `make docs` draws them anew, into docs/theory/."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.pictures import draw
from ctrl_jax.report.style import light
from ctrl_jax.theory import ideal, procedures, transforms
from ctrl_jax.theory.precision import evaluate

FOLDER = Path(__file__).parent / "theory"
KL = 0.6
RANKS = np.linspace(0.0005, 0.9995, 600)
DASHED, DOTTED = (0, (5, 2)), (0, (1, 1.4))
FOR_BEST = {
    "identity": ("reference", "-"),
    "logarithm": ("green", DOTTED),
    "exponential(5)": ("sky", DASHED),
    "exponential(10)": ("policy", "-"),
    "optimal": ("ink", DOTTED),
}
FOR_WORST = {
    "identity": ("reference", "-"),
    "exponential(-5)": ("amber", DASHED),
    "exponential(-10)": ("gold", "-"),
    "optimal": ("ink", DOTTED),
}


def _lines(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray, str, object]], across: str, up: str) -> None:
    """Curves by their names: (across, up, colour, dashes) each."""
    for name, (x, y, color, dashes) in curves.items():
        axes.plot(x, y, color=light(color), linestyle=dashes, linewidth=1.6, label=name)
    axes.set_xlabel(across)
    above(axes, up)
    axes.legend(loc="best", handlelength=2.6)


def calibrated() -> list[Panel]:
    """exp(t Ĉ) of K references is too large in the mean: Ĉ is uniform on 0, 1/K, ..., 1 where C is on [0, 1]."""

    def bias(axes: Axes) -> None:
        sizes = np.array([4, 8, 16, 32, 64, 128, 256, 512])
        curves = {}
        for rate, color, dashes in ((5, "sky", DASHED), (10, "policy", "-")):
            means = np.array([np.exp(rate * np.arange(size + 1) / size).mean() for size in sizes])
            curves[f"exp({rate}u)"] = (sizes, 100 * (means * rate / math.expm1(rate) - 1), color, dashes)
        _lines(axes, curves, "reference responses a prompt, K", "mean of exp(t Ĉ) above that of exp(t C), %")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])

    def error(axes: Axes) -> None:
        curves = {
            f"K = {size}": (RANKS, np.sqrt(RANKS * (1 - RANKS) / size), color, dashes)
            for size, color, dashes in ((16, "reference", "-"), (32, "sky", DASHED), (128, "policy", "-"))
        }
        _lines(axes, curves, "calibrated reward, C", "standard error of Ĉ")

    return [
        Panel("What K references leave unknown", "Standard error of a calibrated reward by its value.", error),
        Panel("What a steep transform makes of it", "Bias of exp(t Ĉ), in percent, over K.", bias),
    ]


def densities() -> list[Panel]:
    def panel(looks: dict[str, tuple[str, object]], procedure: str) -> Panel:
        def draw_it(axes: Axes) -> None:
            curves = {
                name: (RANKS, _ideal(name, procedure).density(RANKS), color, dashes)
                for name, (color, dashes) in looks.items()
            }
            axes.axhline(1, color=light("rule"), linewidth=1.2, zorder=1)
            _lines(axes, curves, "calibrated reward, u", "density p(u)")
            axes.set_ylim(0, 7)

        title = f"Ideal policies for {procedures.parse(procedure).name.replace('_', '-')}"
        return Panel(title, f"Densities of ranks at {KL} nats; the reference's is 1.", draw_it)

    return [panel(FOR_BEST, "best_of_4"), panel(FOR_WORST, "worst_of_4")]


def betas() -> list[Panel]:
    def draw_it(axes: Axes) -> None:
        kls = np.linspace(0.05, 2, 40)
        curves = {}
        for name, (color, dashes) in FOR_BEST.items():
            if name != "optimal":
                phi = transforms.parse(name)
                curves[name] = (kls, np.array([ideal.at_kl(phi, kl).beta for kl in kls]), color, dashes)
        _lines(axes, curves, "KL, nats per response", "β of the ideal policy, in units of Φ")
        axes.set_yscale("log")
        axes.set_ylim(0.05, 3e6)
        axes.set_yticks(10.0 ** np.arange(-1, 5))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.legend(loc="upper left", ncols=2, handlelength=2.6)

    return [Panel("β has no scale in common", "β over the KL, on a logarithmic scale.", draw_it)]


def chosen() -> list[Panel]:
    def draw_it(axes: Axes) -> None:
        looks = {
            "sampling": ("reference", "-"), "best_of_4": ("policy", "-"), "soft_best_of_4(0.5)": ("sky", DASHED),
            "best_of_poisson(4)": ("green", DOTTED), "worst_of_4": ("gold", "-"),
        }  # fmt: skip
        curves = {}
        for name, (color, dashes) in looks.items():
            cdf = np.asarray(procedures.parse(name).rank_cdf(RANKS))
            curves[name] = (RANKS, np.gradient(cdf, RANKS), color, dashes)
        _lines(axes, curves, "rank of what is picked, u", "density, of the reference's responses")

    def weights(axes: Axes) -> None:
        places = np.arange(1, 17)
        curves = {
            name: (places, procedures.parse(name).order_weights(16), color, dashes)
            for name, color, dashes in (("best_of_4", "policy", "-"), ("worst_of_4", "gold", "-"))
        }
        _lines(axes, curves, "place of a response among 16, ascending", "weight w in the estimate")

    return [
        Panel("What a procedure picks", "Density of the rank of the pick.", draw_it),
        Panel("What 16 responses say of a pick among 4", "Weights of the unbiased estimate.", weights),
    ]


def win_rates() -> list[Panel]:
    def panel(procedure: str, title: str, made_for: str) -> Panel:
        def draw_it(axes: Axes) -> None:
            kls = ideals.kl_grid(2.0)
            rule = procedures.parse(procedure)
            curves = {}
            for name, (color, dashes) in FOR_BEST.items():
                found = [_ideal(name, made_for, kl).win_rate(rule) if kl > 0 else 0.5 for kl in kls]
                curves[name] = (kls, 100 * np.array(found), color, dashes)
            _lines(axes, curves, "KL, nats per response", "win rate against the reference, %")
            axes.set_ylim(50, 100)

        return Panel(title, "Win rates of ideal policies over their KL.", draw_it)

    return [
        panel("best_of_4", "Both decoded with best-of-4", "best_of_4"),
        panel("sampling", "The same policies, one sample each", "best_of_4"),
    ]


def optimal() -> list[Panel]:
    def draw_it(axes: Axes) -> None:
        looks = {
            "sampling": ("reference", "-"), "best_of_2": ("sky", DASHED), "best_of_4": ("policy", "-"),
            "best_of_16": ("green", DOTTED), "worst_of_4": ("gold", "-"),
        }  # fmt: skip
        curves = {}
        for name, (color, dashes) in looks.items():
            kl = 0.3 if name == "worst_of_4" else KL
            values = evaluate(_ideal("optimal", name, kl).phi, RANKS)
            curves[name] = (RANKS, (values - values.min()) / (values.max() - values.min()), color, dashes)
        _lines(axes, curves, "calibrated reward, u", "Φ*(u), on [0, 1]")
        axes.set_ylim(0, 1.55)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.legend(loc="upper left", ncols=2, handlelength=2.6)

    return [Panel("The optimal transform of a procedure", f"Φ* at {KL} nats, worst-of-4 at 0.3.", draw_it)]


def pulls() -> list[Panel]:
    """(Φ(u) − the reference's mean of Φ) / β: what a response's log-probability is pulled by at the start."""

    def panel(looks: dict[str, tuple[str, object]], procedure: str) -> Panel:
        def draw_it(axes: Axes) -> None:
            curves = {}
            for name, (color, dashes) in looks.items():
                policy = _ideal(name, procedure)
                values = evaluate(policy.phi, RANKS)
                curves[name] = (RANKS, (values - values.mean()) / policy.beta, color, dashes)
            axes.axhline(0, color=light("rule"), linewidth=1.2, zorder=1)
            _lines(axes, curves, "calibrated reward, u", "A / β, nats")
            axes.set_ylim(-5, 5)

        title = f"What pulls, training for {procedure.replace('_', '-')}"
        return Panel(title, f"The advantage over β at the start, at the β of {KL} nats.", draw_it)

    return [panel(FOR_BEST, "best_of_4"), panel(FOR_WORST, "worst_of_4")]


def best_of_n() -> list[Panel]:
    sizes = 2 ** np.arange(0, 9)

    def distance(axes: Axes) -> None:
        kls = np.log(sizes) - (sizes - 1) / sizes
        _lines(axes, {"best-of-n": (sizes, kls, "policy", "-")}, "responses, n", "KL to the reference, nats")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])

    def won(axes: Axes) -> None:
        kls = np.log(sizes) - (sizes - 1) / sizes
        widest = np.linspace(0, kls[-1], 60)[1:]
        identity = np.array([_ideal("identity", "sampling", kl).win_rate(procedures.Sampling()) for kl in widest])
        curves = {
            "best-of-n of the reference": (kls, 100 * sizes / (sizes + 1), "policy", "-"),
            "ideal policy, one sample": (widest, 100 * identity, "reference", DASHED),
        }
        _lines(axes, curves, "KL, nats per response", "win rate against one response, %")

    return [
        Panel("How far best-of-n goes", "KL of the best of n responses of the reference.", distance),
        Panel("What it wins there", "Win rate of best-of-n, beside the best that any policy has at its KL.", won),
    ]


@functools.cache
def _ideal(transform: str, procedure: str, kl: float = KL) -> ideal.IdealPolicy:
    found = ideals.policy(transform, procedure, float(kl))
    assert found is not None
    return found.policy


FIGURES: dict[str, Callable[[], list[Panel]]] = {
    "calibrated": calibrated,
    "densities": densities,
    "betas": betas,
    "chosen": chosen,
    "win_rates": win_rates,
    "optimal": optimal,
    "best_of_n": best_of_n,
    "pulls": pulls,
}
"""The name of a figure's file to what makes its panels."""


def draw_all(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for name, panels in FIGURES.items():
        picture = draw(panels(), ["svg"], columns=2, ground=light("surface"))["svg"]
        (folder / f"{name}.svg").write_bytes(picture)


if __name__ == "__main__":
    draw_all()
