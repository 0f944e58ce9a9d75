"""The estimators against a language of three tokens, all of whose responses are enumerated."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ctrl_jax.steps import kl

# Jitted, as the jobs run it: far fewer compilations than operation by operation.
exact = jax.jit(kl.exact)

EOS, VOCABULARY, LENGTH = 0, 3, 3


def normal(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Language(NamedTuple):
    """Every response of a random autoregressive policy, with what it and a random reference say about it."""

    probabilities: np.ndarray  # [S] of each response under the policy
    lengths: np.ndarray  # [S]
    policy: np.ndarray  # [S, T] log-probs of the tokens, nan past the length
    reference: np.ndarray
    policy_logits: np.ndarray  # [S, T, V], nan past the length
    reference_logits: np.ndarray

    def kl(self) -> float:
        """KL of the responses, from nothing but their probabilities."""
        ratio = np.nansum(self.policy, -1) - np.nansum(self.reference, -1)
        return float(self.probabilities @ ratio)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def language(distance: float) -> Language:
    rng = np.random.default_rng(1)
    prefixes = [p for n in range(LENGTH) for p in itertools.product((1, 2), repeat=n)]
    reference = {p: rng.normal(size=VOCABULARY) for p in prefixes}
    policy = {p: reference[p] + distance * rng.normal(size=VOCABULARY) for p in prefixes}
    responses = [(*p, EOS) for p in prefixes] + list(itertools.product((1, 2), repeat=LENGTH))

    def log_probs(table):
        out = np.full((len(responses), LENGTH), np.nan)
        for s, response in enumerate(responses):
            for t, token in enumerate(response):
                out[s, t] = log_softmax(table[response[:t]])[token]
        return out

    def logits(table):
        out = np.full((len(responses), LENGTH, VOCABULARY), np.nan)
        for s, response in enumerate(responses):
            for t in range(len(response)):
                out[s, t] = table[response[:t]]
        return out

    probabilities = np.exp(np.nansum(log_probs(policy), -1))
    assert abs(probabilities.sum() - 1) < 1e-12
    lengths = np.array([len(r) for r in responses])
    return Language(probabilities, lengths, log_probs(policy), log_probs(reference), logits(policy), logits(reference))


def expectation(per_token, words: Language) -> float:
    return float(words.probabilities @ np.asarray(kl.per_sequence(per_token, jnp.array(words.lengths)), np.float64))


@pytest.mark.parametrize("distance", [0.05, 0.5, 1.5])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_average_to_the_kl_of_responses(name, distance):
    words = language(distance)
    per_token = getattr(kl, name)(jnp.array(words.policy), jnp.array(words.reference))
    np.testing.assert_allclose(expectation(per_token, words), words.kl(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", [0.05, 0.5, 1.5])
def test_exact_averages_to_the_kl_of_responses(distance):
    words = language(distance)
    per_token = exact(jnp.array(words.policy_logits), jnp.array(words.reference_logits))
    np.testing.assert_allclose(expectation(per_token, words), words.kl(), rtol=1e-4, atol=1e-7)


def test_k2_averages_to_its_own_formula_and_is_biased():
    words = language(1.5)
    # By prefixes instead of responses: Σ_prefix π(prefix) Σ_v π(v|prefix) (log-ratio)²/2.
    expected, seen = 0.0, set()
    for s, length in enumerate(words.lengths):
        for t in range(length):
            policy, reference = log_softmax(words.policy_logits[s, t]), log_softmax(words.reference_logits[s, t])
            prefix = words.policy_logits[s, : t + 1].tobytes()
            if prefix not in seen:
                seen.add(prefix)
                expected += np.exp(words.policy[s, :t].sum()) * (np.exp(policy) @ (policy - reference) ** 2) / 2
    actual = expectation(kl.k2(jnp.array(words.policy), jnp.array(words.reference)), words)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert abs(actual / words.kl() - 1) > 0.05


def test_k2_comes_close_to_the_kl_for_close_policies():
    def error(distance):
        words = language(distance)
        return abs(expectation(kl.k2(jnp.array(words.policy), jnp.array(words.reference)), words) / words.kl() - 1)

    assert error(0.02) < 0.02
    assert error(0.02) < error(0.2) < error(1.0)


def test_k3_is_never_negative_and_right_from_tiny_to_large_ratios():
    d = np.concatenate([np.logspace(-12, 1.5, 300), [0.0, 0.1, np.nextafter(np.float32(0.1), 0)]]).astype(np.float32)
    d = np.concatenate([d, -d])
    actual = np.asarray(kl.k3(jnp.array(d), jnp.zeros_like(d)))
    assert (actual >= 0).all()
    wide = d.astype(np.float64)
    tiny = abs(wide) < 1e-4
    expected = np.where(tiny, wide**2 / 2 - wide**3 / 6, np.expm1(-wide) + wide)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "slope"), [("k1", np.ones_like), ("k2", np.asarray), ("k3", lambda d: -np.expm1(-d))])
def test_sampled_estimators_are_zero_for_equal_policies_and_have_the_right_slope(name, slope):
    estimator = getattr(kl, name)
    d = np.array([0.0, 1e-6, -0.04, 0.0999, 0.1001, -1.5, 8.0])
    np.testing.assert_array_equal(estimator(jnp.array(d), jnp.array(d)), 0)
    gradients = jax.grad(lambda x, y: jnp.sum(estimator(x, y)), (0, 1))(jnp.array(d), jnp.zeros(len(d)))
    np.testing.assert_allclose(gradients[0], slope(d), rtol=1e-5)
    np.testing.assert_allclose(gradients[1], -slope(d), rtol=1e-5)


def test_exact_of_equal_policies_is_zero_and_shifts_of_logits_do_not_matter():
    logits = normal(4, 50)
    np.testing.assert_allclose(exact(logits, logits + 3), np.zeros(4), atol=1e-6)


def test_gradient_of_exact():
    policy, reference = normal(2, 3, 5)
    check_grads(exact, (policy, reference), order=1, modes=["rev"], rtol=1e-2)
    # In closed form: π (log-ratio − KL) for the policy's logits, π_ref − π for the reference's.
    gradients = jax.grad(lambda p, q: jnp.sum(exact(p, q)), (0, 1))(policy, reference)
    p, q = (log_softmax(np.asarray(x, np.float64)) for x in (policy, reference))
    value = (np.exp(p) * (p - q)).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradients[0], np.exp(p) * (p - q - value), atol=1e-6)
    np.testing.assert_allclose(gradients[1], np.exp(q) - np.exp(p), atol=1e-6)


def test_exact_of_tokens_that_cannot_be_said_is_that_of_the_others():
    policy, reference = normal(2, 5)
    longer = [jnp.append(x, -jnp.inf) for x in (policy, reference)]
    np.testing.assert_allclose(exact(*longer), exact(policy, reference), rtol=1e-5)
    gradients = jax.grad(exact, (0, 1))(*longer)
    for actual, expected in zip(gradients, jax.grad(exact, (0, 1))(policy, reference), strict=True):
        np.testing.assert_allclose(actual, jnp.append(expected, 0), atol=1e-6)
    assert exact(jnp.append(policy, 0.0), longer[1]) == jnp.inf


def test_gradient_of_the_sums_as_the_docstring_says():
    policy, reference = (jax.nn.log_softmax(x) for x in normal(2, 6, seed=3))

    def mean_gradient(estimator):
        # The samples are held fixed while the log-probs move: E_π[∇ estimator].
        return jax.grad(lambda x: jnp.exp(policy) @ estimator(jax.nn.log_softmax(x), reference))(policy)

    np.testing.assert_allclose(mean_gradient(kl.k1), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(mean_gradient(kl.k2), jax.grad(exact, 0)(policy, reference), atol=1e-6)
    np.testing.assert_allclose(mean_gradient(kl.k3), jax.grad(exact, 1)(reference, policy), atol=1e-6)


def test_per_sequence_reads_real_tokens_only():
    per_token = jnp.array([[1.0, 2, 4], [8, jnp.nan, jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
    lengths = jnp.array([3, 1, 0])
    np.testing.assert_array_equal(kl.per_sequence(per_token, lengths), [7, 8, 0])
    padded = jnp.pad(per_token, ((0, 0), (0, 5)), constant_values=jnp.nan)
    np.testing.assert_array_equal(kl.per_sequence(padded, lengths), [7, 8, 0])
    gradient = jax.grad(lambda x: jnp.sum(kl.per_sequence(x, lengths)))(per_token)
    np.testing.assert_array_equal(gradient, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])


def test_the_standard_error_is_that_of_a_sample_of_prompts():
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) + np.arange(20, dtype=np.float32)[:, None]
    estimate = kl.estimate(jnp.array(x))
    np.testing.assert_allclose(estimate.mean, x.mean(), rtol=1e-6)
    np.testing.assert_allclose(estimate.standard_error, x.mean(1).std(ddof=1) / np.sqrt(20), rtol=1e-5)
    # The same responses ten times over are no new evidence.
    np.testing.assert_allclose(kl.estimate(jnp.tile(x, 10)).standard_error, estimate.standard_error, rtol=1e-5)


def test_the_estimate_ignores_padding_prompts():
    x = normal(6, 4)
    padded = jnp.concatenate([x, jnp.full((2, 4), jnp.nan)])
    masked = kl.estimate(padded, jnp.arange(8) < 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, kl.estimate(x))


def test_sharded_equals_single_device(mesh):
    policy, reference = normal(2, 16, 4, 7, 11)
    lengths = jnp.array(np.random.default_rng(1).integers(1, 8, (16, 4)))

    def step(policy, reference, lengths, axis_name=None):
        return kl.estimate(kl.per_sequence(exact(policy, reference), lengths)).across(axis_name)

    sharded = jax.jit(jax.shard_map(lambda *args: step(*args, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))(
        policy, reference, lengths
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sharded, step(policy, reference, lengths))
