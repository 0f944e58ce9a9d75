"""Short names of what theory/ has."""

import math

import numpy as np
import pytest

import ctrl_jax as cj


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (cj.sampling(), "sampling"),
        (cj.best_of(4), "best_of_4"),
        (cj.worst_of(4), "worst_of_4"),
        (cj.soft_best_of(4, 0.5), "soft_best_of_4(0.5)"),
        (cj.best_of_poisson(2), "best_of_poisson(2)"),
        (cj.mixture((0.25, cj.best_of(2)), (0.75, cj.best_of(8))), "0.25*best_of_2+0.75*best_of_8"),
    ],
)
def test_procedures_by_function_and_by_name(made, name):
    assert made.name == name and cj.procedure(name) == made
    assert isinstance(made, cj.Procedure)


def test_transforms_by_name():
    assert cj.transform("exponential(10)") == cj.exponential(10)
    assert cj.transform("optimal") == cj.optimal() and cj.transform("raw") == cj.raw()


def test_the_ideal_policy_of_log_ranks_is_best_of_n():
    """log u at β = 1 / (n − 1) tilts the ranks to n u^{n−1}: KL log n − (n − 1)/n (InfAlign, section 3)."""
    policy = cj.ideal_policy(cj.logarithm(), beta=1 / 3)
    assert policy.kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)
    np.testing.assert_allclose(policy.cdf(np.array([0.5, 0.9])), [0.5**4, 0.9**4], atol=1e-6)
    # The best of 4 beats one sample 4 times in 5.
    assert policy.win_rate(cj.sampling()) == pytest.approx(0.8, abs=1e-6)
    assert cj.ideal_policy(cj.logarithm(), kl=policy.kl).beta == pytest.approx(1 / 3, rel=1e-4)


def test_an_objective_of_any_function():
    objective = cj.Objective(lambda u: u**3, cj.best_of(4), kl_budget=0.6)
    ideal = objective.ideal()
    assert ideal.kl == pytest.approx(0.6, abs=1e-6)
    assert cj.Objective(cj.identity(), cj.best_of(4), 0.6).ideal().win_rates["best_of_4"] < ideal.win_rates["best_of_4"]
    assert ideal.win_rates["best_of_4"] < cj.Objective(cj.optimal(), cj.best_of(4), 0.6).ideal().win_rates["best_of_4"]
