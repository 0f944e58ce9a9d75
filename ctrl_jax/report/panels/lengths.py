"""How long the responses are."""

import functools

import numpy as np
from matplotlib import patches
from matplotlib.axes import Axes

from ctrl_jax.report.axes import above
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import light


def panels(run: Run) -> list[Panel]:
    """How long the responses to test prompts are, policy and reference."""
    if not {"policy_lengths", "reference_lengths"} <= run.arrays.keys():
        return []
    policy, reference = (run.arrays[f"{side}_lengths"].mean() for side in ("policy", "reference"))
    return [
        Panel(
            "Response length",
            f"Share of responses by their tokens; mean {policy:.1f} for the policy, {reference:.1f} for the reference.",
            functools.partial(_draw, run),
        )
    ]


def _draw(run: Run, axes: Axes) -> None:
    longest = int(max(run.arrays[f"{side}_lengths"].max() for side in ("policy", "reference")))
    width = -(-longest // 40)
    edges = np.arange(0.5, longest + width + 0.5, width)
    handles = []
    for name, color, alpha in (("reference", "reference", 0.4), ("policy", "policy", 0.28)):
        tokens = run.arrays[f"{name}_lengths"]
        shares = 100 * np.histogram(tokens, edges)[0] / tokens.size
        axes.stairs(shares, edges, fill=True, color=light(color), alpha=alpha, linewidth=0)
        axes.stairs(shares, edges, color=light(color), linewidth=1.3, label=name)
        handles.append(patches.Patch(facecolor=light(color), alpha=1.6 * alpha, label=name))
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(handles=handles, loc="best", handlelength=1.6)
    axes.set_xlabel("tokens of a response")
    above(axes, "share of responses, %")
