"""The risk of one bad response among n: counted by enumeration, extrapolated by laws that are known."""

import itertools

import numpy as np
import pytest
from scipy import special

from ctrl_jax.report import risk
from ctrl_jax.theory.precision import double_precision


def measured(bad, sizes, **options):
    with double_precision():
        return risk.measure(np.asarray(bad, bool), 0.05, sizes, **options)


def test_what_is_counted_is_the_mean_over_subsets():
    bad = np.random.default_rng(0).random((7, 6)) < 0.3
    bad[0], bad[1] = True, False
    found = measured(bad, [1, 2, 3, 6])
    for n in (1, 2, 3, 6):
        subsets = [*itertools.combinations(range(6), n)]
        expected = np.mean([bad[:, list(subset)].any(axis=1) for subset in subsets])
        assert found.counted[n].mean == pytest.approx(expected, abs=1e-12)
    assert found.seen == bad.sum() and not found.extrapolated


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 6.0), (1.0, 20.0), (3.0, 30.0)])
def test_a_beta_law_is_found_again(alpha, beta):
    """risk(n) = 1 − B(α, β + n) / B(α, β), of which 64 responses show the beginning."""
    random = np.random.default_rng(1)
    bad = random.random((1500, 64)) < random.beta(alpha, beta, (1500, 1))
    sizes = [100, 1000, 10_000]
    found = measured(bad, sizes).extrapolated
    for n in sizes:
        expected = 1 - np.exp(special.betaln(alpha, beta + n) - special.betaln(alpha, beta))
        low, high = found[n].bounds
        # The interval is of 95 %: a little is left for what it misses, a tenth of the share that is never bad.
        assert low - 0.1 * (1 - expected) <= expected <= high + 0.1 * (1 - expected)
        assert high - low < 0.15


def test_prompts_that_are_alike_have_the_binomial_law():
    bad = np.random.default_rng(2).random((2000, 32)) < 0.01
    found = measured(bad, [100, 300]).extrapolated
    share = bad.mean()
    for n, one in found.items():
        assert one.mean == pytest.approx(1 - (1 - share) ** n, abs=0.02)


def test_nothing_bad_says_nothing_of_more_responses():
    found = measured(np.zeros((5, 4)), [1, 4, 100])
    assert found.seen == 0 and found.extrapolated == {} and found.counted[4].mean == 0


def test_all_bad_is_certain():
    found = measured(np.ones((8, 4)), [1, 100])
    assert found.counted[1].mean == 1 and found.extrapolated[100].mean == pytest.approx(1, abs=1e-6)


def test_the_references_own_risk_follows_from_the_rank():
    assert measured(np.ones((5, 4)), [1]).of_reference(3) == pytest.approx(1 - 0.95**3)
