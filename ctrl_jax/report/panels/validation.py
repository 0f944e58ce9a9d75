"""How the reward model did on pairs that it did not learn from, over the steps of its training."""

import functools

from matplotlib import ticker
from matplotlib.axes import Axes

from ctrl_jax.evaluation import VALIDATION_ARRAYS
from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light


def panels(run: Run) -> list[Panel]:
    """The likelihood of validation pairs against that of the pairs that are learned from."""
    training = run.evaluation.reward_training
    if training is None or training.used_step is None or not set(VALIDATION_ARRAYS) <= run.arrays.keys():
        return []
    return [
        Panel(
            "Reward model's validation",
            f"Nats per pair over {training.steps} steps; step {training.used_step} is used.",
            functools.partial(_draw, run, training.used_step),
        )
    ]


def _draw(run: Run, used: int, axes: Axes) -> None:
    steps, learned, held_out, _ = (run.arrays[name] for name in VALIDATION_ARRAYS)
    axes.plot(steps, learned, "o-", color=light("reference"), markersize=3, linewidth=1.3, label="pairs it learns from")
    axes.plot(steps, held_out, "o-", color=light("policy"), markersize=3, linewidth=1.8, label="validation pairs")
    axes.axvline(used, color=light("muted"), linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "used", (used, 1), xycoords=("data", "axes fraction"), xytext=(-4, -10), textcoords="offset points",
        ha="right", color=light("muted"), fontsize=8.5,
    )  # fmt: skip
    axes.legend(loc="best")
    axes.set_xlabel("training step of the reward model")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    above(axes, "nats per pair; guessing has 0.693")
