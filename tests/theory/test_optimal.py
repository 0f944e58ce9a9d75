import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, procedures, transforms
from ctrl_jax.theory.optimal import optimal_transform
from ctrl_jax.theory.precision import evaluate
from ctrl_jax.theory.procedures import BestOfN, Sampling, WorstOfN

BUILT_IN = ["identity", "logarithm", *(f"exponential({t})" for t in (-20, -10, -5, 5, 10, 20))]
GRID = np.linspace(0, 1, 20_001)


def integral_from_zero(values):
    return np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(GRID))])


@pytest.mark.parametrize(
    ("procedure", "kl", "expected"),
    [
        ("best_of_4", 0.25, 0.797),
        ("best_of_4", 0.5, 0.873),
        ("best_of_4", 1.0, 0.941),
        ("best_of_4", 2.0, 0.984),
        ("worst_of_4", 0.25, 0.858),
        ("worst_of_4", 0.5, 0.948),
        ("worst_of_4", 1.0, 0.993),
    ],
)
def test_the_optimal_win_rate_at_equal_kl(procedure, kl, expected):
    procedure = procedures.parse(procedure)
    phi = optimal_transform(procedure, kl=kl)
    assert phi.policy.kl == pytest.approx(kl, rel=1e-6)
    assert phi.policy.win_rate(procedure) == pytest.approx(expected, abs=5e-4)
    assert ideal.at_kl(phi, kl).win_rate(procedure) == pytest.approx(expected, abs=5e-4)


def test_the_optimum_of_best_of_4_gives_up_standard_win_rate():
    assert optimal_transform(BestOfN(4), kl=1.0).policy.win_rate(Sampling()) == pytest.approx(0.774, abs=1e-3)


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


@pytest.mark.parametrize("beta", [0.3, 0.02])
def test_worst_of_n_keeps_the_best_of_its_stationary_points(beta):
    procedure = WorstOfN(8)

    def value(policy):
        return policy.win_rate(procedure) - beta * policy.kl

    best = value(optimal_transform(procedure, beta=beta).policy)
    for other in BUILT_IN:
        for kl in (0.01, 0.05, 0.2, 0.5, 1.0, 2.0):
            assert best >= value(ideal.at_kl(transforms.parse(other), kl)) - 1e-7


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
