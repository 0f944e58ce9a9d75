import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, procedures, transforms
from ctrl_jax.theory.procedures import BestOfN, Sampling, WorstOfN
from tests.theory import quadrature

U = np.array([0.0, 1e-9, 0.1, 0.35, 0.5, 0.8, 0.999, 1 - 1e-9, 1.0])

FORMULAS = {
    "identity": lambda u: u,
    "logarithm": np.log,
    **{f"exponential({t})": lambda u, t=t: np.sign(t) * np.exp(t * u) for t in (-10, -5, 5, 10)},
}
CASES = [
    *(("best", name, kl) for name in ("identity", "logarithm", "exponential(5)", "exponential(10)")
      for kl in (0.25, 0.5, 1.0, 2.0)),
    *(("worst", name, kl) for name in ("identity", "logarithm", "exponential(-5)", "exponential(-10)")
      for kl in (0.25, 0.5, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("side", "name", "kl"), CASES)
def test_beta_and_win_rates_at_a_kl_are_those_of_the_law_on_a_grid(side, name, kl):
    found, law = ideal.at_kl(transforms.parse(name), kl), quadrature.at_kl(FORMULAS[name], kl)
    assert found.beta == pytest.approx(law.beta, rel=1e-5)
    for n, procedure in ((1, Sampling()), (4, procedures.parse(f"{side}_of_4"))):
        assert found.win_rate(procedure) == pytest.approx(law.win_rate(side, n), abs=1e-6)


def test_what_exponentials_buy_at_equal_kl():
    """Under best-of-4 they win more than the identity and the logarithm, and of single samples less; and their β are
    not on one scale."""
    names = ("logarithm", "identity", "exponential(5)", "exponential(10)")
    policies = [ideal.at_kl(transforms.parse(name), 1.0) for name in names]
    best = [policy.win_rate(BestOfN(4)) for policy in policies]
    assert best == sorted(best) and best[-1] - best[0] > 0.05
    single = [policy.win_rate(Sampling()) for policy in policies[1:]]
    assert single == sorted(single, reverse=True) and single[0] - single[-1] > 0.05
    assert policies[-1].beta > 1e4 * policies[1].beta


@pytest.mark.parametrize("n", [1.01, 2, 4, 100, 3000])
def test_the_logarithm_is_the_best_of_n_of_the_reference(n):
    policy = ideal.tilt(transforms.logarithm(), 1 / (n - 1))
    assert policy.kl == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-9)
    for size in (1, 2, 16, 500):
        assert policy.win_rate(BestOfN(size)) == pytest.approx(n / (n + 1), abs=1e-8)
    np.testing.assert_allclose(policy.cdf(U), U**n, atol=1e-10)
    np.testing.assert_allclose(policy.density(U[1:]), n * U[1:] ** (n - 1), rtol=1e-6, atol=1e-200)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1, 0.02])
def test_the_identity_in_closed_form(beta):
    rise = math.exp(1 / beta)
    policy = ideal.tilt(transforms.identity(), beta)
    assert policy.kl == pytest.approx(
        ((1 / beta - 1) * rise + 1) / (rise - 1) - math.log(beta) - math.log(rise - 1), abs=1e-9
    )
    np.testing.assert_allclose(policy.cdf(U), np.expm1(U / beta) / np.expm1(1 / beta), atol=1e-10)


@pytest.mark.parametrize("beta", [1.1, 1.5, 4.0, 50.0])
def test_the_logit_is_a_beta_law(beta):
    a = 1 / beta
    policy = ideal.tilt(transforms.logit(), beta)
    kl = a * (special.digamma(1 + a) - special.digamma(1 - a)) - special.betaln(1 + a, 1 - a)
    assert policy.kl == pytest.approx(kl, abs=1e-5)
    assert policy.win_rate(Sampling()) == pytest.approx((1 + a) / 2, abs=1e-6)
    np.testing.assert_allclose(policy.cdf(U[:-2]), special.betainc(1 + a, 1 - a, U[:-2]), atol=1e-6)


