import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures
from ctrl_jax.theory.precision import double_precision
from ctrl_jax.theory.procedures import BestOfN, BestOfPoisson, Mixture, Sampling, SoftBestOfN, WorstOfN

NAMES = [
    "sampling",
    "best_of_1",
    "best_of_4",
    "worst_of_3",
    "soft_best_of_4(0.1)",
    "soft_best_of_1(2)",
    "best_of_poisson(1.5)",
    "0.5*best_of_2+0.5*best_of_5",
    "0.25*sampling+0.25*worst_of_3+0.5*soft_best_of_4(0.3)",
]
RANDOM = [name for name in NAMES if any(word in name for word in ("soft", "poisson", "*"))]


def rank_cdf(procedure, cdf):
    with double_precision():
        return np.asarray(procedure.rank_cdf(jnp.asarray(cdf)))


@pytest.mark.parametrize("name", [*NAMES, "soft_best_of_2(1e+20)"])
def test_a_name_reads_back(name):
    procedure = procedures.parse(name)
    assert str(procedure) == procedure.name == name
    assert procedures.parse(procedure.name) == procedure and hash(procedures.parse(name)) == hash(procedure)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bst_of_4", ["'bst_of_4'", "Did you mean best_of_4", "sampling"]),
        ("best_of_0", ["0", "at least 1"]),
        ("best_of_", ["'best_of_'"]),
        ("best_of_4(2)", ["'best_of_4(2)'"]),
        ("soft_best_of_4", ["soft_best_of_4(0.1)"]),
        ("soft_best_of_4(0)", ["temperature", "best_of_4"]),
        ("best_of_poisson(-1)", ["-1"]),
        ("0.5*best_of_2+0.4*best_of_8", ["0.9", "sum to 1"]),
        ("best_of_2+best_of_8", ["'best_of_2'", "0.5*best_of_2+0.5*best_of_8"]),
        ("half*best_of_2+0.5*sampling", ["'half*best_of_2'"]),
        ("0.5*best_of_2+0.5*bst_of_8", ["'bst_of_8'"]),
        ("1.5*best_of_2+-0.5*sampling", ["greater than 0"]),
        ("nan*best_of_2+1*best_of_2", ["nan", "not a probability"]),
        ("inf*best_of_2+0.5*sampling", ["inf", "not a probability"]),
        ("1e300*best_of_2+1*sampling", ["1e+300", "sum to 1"]),
        ("0*best_of_2+1*sampling", ["[0.0, 1.0]", "greater than 0"]),
        ("soft_best_of_4(nan)", ["nan", "best_of_4 and sampling"]),
        ("soft_best_of_4(1e-300)", ["1e-300", "between 1e-06 and 1e+30"]),
        ("soft_best_of_4(1e300)", ["1e+300", "between 1e-06 and 1e+30"]),
        ("best_of_poisson(nan)", ["nan"]),
        ("best_of_poisson(1e-300)", ["1e-300", "sampling"]),
        ("best_of_poisson(1e300)", ["1e+300", "at most 500"]),
        ("best_of_2000000", ["2000000", "at most 1,000,000"]),
    ],
)
def test_an_unknown_procedure_names_the_value_and_the_fix(text, parts):
    with pytest.raises(InputError) as error:
        procedures.parse(text)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", NAMES)
