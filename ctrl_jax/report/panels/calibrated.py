"""Calibrated rewards of both sides under the ideal policy's density."""

import functools

import numpy as np
from matplotlib import lines, patches
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from ctrl_jax.report import ideals
from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.statistics import spread
from ctrl_jax.report.style import light


def panels(run: Run) -> list[Panel]:
    """Calibrated rewards of reference and policy, under the density of the ideal policy at the measured KL."""
    policy, reference = run.arrays["policy_calibrated"], run.arrays["reference_calibrated"]
    return [
        Panel(
            "Calibrated rewards",
            f"Density; mean {reference.mean():.3f} for the reference, {policy.mean():.3f} for the policy.",
            functools.partial(_draw, run),
        )
    ]


def _draw(run: Run, axes: Axes) -> None:
    edges = np.linspace(0, 1, 21)
    handles: list[Artist] = []
    for name, color, alpha in (("reference", "reference", 0.4), ("policy", "policy", 0.28)):
        calibrated = run.arrays[f"{name}_calibrated"]
        # The reference's are calibrated against the others of their prompt.
        references = run.arrays["reference_rewards"].shape[1] - (name == "reference")
        ranks = spread(calibrated, references=references)
        density, _ = np.histogram(ranks, edges, density=True)
        axes.stairs(density, edges, fill=True, color=light(color), alpha=alpha, linewidth=0)
        axes.stairs(density, edges, color=light(color), linewidth=1.3, label=name)
        handles.append(patches.Patch(facecolor=light(color), alpha=1.6 * alpha, label=name))
    kl = run.evaluation.kl.mean
    policy = ideals.policy(run.transform, run.procedure, kl)
    if policy is not None:
        # In the histogram's own bins: a density that doubles within a bin cannot be compared with one that is averaged.
        density = np.diff(np.asarray(policy.policy.cdf(edges), float)) / np.diff(edges)
        axes.stairs(
            density, edges, color=light("ink"), linewidth=1.4, linestyle=(0, (3, 1.5)), baseline=None,
            label=f"ideal {run.transform}",
        )  # fmt: skip
        handles.append(
            lines.Line2D(
                [],
                [],
                color=light("ink"),
                linewidth=1.4,
                linestyle=(0, (3, 1.5)),
                label=f"ideal {run.transform}\nat {kl:.2f} nats",
            )
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(handles=handles, loc="best", handlelength=1.6)
    axes.set_xlabel("calibrated reward: rank among the reference's rewards")
    above(axes, "density over test prompts")
