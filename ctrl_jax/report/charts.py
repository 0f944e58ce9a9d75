"""The charts of a run's report, by name, and the headline."""

from collections.abc import Callable, Mapping

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels import (
    calibrated,
    frontier,
    judges,
    lengths,
    margins,
    reliability,
    training,
    validation,
    win_rate_vs_n,
)

CHARTS: Mapping[str, Callable[[Run], list[Panel]]] = {
    "win_rate_vs_kl": frontier.panels,
    "win_rate_vs_n": win_rate_vs_n.panels,
    "training": training.panels,
    "calibration": calibrated.panels,
    "reliability": reliability.panels,
    "margins": margins.panels,
    "validation": validation.panels,
    "proxy_gold": judges.panels,
    "response_length": lengths.panels,
}
"""The name of a chart's files to the function that makes its panels: none where the run lacks their numbers."""


def headline(run: Run) -> list[Panel]:
    """The three panels that summarise the run."""
    family = "worst_of" if run.procedure.startswith("worst_of") else "best_of"
    return [*frontier.panels(run), *win_rate_vs_n.of_family(run, family), *calibrated.panels(run)]