def test_rank_cdf_is_the_law_over_order_statistics(name):
    # The i-th lowest of n uniform ranks has a Beta(i, n - i + 1) law.
    procedure = procedures.parse(name)
    n, u = procedure.num_samples, np.linspace(0, 1, 21)
    law = procedure.law()
    assert law.shape == (n,) and law.sum() == pytest.approx(1) and np.all(law >= 0)
    expected = sum(share * special.betainc(i + 1, n - i, u) for i, share in enumerate(law))
    np.testing.assert_allclose(rank_cdf(procedure, u), expected, atol=2.0**-24 if "poisson" in name else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_rank_cdf_is_differentiable_up_to_the_ends(name):
    procedure, u, step = procedures.parse(name), np.linspace(0, 1, 11), 1e-6
    with double_precision():
        slope = np.asarray(jax.vmap(jax.grad(procedure.rank_cdf))(jnp.asarray(u)))
    ahead = np.clip(u + step, 0, 1)
    behind = np.clip(u - step, 0, 1)
    secant = (rank_cdf(procedure, ahead) - rank_cdf(procedure, behind)) / (ahead - behind)
    np.testing.assert_allclose(slope, secant, atol=1e-4)
    # In float32, as it is called outside of theory/.
    np.testing.assert_allclose(procedure.rank_cdf(jnp.asarray(u, jnp.float32)), rank_cdf(procedure, u), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_order_weights_average_over_all_subsets(name, extra):
    procedure = procedures.parse("best_of_2" if "poisson" in name else name)
    n = procedure.num_samples
    m = n + extra
    counts = np.zeros(m)
    for subset in itertools.combinations(range(m), n):
        counts[list(subset)] += procedure.law()
    np.testing.assert_allclose(procedure.order_weights(m), counts / math.comb(m, n), atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (4, 4), (4, 64), (16, 64), (7, 3000), (64, 4096)])
def test_order_weights_of_best_and_worst_are_the_closed_form(n, m):
    expected = np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
    np.testing.assert_allclose(BestOfN(n).order_weights(m), expected, rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(WorstOfN(n).order_weights(m), expected[::-1], rtol=1e-8, atol=1e-300)
    assert BestOfN(n).order_weights(m).sum() == pytest.approx(1, abs=1e-10)


def test_order_weights_of_a_mixture_are_the_mixture_of_the_weights():
    mixture = procedures.parse("0.3*best_of_2+0.7*worst_of_5")
    expected = 0.3 * BestOfN(2).order_weights(9) + 0.7 * WorstOfN(5).order_weights(9)
    np.testing.assert_allclose(mixture.order_weights(9), expected, atol=1e-12)


def test_too_few_samples_for_order_weights():
    with pytest.raises(InputError, match=r"best_of_4 looks at 4 samples, but there are 3"):
        BestOfN(4).order_weights(3)


def test_best_of_poisson_is_the_poisson_mixture_of_best_of_n():
    mu, u = 4.0, np.linspace(0, 1, 11)
    expected = sum(math.exp(-mu) * mu**k / math.factorial(k) * u ** (k + 1) for k in range(80))
    np.testing.assert_allclose(rank_cdf(BestOfPoisson(mu), u), expected, atol=1e-14)
    # Its density, and the smallest n that leaves out at most 2^-24.
    with double_precision():
        density = np.asarray(jax.vmap(jax.grad(BestOfPoisson(mu).rank_cdf))(jnp.asarray(u)))
    np.testing.assert_allclose(density, (mu * u + 1) * np.exp(mu * (u - 1)), rtol=1e-12)
    n = BestOfPoisson(mu).num_samples
    assert special.pdtrc(n - 1, mu) <= 2.0**-24 < special.pdtrc(n - 2, mu)
    assert 500 < BestOfPoisson(500.0).num_samples < 700


@pytest.mark.parametrize("n", [1, 4])
def test_select_of_best_and_worst_is_the_extreme_and_the_first_of_equals(n):
    scores = jax.random.normal(jax.random.key(0), (3, 5, n))
    assert np.array_equal(BestOfN(n).select(scores), np.argmax(scores, -1))
    assert np.array_equal(WorstOfN(n).select(scores), np.argmin(scores, -1))
    ties = jnp.zeros((2, n))
    assert BestOfN(n).select(ties).tolist() == WorstOfN(n).select(ties).tolist() == [0, 0]


def test_sampling_takes_the_only_sample():
    assert Sampling().select(jnp.ones((2, 3, 1))).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("name", RANDOM)
def test_select_at_random_follows_the_law(name):
    procedure, draws = procedures.parse(name), 20_000
    n = procedure.num_samples
    scores = jax.random.uniform(jax.random.key(1), (draws, n))
    index = jax.jit(procedure.select)(scores, jax.random.key(2))
    ranks = jnp.take_along_axis(jnp.argsort(jnp.argsort(scores, -1), -1), index[:, None], -1)[:, 0]
    share = np.bincount(np.asarray(ranks), minlength=n) / draws
    assert np.all(np.abs(share - procedure.law()) < 5 * np.sqrt(0.25 / draws))
    picked = np.take_along_axis(np.asarray(scores), np.asarray(index)[:, None], -1)[:, 0]
    for u in (0.3, 0.7, 0.9):
        assert np.mean(picked <= u) == pytest.approx(rank_cdf(procedure, u), abs=5 * math.sqrt(0.25 / draws))


def test_select_refuses_the_wrong_number_of_scores_and_a_missing_key():
    with pytest.raises(InputError, match=r"best_of_4 picks among 4 samples, but the scores have shape \(2, 3\)"):
        BestOfN(4).select(jnp.ones((2, 3)))
    with pytest.raises(InputError, match="give select a key"):
        SoftBestOfN(3, 0.1).select(jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (BestOfN(1), Sampling()),
        (WorstOfN(1), Sampling()),
        (SoftBestOfN(1, 0.3), Sampling()),
        (SoftBestOfN(4, 1e-4), BestOfN(4)),
        (SoftBestOfN(4, 1e9), Sampling()),
        (BestOfPoisson(1e-9), Sampling()),
        (Mixture(((1.0, BestOfN(4)),)), BestOfN(4)),
    ],
)
def test_limits_coincide(near, limit):
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(rank_cdf(near, u), rank_cdf(limit, u), atol=1e-8)
    np.testing.assert_allclose(near.order_weights(9), limit.order_weights(9), atol=1e-8)


def test_soft_best_of_n_weighs_ranks_exponentially():
    weights = np.exp(np.array([0, 1 / 3, 2 / 3, 1]) / 0.2)
    np.testing.assert_allclose(SoftBestOfN(4, 0.2).law(), weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "best_of_1000000",
        "worst_of_1000000",
        "soft_best_of_1000000(0.1)",
        "soft_best_of_1000000(1e-06)",
        "soft_best_of_1000000(1e+30)",
        "soft_best_of_2(1e-06)",
        "soft_best_of_2(1e+30)",
        "best_of_poisson(500)",
        "best_of_poisson(1e-12)",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_extreme_procedure_has_a_rank_cdf_with_slopes(name, dtype):
    procedure, u = procedures.parse(name), np.array([0, 1e-6, 0.3, 0.5, 0.99, 0.999999, 1])
    with double_precision():
        cdf = jnp.asarray(u, dtype)
        values, slopes = jax.jvp(procedure.rank_cdf, (cdf,), (jnp.ones_like(cdf),))
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(slopes)) and np.all(slopes >= -1e-6)
    assert values[0] == 0 and values[-1] == pytest.approx(1) and np.all(np.diff(values) >= 0)


def test_a_soft_best_of_many_has_the_limits_of_its_temperature():
    # Picked with probability ∝ e^(r/τ) among so many ranks r, the CDF of a pick is (e^(F/τ) - 1)/(e^(1/τ) - 1).
    u = np.linspace(0, 1, 11)
    many = rank_cdf(SoftBestOfN(1_000_000, 0.2), u)
    np.testing.assert_allclose(many, np.expm1(u / 0.2) / np.expm1(1 / 0.2), atol=1e-4)
    np.testing.assert_allclose(rank_cdf(SoftBestOfN(1000, 1e20), u), u, atol=1e-12)
    np.testing.assert_allclose(rank_cdf(SoftBestOfN(7, 1e-6), u), u**7, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.05, 0.9, 1.4, 2.0, 1e4, 1e12])
