import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import margins
from tests.report.drawing import drawn


def test_every_pair_is_in_one_bar_on_its_side_of_0(run: Run) -> None:
    axes = drawn(margins.panels(run)[0])
    found = run.arrays["margins"]
    right, wrong = axes.containers
    assert sum(bar.get_height() for bar in right.patches) == np.sum(found >= 0)
    assert sum(bar.get_height() for bar in wrong.patches) == np.sum(found < 0)
    assert min(bar.get_x() for bar in right.patches) >= 0
    assert max(bar.get_x() + bar.get_width() for bar in wrong.patches) <= 0
