"""The gradient's variance by formulas is that over all pairs of responses, one after the other."""

import itertools

import numpy as np
import pytest

from benchmarks import baselines
from ctrl_jax.theory import transforms


@pytest.fixture
def policy():
    phi = transforms.normalized(transforms.parse("exponential(2)"))
    prompt = baselines.draw(np.random.default_rng(1), phi, references=32)
    return baselines.terms(baselines.tilted(prompt.reference, prompt.rewards, 0.3), prompt, beta=0.2)


def moments(values, weights):
    """(mean, total variance) of vectors."""
    mean = np.sum(weights[:, None] * values, axis=0)
    return mean, float(weights @ (values**2).sum(-1) - mean @ mean)


def test_the_law_is_one(policy):
    assert len(policy.law) == 15
    assert policy.law.sum() == pytest.approx(1)
    assert np.abs(policy.law @ policy.scores).max() < 1e-12


def test_leave_one_out_of_two_is_the_variance_over_all_pairs(policy):
    def estimate(i, j):
        advantage = policy.rewards[i] - policy.rewards[j]
        return (advantage * (policy.scores[i] - policy.scores[j]) + policy.kl_part[i] + policy.kl_part[j]) / 2

    pairs = list(itertools.product(range(15), repeat=2))
    weights = np.array([policy.law[i] * policy.law[j] for i, j in pairs])
    mean, variance = moments(np.array([estimate(*pair) for pair in pairs]), weights)
    np.testing.assert_allclose(mean, policy.gradient, atol=1e-12)
    assert policy.leave_one_out(2) == pytest.approx(2 * variance)


def test_no_baseline_moves_the_gradient(policy):
    for baseline in (0.0, 3.0):
        each = (policy.rewards - baseline)[:, None] * policy.scores + policy.kl_part
        mean, variance = moments(each, policy.law)
        np.testing.assert_allclose(mean, policy.gradient, atol=1e-12)
        assert policy.variance(baseline) == pytest.approx(variance)
    mean = policy.law @ policy.rewards
    assert policy.leave_one_out(10**9) == pytest.approx(policy.variance(mean))