@pytest.mark.parametrize(
    ("phi", "beta"),
    [
        (transforms.exponential(-50), 1e-6),
        (transforms.exponential(10), 300.0),
        (transforms.normalized(transforms.logit()), 0.05),
        (lambda u: jnp.sin(1.5 * u) ** 3, 0.07),
        (lambda u: np.asarray(u) ** 2, 0.3),
    ],
)
def test_any_callable_against_adaptive_quadrature(phi, beta):
    def weight(u):
        return math.exp((float(ideal.evaluate(phi, np.array(u))) - top) / beta)

    top = float(ideal.evaluate(phi, np.array(1.0)))
    cuts = [0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-4, 1]

    def integral(f):
        return sum(integrate.quad(f, a, b, epsabs=1e-10, epsrel=1e-9, limit=20)[0] for a, b in itertools.pairwise(cuts))

    total = integral(weight)
    kl = integral(lambda u: weight(u) * math.log(max(weight(u), 1e-300))) / total - math.log(total)
    policy = ideal.tilt(phi, beta)
    assert policy.kl == pytest.approx(kl, abs=1e-5)
    assert policy.win_rate(Sampling()) == pytest.approx(integral(lambda u: u * weight(u)) / total, abs=1e-6)


def test_the_general_win_rate_is_the_formula_of_best_and_worst_of_n():
    policy, n = ideal.at_kl(transforms.exponential(3), 0.7), 5
    best = 1 - n * integrate.quad(lambda u: float(policy.cdf(u)) ** n * u ** (n - 1), 0, 1)[0]
    worst = n * integrate.quad(lambda u: (1 - float(policy.cdf(u))) ** n * (1 - u) ** (n - 1), 0, 1)[0]
    assert policy.win_rate(BestOfN(n)) == pytest.approx(best, abs=1e-7)
    # 1 - ∫ T[F] dT[U] with T[F] = 1 - (1 - F)^N is N ∫ (1 - F)^N (1 - u)^(N-1) du.
    assert policy.win_rate(WorstOfN(n)) == pytest.approx(worst, abs=1e-7)


@pytest.mark.parametrize("name", ["identity", "logarithm", "logit", "exponential(50)", "exponential(-50)"])
@pytest.mark.parametrize("kl", [0.001, 0.01, 1.0, 5.0])
def test_at_kl_lands_there_and_is_the_tilt_at_its_beta(name, kl):
    phi = transforms.parse(name)
    policy = ideal.at_kl(phi, kl)
    assert policy.kl == pytest.approx(kl, rel=1e-8)
    assert ideal.tilt(phi, policy.beta) == policy
    cdf = policy.cdf(np.linspace(0, 1, 101))
    assert cdf[0] == 0 and cdf[-1] == 1 and np.all(np.diff(cdf) >= 0)


def test_a_small_kl_is_the_reference():
    policy = ideal.at_kl(transforms.exponential(5), 1e-8)
    assert policy.win_rate(BestOfN(4)) == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_allclose(policy.cdf(U), U, atol=1e-3)


def test_normalising_scales_beta_and_nothing_else():
    raw = ideal.at_kl(transforms.exponential(10), 1.0)
    scaled = ideal.at_kl(transforms.normalized(transforms.exponential(10)), 1.0)
    assert scaled.beta == pytest.approx(raw.beta / math.expm1(10), rel=1e-9)
    np.testing.assert_allclose(raw.cdf(U), scaled.cdf(U), atol=1e-10)


def test_a_kl_that_a_flat_top_cannot_reach():
    # All of the top half is alike: the most that can be done is to be there, log 2 nats.
    halves = transforms.tabulated([0.0, 1.0, 1.0])
    assert ideal.at_kl(halves, 0.68).kl == pytest.approx(0.68)
    with pytest.raises(InputError, match=r"reaches a KL of 0\.693\d* nats at most.*less than 0\.7"):
        ideal.at_kl(halves, 0.7)


RATES = st.one_of(st.floats(1e-8, 700), st.floats(-700, -1e-8))
EXTREME_KLS = st.one_of(st.floats(-300, 300).map(lambda power: 10.0**power), st.floats(0.01, 20))


