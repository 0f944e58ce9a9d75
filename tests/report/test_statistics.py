import numpy as np
import pytest

from ctrl_jax.report.statistics import binned, highest_mean, lift_share, smooth, spread


def test_lift_share_is_the_lift_over_one_half() -> None:
    assert lift_share(0.8, 0.9) == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
    assert lift_share(0.5, 0.9) == 0
    assert lift_share(0.8, None) is None
    assert lift_share(0.8, 0.5) is None


@pytest.mark.parametrize("bins", [7, 20])
def test_spread_ranks_of_a_uniform_policy_are_flat_in_any_bins(bins: int) -> None:
    edges = np.linspace(0, 1, bins + 1)
    # A uniform rank wins 0, ..., 63 of 63 comparisons equally often.
    levels = np.arange(64)[None, :] / 63
    density, _ = np.histogram(spread(levels, references=63), edges, density=True)
    np.testing.assert_allclose(density, 1, atol=0.02)


def test_binned_intervals_match_a_bootstrap_over_prompts() -> None:
    random = np.random.default_rng(1)
    where = random.uniform(size=(200, 8))
    # A level a prompt: responses of a prompt move together, so an interval over responses would be too narrow.
    values = where + random.normal(size=(200, 1)) + 0.1 * random.normal(size=(200, 8))
    middles, means, halves = binned(where, values, bins=4)
    edges = np.quantile(where, np.linspace(0, 1, 5))
    for index in range(4):
        inside = (where >= edges[index]) & (where < edges[index + 1] + (index == 3))
        assert middles[index] == pytest.approx(where[inside].mean())
        assert means[index] == pytest.approx(values[inside].mean())
        resampled = []
        for _ in range(800):
            rows = random.integers(0, 200, 200)
            resampled.append(values[rows][inside[rows]].mean())
        assert halves[index] == pytest.approx(1.96 * np.std(resampled), rel=0.15)


def test_binned_keeps_ties_together() -> None:
    where = np.array([[0.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0]])
    middles, means, _ = binned(where, where, bins=10)
    np.testing.assert_allclose(middles, means)
    assert set(middles) <= {0.0, 0.5, 1.0, 4 / 7, 3.5 / 7}


def test_smooth_is_a_centred_mean_that_skips_nan() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0, 8.0]), width=3), [1, 2, 5.5, 5.5])


def test_a_rising_curve_starts_where_its_first_step_is() -> None:
    rising = np.linspace(0, 1, 30)
    np.testing.assert_allclose(smooth(rising)[:20], rising[:20], atol=1e-12)


def test_the_highest_mean_is_of_values_in_a_row():
    values = np.array([np.nan, 1.0, 4.0, 1.0, 3.0, 3.0, 0.0])
    assert highest_mean(values, 2) == pytest.approx(3.0)
    assert highest_mean(values, 3) == pytest.approx(8 / 3)
    assert highest_mean(values, 9) == pytest.approx(2.0)
    assert highest_mean(np.array([np.nan]), 5) is None
    assert highest_mean(np.array([]), 5) is None
