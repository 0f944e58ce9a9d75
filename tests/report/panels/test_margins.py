import dataclasses

import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import margins
from tests.report.drawing import drawn


def test_every_pair_is_in_one_bar_on_its_side_of_0(run: Run) -> None:
    found = np.float32([*run.arrays["margins"], 0, 0, 1e-9, -1e-9, 40, -70])
    changed = dataclasses.replace(run, arrays={**run.arrays, "margins": found})
    axes = drawn(margins.panels(changed)[0])
    right, wrong, equal = axes.containers
    heights = [sum(bar.get_height() for bar in bars.patches) for bars in (right, wrong, equal)]
    assert heights == [np.sum(found > 0), np.sum(found < 0), 2]
    assert min(bar.get_x() for bar in right.patches if bar.get_height()) >= 0
    assert max(bar.get_x() + bar.get_width() for bar in wrong.patches if bar.get_height()) <= 0
    assert axes.get_xlim()[1] < 10, "what is far away does not squeeze the rest"


def test_margins_of_0_alone_are_drawn(run: Run) -> None:
    changed = dataclasses.replace(run, arrays={**run.arrays, "margins": np.zeros(5)})
    assert drawn(margins.panels(changed)[0]).containers[-1].patches[0].get_height() == 5
