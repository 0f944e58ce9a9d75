import numpy as np
import pytest

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import frontier, judges, lengths, reliability, training, win_rate_vs_n
from tests.report.drawing import rows


def test_a_table_has_the_numbers_of_the_files(run: Run) -> None:
    measured = run.evaluation.win_rates
    of_policy = {row["x"]: row for row in rows(win_rate_vs_n.panels(run)[:1]) if row["series"] == "policy"}
    for n, name in (("1", "sampling"), ("2", "best_of_2"), ("4", "best_of_4")):
        numbers = [float(of_policy[n][column]) for column in ("y", "y_low", "y_high")]
        assert numbers == pytest.approx([100 * value for value in measured[name]], rel=1e-5)
        assert of_policy[n]["y_axis"] == "win rate against the reference, %"
    [point] = [row for row in rows(frontier.panels(run)) if row["series"] == "policy"]
    kl = run.evaluation.kl
    assert [float(point[f"x{end}"]) for end in ("", "_low", "_high")] == pytest.approx(list(kl), rel=1e-5)
    curve = [float(row["y"]) for row in rows(training.panels(run)[:1]) if row["series"] == "every step"]
    np.testing.assert_allclose(curve, run.metrics["kl"], rtol=1e-5)
    dumbbells = rows(judges.panels(run)[:1])
    assert {row["y"] for row in dumbbells} == {"sampling", "best-of-2", "best-of-4", "worst-of-4"}
    assert {row["series"] for row in dumbbells} == {"training reward", "gold", "second_opinion"}
    bars = [row for row in rows(lengths.panels(run)) if row["series"] == "policy"]
    assert sum(float(row["y"]) for row in bars) == pytest.approx(100, rel=1e-4)
    assert {"observed", "pairs"} == {row["series"] for row in rows(reliability.panels(run))}
