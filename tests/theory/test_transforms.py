import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_jax.errors import InputError
from ctrl_jax.theory import transforms
from ctrl_jax.theory.precision import evaluate

U = np.linspace(0.01, 0.99, 15)

FORMULAS = {
    "identity": lambda u: u,
    "logarithm": np.log,
    "logit": lambda u: np.log(u / (1 - u)),
    "exponential(10)": lambda u: np.exp(10 * u),
    "exponential(-5)": lambda u: -np.exp(-5 * u),
    "exponential(0.5)": lambda u: np.exp(0.5 * u),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_parse_reads_a_name_back_and_gives_its_formula(name):
    phi = transforms.parse(name)
    assert str(phi) == name
    assert hash(phi) == hash(transforms.parse(name)) and phi == transforms.parse(name)
    np.testing.assert_allclose(evaluate(phi, U), FORMULAS[name](U), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(phi(jnp.asarray(U, jnp.float32)), FORMULAS[name](U), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("logarithmm", ["'logarithmm'", "Did you mean logarithm", "logit"]),
        ("exponential", ["exponential(10)"]),
        ("exponential(0)", ["exponential(0)", "identity"]),
        ("exponential(ten)", ["'ten'"]),
        ("exponential(inf)", ["finite"]),
        ("exponential(nan)", ["finite"]),
        ("exponential(701)", ["exponential(701)", "between 1e-8 and 700"]),
        ("exponential(-1e300)", ["exponential(-1e+300)", "-700"]),
        ("exponential(1e-300)", ["exponential(1e-300)", "identity"]),
        ("identity(3)", ["'identity(3)'"]),
        ("exponential(10", ["'exponential(10'"]),
        ("", ["''"]),
    ],
)
def test_an_unknown_transform_names_the_value_and_the_fix(text, parts):
    with pytest.raises(InputError) as error:
        transforms.parse(text)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("rate", [10.0, -10.0, 50.0, -50.0, 500.0, -500.0, 700.0, -700.0, 0.3, 1e-6, 1e-8, -1e-8])
def test_a_normalised_exponential_is_sound_in_float32(rate):
    phi = jax.jit(transforms.normalized(transforms.exponential(rate)))
    u = jnp.linspace(0, 1, 101, dtype=jnp.float32)
    exact = [math.expm1(rate * x) / math.expm1(rate) if rate < 0 else
             math.exp(rate * (x - 1)) * math.expm1(-rate * x) / math.expm1(-rate)
             for x in np.asarray(u, np.float64)]  # fmt: skip
    np.testing.assert_allclose(phi(u), exact, rtol=5e-5, atol=1e-37)
    assert phi(u)[0] == 0 and phi(u)[-1] == 1


@pytest.mark.parametrize("name", FORMULAS)
def test_normalised_is_increasing_and_affine_in_the_transform_away_from_the_ends(name):
    phi = transforms.normalized(transforms.parse(name))
    raw, scaled = FORMULAS[name](U), evaluate(phi, U)
    np.testing.assert_allclose(np.diff(scaled) / np.diff(raw), np.diff(scaled)[0] / np.diff(raw)[0], rtol=1e-8)
    ends = jax.jit(phi)(jnp.array([0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(ends, [0, 1], atol=1e-6)
    assert str(phi) == f"normalized({name})"


def test_only_an_infinite_end_is_clipped():
    logarithm = transforms.normalized(transforms.logarithm(), edge=1e-2)
    np.testing.assert_allclose(
        evaluate(logarithm, np.array([0, 1e-3, 0.5, 1])), [0, 0, 1 - math.log(2) / math.log(100), 1], atol=1e-5
    )
    logit = transforms.normalized(transforms.logit(), edge=1e-2)
    np.testing.assert_allclose(evaluate(logit, np.array([0, 0.005, 0.5, 0.995, 1])), [0, 0, 0.5, 1, 1], atol=1e-9)
    steep = transforms.normalized(transforms.exponential(10))
    assert 0 < steep(jnp.float32(1e-6)) < steep(jnp.float32(1e-5))


def test_as_the_rate_vanishes_the_exponential_is_the_identity():
    for rate in (1e-7, -1e-7):
        phi = transforms.normalized(transforms.exponential(rate))
        np.testing.assert_allclose(evaluate(phi, U), U, atol=1e-7)


@pytest.mark.parametrize("phi", [lambda u: 0 * u, lambda u: -u, lambda u: u * jnp.nan])
def test_what_does_not_increase_cannot_be_normalised(phi):
    with pytest.raises(InputError, match="must increase"):
        transforms.normalized(phi)


@pytest.mark.parametrize("phi", [lambda u: 1e-60 * u, lambda u: 1e9 + u, lambda u: 1e300 * u])
def test_what_float32_does_not_carry_cannot_be_normalised(phi):
    with pytest.raises(InputError, match=r"float32, which it is trained with.*Shift and scale"):
        transforms.normalized(phi)


def test_normalising_inside_jit_and_of_any_callable():
    @jax.jit
    def inside(u):
        return transforms.normalized(lambda v: 3 * v**2 - 5)(u)

    np.testing.assert_allclose(inside(jnp.array([[0.0, 0.5], [0.8, 1.0]])), [[0, 0.25], [0.64, 1]], atol=1e-6)


def test_tabulated_is_linear_between_its_values():
    phi = transforms.tabulated([0, 1, 4])
    np.testing.assert_allclose(phi(jnp.array([0, 0.25, 0.5, 0.75, 1])), [0, 0.5, 1, 2.5, 4], atol=1e-6)
    uneven = transforms.tabulated([0, 1, 4], ranks=[0, 0.9, 1])
    np.testing.assert_allclose(uneven(jnp.array([0.45, 0.9, 0.95])), [0.5, 1, 2.5], atol=1e-5)
    assert jax.grad(uneven)(0.95) == pytest.approx(30, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "ranks", "message"),
    [
        ([1.0], None, "at least 2"),
        ([[0.0, 1.0]], None, r"\(1, 2\)"),
        ([0.0, 2.0, 1.0], None, "falls from 2 to 1"),
        ([0.0, math.inf], None, "not finite"),
        ([0.0, 1.0], [0.0, 0.5], "from 0 to 0.5"),
        ([0.0, 1.0, 2.0], [0.0, 1.0], "3 values"),
    ],
)
def test_a_bad_table_is_refused(values, ranks, message):
    with pytest.raises(InputError, match=message):
        transforms.tabulated(values, ranks)


@settings(deadline=None, max_examples=30)
@given(st.floats(-60, 60).filter(lambda rate: abs(rate) > 1e-3), st.floats(0, 1), st.floats(0, 1))
def test_every_normalised_exponential_keeps_order_and_range(rate, u, v):
    low, high = evaluate(transforms.normalized(transforms.exponential(rate)), np.array(sorted([u, v])))
    assert 0 <= low <= high <= 1 + 1e-12
