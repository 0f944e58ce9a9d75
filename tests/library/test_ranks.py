"""Calibration and win rates of arrays from any sampler: expected values by counting."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_jax as cj

RANDOM = np.random.default_rng(0)


def beats(a, b):
    return float(a > b) + float(a == b) / 2


def test_calibrate_counts():
    rewards, references = RANDOM.integers(0, 5, (3, 4)), RANDOM.integers(0, 5, (3, 7))
    expected = [
        [np.mean([beats(r, k) for k in row]) for r in of_prompt]
        for of_prompt, row in zip(rewards, references, strict=True)
    ]
    found = cj.calibrate(rewards, references)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    # Lists, and one prompt alone.
    np.testing.assert_array_equal(cj.calibrate(rewards.tolist(), references.tolist()), found)
    np.testing.assert_array_equal(cj.calibrate(rewards[0], references[0]), found[0])


def test_rewards_that_float32_takes_for_equal_are_ranked():
    assert cj.calibrate([1 + 1e-12], [1.0]).tolist() == [1.0]
    assert cj.win_rate([[1 + 1e-12]], [[1.0]], cj.sampling()).tolist() == [1.0]


def test_win_rate_averages_over_all_subsets():
    policy, reference = RANDOM.integers(0, 6, (2, 5)), RANDOM.integers(0, 6, (2, 4))
    expected = [
        np.mean(
            [
                beats(max(ours), max(theirs))
                for ours in itertools.combinations(of_policy, 2)
                for theirs in itertools.combinations(of_reference, 2)
            ]
        )
        for of_policy, of_reference in zip(policy, reference, strict=True)
    ]
    found = cj.win_rate(policy, reference, cj.best_of(2))
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_another_judge_compares_what_the_rewards_pick():
    rewards, references = np.array([[0.0, 1.0, 2.0]]), np.array([[5.0, 3.0, 4.0]])
    judged, references_judged = np.array([[9.0, 9.0, 1.0]]), np.array([[2.0, 0.0, 0.0]])
    # Best of 3 picks the policy's last (judged 1) and the reference's first (judged 2).
    assert cj.judged_win_rate(rewards, references, judged, references_judged, cj.best_of(3)).tolist() == [0.0]
    assert cj.judged_win_rate(rewards, references, rewards, references, cj.best_of(3)).tolist() == [0.0]
    assert cj.judged_win_rate(rewards, references, judged, references_judged, cj.worst_of(3)).tolist() == [1.0]


def test_jax_arrays_stay_and_are_traced():
    rewards, references = RANDOM.normal(size=(2, 4)), RANDOM.normal(size=(2, 8))
    traced = jax.jit(cj.calibrate)(jnp.asarray(rewards, jnp.float32), jnp.asarray(references, jnp.float32))
    assert isinstance(traced, jax.Array) and traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, cj.calibrate(rewards, references), rtol=1e-6)
    rates = jax.jit(cj.win_rate, static_argnums=2)(jnp.asarray(rewards), jnp.asarray(references), cj.best_of(2))
    np.testing.assert_allclose(rates, cj.win_rate(rewards, references, cj.best_of(2)), rtol=1e-5)


def test_scores_are_transformed_ranks():
    rewards, references = RANDOM.normal(size=(2, 4)), RANDOM.normal(size=(2, 8))
    scored = cj.score(rewards, references, cj.Objective(cj.exponential(3), cj.best_of(2), 0.5))
    ranks = cj.calibrate(rewards, references)
    np.testing.assert_array_equal(scored.calibrated, ranks)
    np.testing.assert_allclose(scored.transformed, np.expm1(3 * ranks) / np.expm1(3), rtol=1e-6)
    raw = cj.score(rewards, references, cj.Objective(cj.raw(), cj.best_of(2), 0.5))
    np.testing.assert_array_equal(raw.transformed, rewards)


def test_interval_is_of_floats_and_covers():
    per_prompt = RANDOM.beta(4, 2, size=200)
    found = cj.interval(per_prompt, bounds=(0, 1))
    assert isinstance(found, cj.Interval) and all(isinstance(value, float) for value in found)
    half = 1.96 * per_prompt.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(per_prompt.mean(), rel=1e-12)
    assert (found.low, found.high) == (
        pytest.approx(found.mean - half, abs=0.15 * half),
        pytest.approx(found.mean + half, abs=0.15 * half),
    )
    assert found == cj.interval(per_prompt, bounds=(0, 1))
    assert found != cj.interval(per_prompt, jax.random.key(1), bounds=(0, 1))
    wider = cj.interval(per_prompt, level=0.99)
    assert wider.low < found.low and found.high < wider.high


def test_a_difference_is_paired():
    easy = RANDOM.normal(0.6, 0.2, size=200)
    first, second = easy + RANDOM.normal(0.03, 0.02, 200), easy + RANDOM.normal(0, 0.02, 200)
    found = cj.difference(first, second)
    assert isinstance(found, cj.Interval) and found == cj.interval(first - second)
    half = 1.96 * (first - second).std(ddof=1) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low > 0 > -found.high == pytest.approx(cj.difference(second, first).low, abs=0.3 * half)
    apart = cj.interval(first), cj.interval(second)
    assert apart[0].low < apart[1].high, "two intervals apart would not have shown it"


def test_there_is_no_interval_over_few_prompts():
    mean, low, high = cj.interval([0.25, 0.75])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: cj.calibrate([[1.0, 2.0], [3.0]], [[1.0]]), "rewards is no array of numbers"),
        (lambda: cj.calibrate(["a"], [1.0]), "rewards is no array of numbers"),
        (lambda: cj.calibrate(np.ones((2, 3)), np.ones(3)), r"\(2, 3\) and reference_rewards \(3,\)"),
        (lambda: cj.calibrate(np.ones((2, 3)), np.ones((3, 3))), r"\(2, 3\) and reference_rewards \(3, 3\)"),
        (lambda: cj.calibrate(1.0, 1.0), "one row a prompt"),
        (lambda: cj.calibrate(np.ones((2, 3)), np.ones((2, 0))), "0 reference rewards"),
        (lambda: cj.win_rate(np.ones(4), np.ones(4), cj.sampling()), r"\(4,\)"),
        (lambda: cj.difference(np.ones(4), np.ones(5)), r"first has shape \(4,\) and second \(5,\); give two rows"),
        (lambda: cj.difference(np.ones((2, 4)), np.ones((2, 4))), r"first has shape \(2, 4\)"),
        (lambda: cj.win_rate(np.ones((1, 4)), np.ones((2, 4)), cj.sampling()), r"\(1, 4\)"),
        (lambda: cj.win_rate(np.ones((1, 4)), np.ones((1, 2)), cj.best_of(4)), "needs 4 samples"),
        (lambda: cj.win_rate(np.ones((1, 4)), np.ones((1, 4)), "best_of_4"), "'best_of_4'.*ctrl_jax.procedure"),
        (
            lambda: cj.judged_win_rate(
                np.ones((1, 4)), np.ones((1, 4)), np.ones((1, 3)), np.ones((1, 4)), cj.best_of(2)
            ),
            r"policy_judged has shape \(1, 3\)",
        ),
        (lambda: cj.interval([[1.0]]), r"\(1, 1\)"),
        (lambda: cj.interval([]), "0 prompts"),
        (lambda: cj.interval(np.ones(9), level=95), "95"),
        (lambda: cj.best_of(0), "0"),
        (lambda: cj.procedure("best_of_for"), "best_of_4"),
        (lambda: cj.transform("exponental(3)"), "exponential"),
        (lambda: cj.ideal_policy(cj.identity()), "kl=0.6"),
        (lambda: cj.ideal_policy(cj.identity(), kl=0.1, beta=2), "kl=0.6"),
        (lambda: cj.Objective(cj.identity(), "best_of_4", 0.6), "best_of_4"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, match):
    with pytest.raises(cj.InputError, match=match) as raised:
        call()
    assert "--" not in str(raised.value)


def test_errors_carry_field_value_and_remedy():
    with pytest.raises(cj.InputError) as raised:
        cj.win_rate(np.ones((1, 4)), np.ones((1, 4)), "best_of_4")
    assert (raised.value.field, raised.value.value) == ("procedure", "best_of_4")
    assert raised.value.remedy in str(raised.value)
