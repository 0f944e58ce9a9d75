import dataclasses

import numpy as np

from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import judges
from tests.report.drawing import drawn, marks


def test_gold_ranks_match_counting_one_by_one(run: Run) -> None:
    random = np.random.default_rng(0)
    values, reference = random.integers(0, 5, (3, 4)).astype(float), random.integers(0, 5, (3, 6)).astype(float)

    def share(value: float, others: list[float]) -> float:
        return sum((value > other) + 0.5 * (value == other) for other in others) / len(others)

    ranks = judges._gold_ranks(dataclasses.replace(run, arrays={"policy_gold": values, "reference_gold": reference}))
    expected = [[share(value, list(row)) for value in own] for own, row in zip(values, reference, strict=True)]
    np.testing.assert_allclose(ranks["policy"], expected, rtol=1e-6)
    expected = [[share(row[i], [*row[:i], *row[i + 1 :]]) for i in range(6)] for row in reference]
    np.testing.assert_allclose(ranks["reference"], expected, rtol=1e-6)


def test_gold_and_proxy_are_drawn_side_by_side(run: Run) -> None:
    dumbbells, by_proxy = judges.panels(run)
    heights = {name: height for height, name in enumerate(["worst_of_4", "best_of_4", "best_of_2", "sampling"])}
    evaluation = run.evaluation
    expected = {
        (round(100 * table[name].mean, 6), heights[name])
        for table in (evaluation.win_rates, evaluation.gold_win_rates, evaluation.judge_win_rates)
        for name in heights
    }
    assert {(round(x, 6), y) for x, y in marks(drawn(dumbbells))} == expected
    # Ten bins a side; fewer where ties share one.
    assert 15 <= len(marks(drawn(by_proxy))) <= 20