@settings(deadline=20_000, max_examples=60, derandomize=True)
@given(
    st.one_of(
        RATES.map(transforms.exponential),
        RATES.map(lambda rate: transforms.normalized(transforms.exponential(rate))),
        st.sampled_from([transforms.identity(), transforms.logarithm(), transforms.logit()]),
    ),
    EXTREME_KLS,
)
def test_every_transform_at_every_kl_has_a_policy_or_an_error_at_once(phi, kl):
    try:
        policy = ideal.at_kl(phi, kl)
    except InputError as error:
        message = str(error)
        assert any(reason in message for reason in ("up to 20 nats", "flat near its top", "no float64")), message
        assert "\n" not in message
    else:
        assert policy.kl == pytest.approx(kl, rel=1e-6)
        assert 0.5 - 1e-9 <= policy.win_rate(BestOfN(4)) <= 1 + 1e-9
        cdf = policy.cdf(U)
        assert np.all(np.isfinite(cdf)) and np.all(np.diff(cdf) >= 0)


@pytest.mark.parametrize("rate", [-700.0, -400.0, 400.0, 700.0])
@pytest.mark.parametrize("kl", [1e-6, 0.1, 2.0])
def test_a_steep_exponential_is_the_one_on_the_range_0_to_1(rate, kl):
    """e^(2·355) is no float64: the spread of Φ is not to be squared."""
    steep, policy = transforms.exponential(rate), ideal.at_kl(transforms.exponential(rate), kl)
    try:
        scaled = ideal.at_kl(transforms.normalized(steep), kl)
    except InputError as error:  # 1 - e^(-700u) rounds to 1
        assert rate < 0 and "flat near its top" in str(error)
    else:
        np.testing.assert_allclose(policy.cdf(U), scaled.cdf(U), atol=1e-6)


@pytest.mark.parametrize("kl", [1e-9, 1e-7, 1e-6, 1e-5, 1e-4])
def test_a_small_kl_of_the_identity_is_that_of_its_variance(kl):
    # KL = 1/(24 β²) + O(β⁻⁴): the identity's variance is 1/12, its third cumulant 0.
    policy = ideal.at_kl(transforms.identity(), kl)
    assert policy.beta == pytest.approx(1 / math.sqrt(24 * kl), rel=kl + 1e-9)
    # To first order p = 1 + (u - ½)/β, with which one sample wins ½ + 1/(12 β).
    assert policy.win_rate(Sampling()) - 0.5 == pytest.approx(1 / 12 / policy.beta, rel=10 * kl + 1e-6)


@pytest.mark.parametrize("kl", [12.0, 16.0, 19.9])
def test_the_highest_kl_in_closed_form(kl):
    # exp(u/β) is β⁻¹ e^(-x/β) at x = 1 - u, of KL -log β - 1; u^(n-1) has KL log n - (n - 1)/n.
    assert ideal.at_kl(transforms.identity(), kl).beta == pytest.approx(math.exp(-1 - kl), rel=1e-4)
    assert 1 / ideal.at_kl(transforms.logarithm(), kl).beta == pytest.approx(math.exp(kl + 1), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ideal.at_kl(transforms.identity(), 50), "KL is 50 nats; .* up to 20 nats"),
        (lambda: ideal.at_kl(transforms.exponential(700), 1e-200), "KL of 1e-200 nats at β .* no float64"),
        (lambda: ideal.at_kl(lambda u: 1e-305 * u, 1), "goes from .* scale it"),
        (lambda: ideal.at_kl(lambda u: (2 * u - 1) * 1.7e308, 1), "goes from .* scale it"),
        (lambda: ideal.tilt(transforms.identity(), 0), "β is 0"),
        (lambda: ideal.tilt(transforms.identity(), math.nan), "β is nan"),
        (lambda: ideal.tilt(transforms.logit(), 0.9), "β > 1"),
        (lambda: ideal.at_kl(transforms.identity(), -0.5), "KL is -0.5"),
        (lambda: ideal.at_kl(lambda u: 0 * u, 0.5), "constant"),
        (lambda: ideal.at_kl(lambda u: jnp.log(u - 0.5), 0.5), "not finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


@settings(deadline=None, max_examples=15)
@given(st.floats(-30, 30).filter(lambda t: abs(t) > 0.1), st.floats(0.01, 3), st.integers(1, 30))
def test_more_kl_wins_more_and_never_less_than_half(rate, kl, n):
    phi = transforms.exponential(rate)
    nearer, farther = ideal.at_kl(phi, kl), ideal.at_kl(phi, 1.3 * kl)
    assert farther.beta < nearer.beta
    for procedure in (BestOfN(n), WorstOfN(n)):
        assert 0.5 < nearer.win_rate(procedure) < farther.win_rate(procedure) + 1e-12 <= 1 + 1e-9
