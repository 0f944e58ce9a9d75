import dataclasses

import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import training


def test_training_panels_leave_out_columns_without_numbers(run: Run) -> None:
    metrics = dict(run.metrics) | {"beta": np.full_like(run.metrics["step"], np.nan)}
    del metrics["calibrated_reward"]
    titles = [panel.title for panel in training.panels(dataclasses.replace(run, metrics=metrics))]
    assert titles == [
        "KL from the reference", "Win rate under best-of-4", "Response length", "Unfinished responses",
    ]  # fmt: skip
