import dataclasses

import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import validation
from tests.report.drawing import drawn


def test_the_curves_are_those_of_the_validations_and_the_step_that_is_used_is_marked(run: Run) -> None:
    [panel] = validation.panels(run)
    lines = {line.get_label(): line.get_xydata() for line in drawn(panel).lines}
    for name, column in (("pairs it learns from", "training_loss"), ("validation pairs", "loss")):
        expected = np.stack([run.arrays["validation_step"], run.arrays[f"validation_{column}"]], axis=1)
        np.testing.assert_array_equal(lines[name], expected)
    assert any(np.all(np.asarray(points)[:, 0] == 40) for points in lines.values())


def test_without_a_validation_there_is_no_panel(run: Run) -> None:
    training = run.evaluation.reward_training
    assert training is not None
    evaluation = dataclasses.replace(run.evaluation, reward_training=training._replace(used_step=None))
    assert validation.panels(dataclasses.replace(run, evaluation=evaluation)) == []
