"""An objective's Φ, its β, what it refuses, and its ideal policy."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, objective, transforms
from ctrl_jax.theory.objective import Objective, optimal, raw
from ctrl_jax.theory.procedures import BestOfN, Sampling, WorstOfN

RANKS = np.linspace(0, 1, 11)


def named(transform: str, kl_budget: float = 0.75, procedure: str = "best_of_4") -> Objective:
    return Objective.parse(transform, procedure, kl_budget)


def phi(transform: str, num_references: int = 128):
    """Φ alone: the raw rewards are no numbers, so that it cannot depend on them."""
    return lambda u: named(transform).transformed(num_references)(jnp.full_like(u, jnp.nan), u)


@pytest.mark.parametrize("name", ["identity", "logarithm", "logit", "exponential(10)", "exponential(-10)", "optimal"])
def test_every_transform_has_the_range_0_to_1(name):
    values = np.asarray(phi(name)(jnp.asarray(RANKS)))
    assert values[[0, -1]] == pytest.approx([0, 1], abs=1e-6)
    # Nothing is lost by it: Φ* is flat where no policy of the budget goes.
    assert (np.diff(values) >= 0).all()
    assert len(np.unique(values)) > 3


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("identity", lambda u: u),
        ("exponential(10)", lambda u: np.expm1(10 * u) / np.expm1(10)),
        ("exponential(-10)", lambda u: np.expm1(-10 * u) / np.expm1(-10)),
        # Half a reference response before an infinite end: u = 1/256 is 0, and for the logit 1 − 1/256 is 1.
        ("logarithm", lambda u: 1 - np.log(np.maximum(u, 1 / 256)) / np.log(1 / 256)),
        ("logit", lambda u: 0.5 + np.arctanh(2 * np.clip(u, 1 / 256, 255 / 256) - 1) / np.log(255)),
    ],
)
def test_transforms_are_their_formulas(name, formula):
    np.testing.assert_allclose(phi(name)(jnp.asarray(RANKS)), formula(RANKS), rtol=1e-4, atol=1e-6)


def test_a_function_of_ones_own_is_a_transform():
    found = Objective(lambda u: 3 * u**2 - 1, BestOfN(4), 0.6).transformed(128)(None, jnp.asarray(RANKS))
    np.testing.assert_allclose(found, RANKS**2, atol=1e-6)


def test_raw_rewards_stay_as_they_are():
    rewards = jnp.array([[3.0, -1e6]])
    np.testing.assert_array_equal(named("raw").transformed(128)(rewards, jnp.full((1, 2), jnp.nan)), rewards)


def test_the_optimal_transform_is_the_procedures_at_the_budget():
    best, worst = (Objective(optimal(), one, 0.75).transformed(128)(None, RANKS) for one in (BestOfN(4), WorstOfN(4)))
    # Best-of-N asks for the highest ranks, worst-of-N for the absence of the lowest.
    assert best[5] < 0.2 and worst[5] > 0.8
    assert np.abs(best - Objective(optimal(), BestOfN(4), 0.1).transformed(128)(None, RANKS)).max() > 0.01


@pytest.mark.parametrize("budget", [0.1, 0.75, 2.0])
def test_beta_of_raw_rewards_hits_the_budget(budget):
    rewards = np.random.default_rng(0).normal(size=(5, 32)) * np.array([[0.5], [1], [2], [3], [4]])
    beta = named("raw", budget).beta(32, jnp.asarray(rewards, jnp.float32))
    weights = np.exp(rewards / beta - (rewards / beta).max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    kl = np.sum(weights * np.log(np.maximum(32 * weights, 1e-300)), axis=1)
    assert kl.mean() == pytest.approx(budget, rel=1e-3)


def test_beta_of_a_reward_of_two_levels():
    """Half the responses pass: with σ(1 / β) = p the tilted law passes, and has KL log 2 − H(p), so at most log 2."""
    rewards = jnp.tile(jnp.array([0.0, 1.0]), (3, 16))
    p = 1 / (1 + np.exp(-1 / named("raw", 0.5).beta(32, rewards)))
    assert np.log(2) + p * np.log(p) + (1 - p) * np.log1p(-p) == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(InputError, match=r"0.75 nats.* 16 share the highest reward.* up to 0.693"):
        named("raw", 0.75).beta(32, rewards)


def test_beta_of_ranks_is_the_ideal_policys():
    """Φ = u tilts the uniform law to the density b exp(bu)/(exp(b) − 1), b = 1/β: KL = b E[u] − log((e^b − 1)/b)."""
    b = 1 / named("identity", 0.5).beta(128, None)
    mean = 1 / (1 - np.exp(-b)) - 1 / b
    assert b * mean - np.log(np.expm1(b) / b) == pytest.approx(0.5, abs=1e-4)


def test_beta_of_many_prompts_is_read_from_some(monkeypatch):
    rewards = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    expected = named("raw").beta(32, rewards[::3])
    monkeypatch.setattr(objective, "ROWS_FOR_BETA", 16)
    assert named("raw").beta(32, rewards) == expected


def test_a_constant_raw_reward_is_refused():
    with pytest.raises(InputError, match="the same reward"):
        named("raw").beta(8, jnp.ones((4, 8)))


@pytest.mark.parametrize("scale", [1e30, 1e20, 1e-20, 1e-30])
def test_the_starting_beta_of_raw_rewards_is_on_their_scale(scale):
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.float32)
    beta = named("raw", 0.5).beta(32, rewards)
    assert named("raw", 0.5).beta(32, rewards * jnp.float32(scale)) == pytest.approx(scale * beta, rel=1e-4)


@pytest.mark.parametrize(
    ("transform", "budget", "references", "parts"),
    [
        # 1 + 1/2 + 1/3 + 1/4 nats, of the expected rank above all of four references.
        ("identity", 2.1, 4, ["kl_budget is 2.1 nats", "4 reference responses", "identity reaches 2.08 at most"]),
        ("raw", 1.4, 4, ["kl_budget is 1.4 nats", "raw reaches 1.39 at most"]),
        ("exponential(-50)", 0.6, 128, ["exponential(-50) reaches 0.4", "highest ranks the same Φ", "less flat"]),
        ("optimal", 25.0, 128, ["25 nats", "20"]),
    ],
)
def test_a_budget_that_the_references_do_not_support_is_refused(transform, budget, references, parts):
    with pytest.raises(InputError) as error:
        named(transform, budget).check(references)
    assert all(part in str(error.value) for part in parts), error.value
    named(transform, 0.3).check(references)


def test_the_kl_that_ranks_among_references_reach_is_that_of_the_highest_place():
    # The share of a policy's responses above all of K references but m - 1 is 1 - the (K - m + 1)-th of K uniforms.
    uniforms = np.sort(np.random.default_rng(0).uniform(size=(20_000, 16)), axis=1)
    for ties in (1, 4, 16):
        expected = -np.log1p(-uniforms[:, 16 - ties])
        assert ideal.reachable_kl(16, ties) == pytest.approx(expected.mean(), abs=5 * expected.std() / 141)


def test_the_ideal_of_the_identity_is_its_closed_form():
    found = Objective(transforms.identity(), BestOfN(4), 0.5).ideal()
    b = 1 / found.beta
    mean = 1 / (1 - math.exp(-b)) - 1 / b
    assert found.kl == pytest.approx(b * mean - math.log(math.expm1(b) / b), abs=1e-4) == pytest.approx(0.5)
    # Sampled once each, the policy wins as often as its mean rank; best-of-4 wins with 1 − ∫ F⁴ 4u³ du.
    u = (np.arange(200_000) + 0.5) / 200_000
    cdf = np.expm1(b * u) / math.expm1(b)
    expected = {"sampling": mean, "best_of_4": 1 - np.mean(cdf**4 * 4 * u**3)}
    assert found.win_rates == pytest.approx(expected, abs=1e-5)
    assert found.win_rate(WorstOfN(2)) == pytest.approx(1 - np.mean((1 - (1 - cdf) ** 2) * 2 * (1 - u)), abs=1e-5)
    for value in (found.kl, found.beta, *found.win_rates.values()):
        assert f"{value:.4g}" in repr(found)


def test_the_ideals_beta_weighs_phi_on_its_range_unless_that_is_infinite():
    scaled, plain = (Objective(f, Sampling(), 0.5).ideal() for f in (lambda u: 7 * u + 2, transforms.identity()))
    assert scaled.beta_is_normalized and scaled.beta == pytest.approx(plain.beta, rel=1e-6)
    best_of_two = Objective(transforms.logarithm(), Sampling(), math.log(2) - 0.5).ideal()
    # Φ = log u at β = 1/(n − 1) is the best of n, whose KL is log n − (n − 1)/n.
    assert not best_of_two.beta_is_normalized and best_of_two.beta == pytest.approx(1.0, abs=1e-4)


def test_the_optimal_objective_wins_most_at_any_kl_and_a_raw_reward_has_no_ideal():
    best = named("optimal").ideal(0.4)
    assert best.kl == pytest.approx(0.4)
    for other in ("identity", "exponential(10)", "logarithm"):
        assert best.win_rate(BestOfN(4)) >= named(other).ideal(0.4).win_rate(BestOfN(4)) - 1e-8
    assert named("raw").ideal() is None


def test_names_are_parsed_once_and_print_as_they_are_stored():
    found = named(" Exp(10) ")
    assert found == Objective(transforms.exponential(10), BestOfN(4), 0.75)
    assert [str(named(text).transform) for text in ("RAW", "Optimal", "exp10")] == ["raw", "optimal", "exponential(10)"]
    assert (named("raw").transform, named("optimal").transform) == (raw(), optimal())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: named("exponantial(10)"), "exponantial.*Did you mean exponential"),
        (lambda: named("identity", procedure="best_of"), "no procedure 'best_of'"),
        (lambda: Objective("identity", BestOfN(4), 0.6), r"Objective.transform is 'identity'; .*Objective.parse"),
        (lambda: Objective(transforms.identity(), "best_of_4", 0.6), r"procedure is 'best_of_4'; .*Objective.parse"),
        (lambda: named("identity", 0.0), "kl_budget is 0.0"),
        (lambda: named("identity", math.nan), "kl_budget is nan"),
        (lambda: named("identity").ideal(25.0), "25 nats"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_fingerprint_follows_all_that_the_objective_is():
    def power(exponent):
        return lambda u: u**exponent

    def fingerprint(transform, procedure=BestOfN(4), kl_budget=0.6):  # noqa: B008
        return Objective(transform, procedure, kl_budget).fingerprint

    assert named("raw").fingerprint == {"transform": "raw", "procedure": "best_of_4", "kl_budget": 0.75}
    different = [
        fingerprint(transforms.exponential(10)),
        fingerprint(transforms.exponential(5)),
        fingerprint(power(2)),
        fingerprint(power(3)),
        fingerprint(transforms.named("square", power(2))),
        fingerprint(power(2), BestOfN(2)),
        fingerprint(power(2), kl_budget=0.5),
    ]
    assert len({tuple(one.items()) for one in different}) == len(different)
    assert fingerprint(power(2)) == fingerprint(power(2))
    # A name stands for whatever it is given to, so that a notebook's edits keep its run.
    assert fingerprint(transforms.named("mine", power(2))) == fingerprint(transforms.named("mine", power(3)))


def test_a_function_without_source_has_to_be_named():
    phi = eval("lambda u: u")
    with pytest.raises(InputError, match="cannot be read"):
        _ = Objective(phi, BestOfN(4), 0.6).fingerprint
    assert Objective(transforms.named("mine", phi), BestOfN(4), 0.6).fingerprint["transform"] == "mine"


def test_objectives_are_values():
    assert len({named("optimal"), named("optimal"), dataclasses.replace(named("optimal"), kl_budget=0.5)}) == 2
