import dataclasses

import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import frontier
from tests.report.drawing import drawn, marks, rows


def test_the_frontier_has_the_measured_point_and_both_its_intervals(run: Run) -> None:
    axes = drawn(frontier.panels(run)[0])
    kl, win_rate = run.evaluation.kl, run.evaluation.win_rates["best_of_4"]
    np.testing.assert_allclose(marks(axes), [(kl.mean, 100 * win_rate.mean)])
    horizontal, vertical = (bars.get_segments()[0] for bars in axes.containers[0][2])
    np.testing.assert_allclose(horizontal[:, 0], [kl.low, kl.high])
    np.testing.assert_allclose(vertical[:, 1], [100 * win_rate.low, 100 * win_rate.high])


def test_a_win_rate_below_one_half_is_on_the_axis(run: Run) -> None:
    low = run.evaluation.win_rates["best_of_4"]._replace(mean=0.412, low=0.38, high=0.44)
    evaluation = dataclasses.replace(run.evaluation, win_rates={**run.evaluation.win_rates, "best_of_4": low})
    axes = drawn(frontier.panels(dataclasses.replace(run, evaluation=evaluation))[0])
    assert axes.get_ylim()[0] < 38
    metrics = {**run.metrics, "win_rate": np.linspace(0.3, 0.6, len(run.metrics["step"]))}
    axes = drawn(frontier.panels(dataclasses.replace(run, metrics=metrics))[0])
    assert axes.get_ylim()[0] < 30
    above = {**run.metrics, "win_rate": np.maximum(run.metrics["win_rate"], 0.55)}
    axes = drawn(frontier.panels(dataclasses.replace(run, metrics=above))[0])
    assert axes.get_ylim()[0] == 50


def test_a_training_without_any_number_is_drawn_without_its_path(run: Run) -> None:
    nothing = np.full_like(run.metrics["step"], np.nan)
    bare = dataclasses.replace(run, metrics={**run.metrics, "kl": nothing})
    assert {row["series"] for row in rows(frontier.panels(bare))} >= {"policy", "best possible"}
