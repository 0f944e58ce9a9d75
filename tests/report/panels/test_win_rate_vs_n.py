import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import win_rate_vs_n
from tests.report.drawing import drawn, marks


def test_win_rates_are_drawn_where_they_were_measured(run: Run) -> None:
    best, _ = win_rate_vs_n.panels(run)
    expected = [
        (np.log2(n), 100 * run.evaluation.win_rates[name].mean)
        for n, name in ((1, "sampling"), (2, "best_of_2"), (4, "best_of_4"))
    ]
    np.testing.assert_allclose(marks(drawn(best)), expected)
