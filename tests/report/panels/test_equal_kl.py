"""The panel of methods at equal KL: its rows, its order and its numbers."""

import numpy as np
import pytest

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import svg
from ctrl_jax.report.comparison import Difference
from ctrl_jax.report.methods import AtEqualKl
from ctrl_jax.report.panel import PANEL_SIZE
from ctrl_jax.report.panels import equal_kl
from tests.report.drawing import drawn, rows


def one(method: str, kl: float, mean: float, procedure: str = "best_of_4") -> AtEqualKl:
    estimate = Estimate(mean, mean - 0.01, mean + 0.02)
    return AtEqualKl(method, "exponential(10)", procedure, kl, Difference(0.8 + mean, 0.8, estimate))


FOUND = [
    one("raw", 0.3, -0.04), one("raw", 0.6, -0.02),
    one("identity", 0.3, -0.05), one("identity", 0.6, -0.06),
    one("k-sample", 0.6, 0.003),
    one("raw", 0.3, 0.5, procedure="worst_of_4"),
]  # fmt: skip


def test_each_difference_is_drawn_in_points_with_its_interval_at_its_method():
    found = rows(equal_kl.panels(FOUND, "best_of_4"))
    here = [one for one in FOUND if one.procedure == "best_of_4"]
    assert {(row["y"], row["series"]) for row in found} == {(one.method, f"KL {one.kl:.3g}") for one in here}
    for expected in here:
        (row,) = [row for row in found if (row["y"], row["series"]) == (expected.method, f"KL {expected.kl:.3g}")]
        numbers = [float(row[name]) for name in ("x", "x_low", "x_high")]
        mean, low, high = expected.difference.difference
        np.testing.assert_allclose(numbers, [100 * mean, 100 * low, 100 * high], rtol=1e-5)
        assert row["x_axis"] == "points more than exponential(10)"


def test_the_best_is_on_top_and_no_two_marks_of_a_row_hide_each_other():
    (panel,) = equal_kl.panels(FOUND, "best_of_4")
    axes = drawn(panel)
    labels = [axes.yaxis.get_major_formatter()(place) for place in range(3)]
    assert labels == ["identity", "raw", "k-sample"]
    places = [tuple(xy) for container in axes.containers for xy in container[0].get_xydata()]
    assert len({y for _, y in places}) == 5
    assert all(abs(y - round(y)) < 0.3 for _, y in places)


@pytest.mark.parametrize("found", [[], FOUND[:2], FOUND[-1:]])
def test_of_fewer_than_two_methods_the_table_is_enough(found):
    assert equal_kl.panels(found, "best_of_4") == []


def test_it_grows_with_its_methods_on_the_page_too():
    many = [one(f"method {i}", 0.3, i / 100) for i in range(21)]
    (panel,) = equal_kl.panels(many, "best_of_4")
    (small,) = equal_kl.panels(FOUND, "best_of_4")
    assert panel.height > PANEL_SIZE[1] > small.height
    element = svg.element(panel, "equal-kl-0")
    assert f'viewBox="0 0 {72 * PANEL_SIZE[0]:.1f} {72 * panel.height:.2f}"'.replace(".40 ", ".4 ") in element
    assert all(f"method {i}<" in element for i in range(21))
