"""The risk of one bad response among n: counted by enumeration, extrapolated by laws that are known."""

import itertools

import numpy as np
import pytest
from scipy import special

from ctrl_jax.report import risk
from ctrl_jax.theory.precision import double_precision

ONE = 0.05
"""A share of which 19 references know the lowest alone: 1 / 20."""


def measured(values, sizes, references=None, share=ONE):
    """By default, of values among which those of 0 are bad: the lowest of the references is 0."""
    values = np.asarray(values, float)
    if references is None:
        references = np.tile(np.arange(19.0), (len(values), 1))
    with double_precision():
        return risk.measure(values, np.asarray(references, float), share, sizes)


def test_what_is_counted_is_the_mean_over_subsets():
    bad = np.random.default_rng(0).random((7, 6)) < 0.3
    bad[0], bad[1] = True, False
    found = measured(~bad, [1, 2, 3, 6])
    for n in (1, 2, 3, 6):
        subsets = [*itertools.combinations(range(6), n)]
        expected = np.mean([bad[:, list(subset)].any(axis=1) for subset in subsets])
        assert found.counted[n].mean == pytest.approx(expected, abs=1e-12)
    assert found.seen == bad.sum() and not found.extrapolated
    assert found.share == 1 / 20


@pytest.mark.parametrize(("share", "count", "lowest"), [(0.05, 64, 4), (0.25, 8, 2), (0.05, 8, 1), (0.3, 10, 3)])
def test_bad_are_those_that_fewer_than_the_share_of_references_are_below(share, count, lowest):
    random = np.random.default_rng(3)
    references, values = random.normal(0, 1, (6, count)), random.normal(0, 1, (6, 5))
    values[0, 0], values[1, 0] = np.sort(references[0])[lowest - 1], np.sort(references[1])[lowest]
    found = measured(values, [1], references, share)
    below = (references[:, None, :] < values[:, :, None]).sum(axis=-1)
    assert found.seen == (below < share * count).sum()
    assert found.share == pytest.approx(lowest / (count + 1))


def test_the_lowest_of_a_judge_of_two_values_are_bad():
    found = measured([[0, 1], [1, 1]], [1], [[0, 0, 1, 1], [0, 1, 1, 1]])
    assert found.seen == 1


def test_ties_at_the_threshold_are_seen():
    """A judge of two values, by which the reference is seldom bad: its lowest few are as good as the rest."""
    references = np.ones((5, 64))
    references[0, :3] = 0
    assert measured(np.ones((5, 4)), [1], references).is_tied
    random = np.random.default_rng(0)
    apart = measured(random.normal(size=(5, 4)), [1], random.normal(size=(5, 64)))
    assert not apart.is_tied and apart.own == 4 / 64 and apart.as_json()["own"] == 4 / 64


def test_the_references_own_risk_is_that_of_more_of_its_responses():
    random = np.random.default_rng(4)
    references, values = random.random((4000, 16)), random.random((4000, 24))
    found = measured(values, [1, 4, 24], references, 0.1)
    for n, one in found.counted.items():
        low, high = one.bounds
        assert low - 0.01 < found.of_reference(n) < high + 0.01
    assert found.of_reference(1) == pytest.approx(found.share) == pytest.approx(2 / 17)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 6.0), (1.0, 20.0), (3.0, 30.0)])
def test_a_beta_law_is_found_again(alpha, beta):
    """risk(n) = 1 − B(α, β + n) / B(α, β), of which 64 responses show the beginning."""
    random = np.random.default_rng(1)
    bad = random.random((1500, 64)) < random.beta(alpha, beta, (1500, 1))
    sizes = [100, 1000, 10_000]
    found = measured(~bad, sizes).extrapolated
    for n in sizes:
        expected = 1 - np.exp(special.betaln(alpha, beta + n) - special.betaln(alpha, beta))
        low, high = found[n].bounds
        # The interval is of 95 %: a little is left for what it misses, a tenth of the share that is never bad.
        assert low - 0.1 * (1 - expected) <= expected <= high + 0.1 * (1 - expected)
        assert high - low < 0.15


def test_prompts_that_are_alike_have_the_binomial_law():
    bad = np.random.default_rng(2).random((2000, 32)) < 0.01
    found = measured(~bad, [100, 300]).extrapolated
    share = bad.mean()
    for n, one in found.items():
        assert one.mean == pytest.approx(1 - (1 - share) ** n, abs=0.02)


def test_nothing_bad_says_nothing_of_more_responses():
    found = measured(np.ones((5, 4)), [1, 4, 100])
    assert found.seen == 0 and found.extrapolated == {} and found.counted[4].mean == 0


def test_one_response_a_prompt_says_nothing_of_more():
    found = measured([[0], [1], [1], [1], [1]], [1, 100])
    assert found.seen == 1 and found.extrapolated == {} and found.counted[1].mean == pytest.approx(0.2)


@pytest.mark.parametrize("count", [1, 8])
def test_prompts_that_do_not_differ_have_no_interval(count):
    found = measured(np.zeros((count, 4)), [1, 100])
    assert found.counted[1].mean == 1 and found.extrapolated[100].mean == pytest.approx(1, abs=1e-6)
    assert found.counted[1].low is None and found.extrapolated[100].low is None