def test_soft_best_of_n_by_its_law_on_both_sides_of_where_its_form_changes(n, temperature):
    procedure, u = SoftBestOfN(n, temperature), np.linspace(0, 1, 21)
    expected = sum(share * special.betainc(i + 1, n - i, u) for i, share in enumerate(procedure.law()))
    np.testing.assert_allclose(rank_cdf(procedure, u), expected, atol=1e-12)


def test_order_weights_of_a_large_sample_are_finite():
    for procedure in (BestOfN(4), WorstOfN(500), SoftBestOfN(300, 0.1), BestOfPoisson(500.0)):
        weights = procedure.order_weights(50_000)
        assert np.all(weights >= 0) and weights.sum() == pytest.approx(1, abs=1e-8)


def test_a_mixture_has_no_mixture_within():
    with pytest.raises(InputError, match="side by side"):
        Mixture(((0.5, Sampling()), (0.5, Mixture(((1.0, BestOfN(2)),)))))


PROCEDURES = st.one_of(
    st.builds(BestOfN, st.integers(1, 40)),
    st.builds(WorstOfN, st.integers(1, 40)),
    st.builds(SoftBestOfN, st.integers(1, 20), st.floats(1e-3, 1e3)),
    st.builds(BestOfPoisson, st.floats(1e-3, 30)),
)


@settings(deadline=None, max_examples=40)
@given(PROCEDURES, st.integers(0, 50))
def test_every_procedure_is_a_law(procedure, extra):
    assert procedures.parse(procedure.name) == procedure
    weights = procedure.order_weights(procedure.num_samples + extra)
    assert np.all(weights >= 0) and weights.sum() == pytest.approx(1, abs=1e-9)
    cdf = rank_cdf(procedure, np.linspace(0, 1, 11))
    assert cdf[0] == 0 and cdf[-1] == pytest.approx(1) and np.all(np.diff(cdf) >= -1e-12)
