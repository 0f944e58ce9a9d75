import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, procedures, transforms
from ctrl_jax.theory.optimal import optimal_transform
from ctrl_jax.theory.precision import evaluate
from ctrl_jax.theory.procedures import BestOfN, Sampling, WorstOfN
from tests.theory import quadrature

BUILT_IN = ["identity", "logarithm", *(f"exponential({t})" for t in (-20, -10, -5, 5, 10, 20))]
GRID = np.linspace(0, 1, 20_001)
# Fine at both ends too, where a policy of several nats or the best of many samples has all its mass.
FINE = np.unique(np.concatenate([GRID, 1 / (1 + np.exp(-np.linspace(-24, 24, 20_001)))]))


def integral_from_zero(values, at=GRID):
    return np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(at))])


@pytest.mark.parametrize("kl", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("side", ["best", "worst"])
def test_the_optimal_win_rate_at_equal_kl_is_that_of_the_law_on_a_grid(side, kl):
    procedure, law = procedures.parse(f"{side}_of_4"), quadrature.best_at_kl(side, 4, kl)
    phi = optimal_transform(procedure, kl=kl)
    assert phi.policy.kl == pytest.approx(kl, rel=1e-6)
    for policy in (phi.policy, ideal.at_kl(phi, kl)):
        assert policy.win_rate(procedure) == pytest.approx(law.win_rate(side, 4), abs=1e-5)
        # It gives up win rate of single samples, as much as the law does.
        assert policy.win_rate(Sampling()) == pytest.approx(law.win_rate(side, 1), abs=1e-4)
    assert law.win_rate(side, 1) < quadrature.at_kl(lambda u: u, kl).win_rate(side, 1)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("given", [{"kl": 0.5}, {"beta": 0.2}])
def test_best_of_n_in_closed_form(n, given):
    phi = optimal_transform(BestOfN(n), **given)
    closed = integral_from_zero(n**2 * (GRID * phi.policy.cdf(GRID)) ** (n - 1))
    np.testing.assert_allclose(evaluate(phi, GRID), closed - closed[-1], atol=5e-6 * max(n, 4) ** 2 * closed[-1])


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("given", [{"kl": 0.3}, {"beta": 0.2}])
def test_worst_of_n_in_closed_form(n, given):
    phi = optimal_transform(WorstOfN(n), **given)
    closed = integral_from_zero(n**2 * ((1 - GRID) * (1 - phi.policy.cdf(GRID))) ** (n - 1))
    np.testing.assert_allclose(evaluate(phi, GRID), closed - closed[-1], atol=5e-6 * max(n, 4) ** 2 * closed[-1])


def test_sampling_wants_the_identity():
    phi = optimal_transform(Sampling(), beta=0.1)
    np.testing.assert_allclose(evaluate(phi, GRID), GRID - 1, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "sampling",
        "best_of_8",
        "worst_of_2",
        "worst_of_8",
        "soft_best_of_8(0.2)",
        "best_of_poisson(4)",
        "0.5*best_of_2+0.5*best_of_8",
        "0.5*best_of_4+0.5*worst_of_4",
    ],
)
@pytest.mark.parametrize("kl", [0.1, 1.0])
def test_the_optimum_beats_every_built_in_transform_and_no_small_change_beats_it(name, kl):
    procedure = procedures.parse(name)
    phi = optimal_transform(procedure, kl=kl)
    best = phi.policy.win_rate(procedure)
    for other in BUILT_IN:
        assert best >= ideal.at_kl(transforms.parse(other), kl).win_rate(procedure) - 1e-8, other
    # To first order nothing is gained: what is lost at the same KL is of the order of the change squared.
    for bump in (lambda u: u, lambda u: jnp.sin(9 * u), lambda u: jnp.exp(-20 * u)):
        losses = []
        for share in (0.04, 0.02):
            size = share * phi.policy.beta
            changed = ideal.at_kl(lambda u, bump=bump, size=size: phi(u) + size * bump(u), kl)
            losses.append(best - changed.win_rate(procedure))
        assert -1e-8 < losses[1] < 0.3 * losses[0] + 1e-7


def test_a_beta_and_the_kl_that_it_ends_at_agree():
    # For a concave win rate the two problems have one solution.
    by_beta = optimal_transform(BestOfN(4), beta=0.1)
    by_kl = optimal_transform(BestOfN(4), kl=by_beta.policy.kl)
    assert by_kl.policy.beta == pytest.approx(0.1, rel=1e-3)
    assert by_kl.policy.win_rate(BestOfN(4)) == pytest.approx(by_beta.policy.win_rate(BestOfN(4)), abs=1e-5)


@pytest.mark.parametrize(
    ("procedure", "beta"),
    # The mixture has two stationary points: one of 0.4 nats, and one of 3.8 that wins more and costs too much.
    [(WorstOfN(8), 0.3), (WorstOfN(8), 0.02), (procedures.parse("0.3*best_of_16+0.7*worst_of_16"), 0.05)],
    ids=str,
)
def test_the_best_of_several_stationary_points_is_kept(procedure, beta):

    def value(policy):
        return policy.win_rate(procedure) - beta * policy.kl

    best = value(optimal_transform(procedure, beta=beta).policy)
    for other in BUILT_IN:
        for kl in (0.01, 0.05, 0.2, 0.5, 1.0, 2.0):
            assert best >= value(ideal.at_kl(transforms.parse(other), kl)) - 1e-7
    for kl in (0.2, 0.4, 1.0):
        assert best >= value(optimal_transform(procedure, kl=kl).policy) - 1e-7


def test_it_trains_normalised_in_float32_inside_jit():
    phi = optimal_transform(BestOfN(4), kl=1.0)
    scaled = jax.jit(transforms.normalized(phi))
    u = jnp.linspace(0, 1, 33, dtype=jnp.float32).reshape(3, 11)
    values = scaled(u)
    assert values.dtype == jnp.float32 and values.shape == u.shape
    assert values[0, 0] == 0 and values[-1, -1] == pytest.approx(1, abs=1e-6)
    assert bool(jnp.all(jnp.diff(values.reshape(-1)) >= 0))
    exact = evaluate(phi, np.asarray(u))
    np.testing.assert_allclose(values, (exact - exact.min()) / np.ptp(exact), atol=1e-5)


def test_its_name_and_its_frozenness():
    phi = optimal_transform(procedures.parse("worst_of_4"), kl=0.5)
    assert str(phi) == "optimal(worst_of_4)"
    assert hash(phi) == hash(optimal_transform(WorstOfN(4), kl=0.5))


@pytest.mark.parametrize(
    "given", [{}, {"beta": 0.1, "kl": 1.0}, {"beta": 0.0}, {"kl": -1.0}, {"kl": float("inf")}, {"beta": float("nan")}]
)
def test_one_positive_number_is_given(given):
    with pytest.raises(InputError, match="optimal_transform got"):
        optimal_transform(BestOfN(4), **given)


@dataclass(frozen=True)
class OrderStatistics:
    """A procedure of one's own: the i-th lowest of n with probability law[i]. It has a rank CDF and nothing else."""

    law: tuple[float, ...]

    def rank_cdf(self, cdf):
        n, below = len(self.law), np.append(0, np.cumsum(self.law))
        return sum(below[j] * math.comb(n, j) * cdf**j * (1 - cdf) ** (n - j) for j in range(1, n + 1))


@dataclass(frozen=True)
class Median:
    """Of three, as a user writes it down."""

    def rank_cdf(self, cdf):
        return 3 * cdf**2 - 2 * cdf**3


def slope_of(law, cdf):
    """T'[F] of a law over order statistics, of which the i-th lowest of n has the law Beta(i, n - i + 1)."""
    n = len(law)
    return sum(share * n * math.comb(n - 1, i) * cdf**i * (1 - cdf) ** (n - 1 - i) for i, share in enumerate(law))


def assert_optimal(procedure, law, kl, bumps):
    phi = optimal_transform(procedure, kl=kl)
    best = phi.policy.win_rate(procedure)
    assert phi.policy.kl == pytest.approx(kl, rel=1e-6)
    # It is the derivative of the win rate at its own policy: ∂W/∂p(u) = -∫ᵤ¹ T'[F] T'[s] ds, and a constant.
    slopes = integral_from_zero(slope_of(law, phi.policy.cdf(FINE)) * slope_of(law, FINE), at=FINE)
    values = evaluate(phi, FINE)
    np.testing.assert_allclose(values - values[-1], slopes - slopes[-1], atol=5e-3 * slopes[-1] + 1e-5)
    for other in BUILT_IN:
        assert best >= ideal.at_kl(transforms.parse(other), kl).win_rate(procedure) - 1e-8, other
    for bump in bumps:
        changed = ideal.at_kl(lambda u, bump=bump: phi(u) + phi.policy.beta * bump(u), kl)
        assert best >= changed.win_rate(procedure) - 1e-8


def wave(amplitude, frequency, phase):
    return lambda u: amplitude * jnp.sin(frequency * u + phase)


WAVES = st.builds(wave, st.floats(0.02, 1), st.floats(1, 40), st.floats(0, 6))


@st.composite
def laws(draw):
    """One of n samples' order statistics, or a mixture of several."""
    n = draw(st.integers(1, 32))
    places = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4, unique=True))
    law = np.zeros(n)
    law[places] = [draw(st.floats(0.05, 1)) for _ in places]
    return tuple((law / law.sum()).tolist())


@settings(deadline=None, max_examples=10, derandomize=True)
@given(laws(), st.floats(math.log(0.05), math.log(4)), st.lists(WAVES, min_size=2, max_size=2))
def test_any_mixture_of_order_statistics_has_its_optimum(law, log_kl, bumps):
    assert_optimal(OrderStatistics(law), law, math.exp(log_kl), bumps)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, derandomize=True)
@given(laws(), st.floats(math.log(0.05), math.log(4)), st.lists(WAVES, min_size=2, max_size=2))
def test_any_of_many_mixtures_of_order_statistics_has_its_optimum(law, log_kl, bumps):
    assert_optimal(OrderStatistics(law), law, math.exp(log_kl), bumps)


@pytest.mark.parametrize("kl", [0.05, 0.5, 4.0])
def test_the_median_of_three(kl):
    assert_optimal(Median(), (0.0, 1.0, 0.0), kl, [wave(0.1, 9, 0), wave(0.5, 3, 1)])


@pytest.mark.parametrize("law", [(1.0, *[0.0] * 31), (*[0.0] * 31, 1.0), (*[0.0] * 15, 1.0, *[0.0] * 16)])
def test_a_win_rate_of_1_leaves_no_budget_without_a_policy(law):
    # At 15 nats the slopes are below 1e-300: what is left to ask for is a higher rank.
    phi = optimal_transform(OrderStatistics(law), kl=15.0)
    assert phi.policy.kl == pytest.approx(15.0, rel=1e-6)
    assert phi.policy.win_rate(OrderStatistics(law)) == pytest.approx(1, abs=1e-4)


def test_a_steep_rank_cdf_keeps_its_digits():
    """T[U] of the worst of 32 rounds to 1 from u = .7 on, where the policy of 4 nats is at u > .98."""
    phi = optimal_transform(WorstOfN(32), kl=1.5)
    closed = integral_from_zero(32**2 * ((1 - GRID) * (1 - phi.policy.cdf(GRID))) ** 31)
    seen = evaluate(phi, GRID)
    below = (GRID > 0.01) & (seen < 1e-9 * seen[0])  # above the tie-break
    assert below.any()
    np.testing.assert_allclose(seen[below], (closed - closed[-1])[below], rtol=0.1)


@dataclass(frozen=True)
class Written:
    """A procedure by its rank CDF."""

    rank_cdf: object


@pytest.mark.parametrize(
    ("rank_cdf", "message"),
    [
        (lambda cdf: cdf**2 * (3 - 2.5 * cdf), "goes from 0 to 0.5; it must go from 0 to 1"),
        (lambda cdf: cdf - 0.5 * jnp.sin(2 * jnp.pi * cdf), r"falls: its slope at .* is -2\.14.*A CDF never falls"),
        (lambda cdf: jnp.where(cdf > 0.5, 1.0, 0.0) * (cdf > 0), "slopes that add up to 0 in place of 1: it jumps"),
        (lambda cdf: jnp.where(cdf < 1, cdf * jnp.nan, 1.0), "not finite everywhere"),
        (lambda cdf: np.asarray(cdf) ** 2, "cannot be differentiated.*Write it in jax.numpy"),
        (lambda cdf: cdf if cdf > 0.5 else cdf**2, "cannot be differentiated.*Write it in jax.numpy"),
    ],
)
def test_what_is_no_rank_cdf_is_refused(rank_cdf, message):
    with pytest.raises(InputError, match=message):
        optimal_transform(Written(rank_cdf), kl=0.5)


@pytest.mark.parametrize("kl", [1e-300, 1e-9, 21.0, 1e300])
def test_any_kl_has_an_answer_or_an_error(kl):
    try:
        phi = optimal_transform(BestOfN(4), kl=kl)
    except InputError as error:
        assert "20 nats" in str(error) and kl > 20
    else:
        assert phi.policy.kl == pytest.approx(kl, rel=1e-6)
