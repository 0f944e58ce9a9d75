"""Estimators of KL(policy || reference), per token and per response, in nats.

k1, k2 and k3 are the names of John Schulman's note "Approximating KL Divergence" (2020,
joschu.net/blog/kl-approx.html). They read only the sampled token's log-probs; `exact` reads the logits of the whole
vocabulary.

With d = log π(token) − log π_ref(token) of a token that the policy sampled:

    name    per token          mean            summed over a response's tokens
    k1      d                  KL              unbiased for the KL of responses; can be negative, noisy
    k2      d²/2               not the KL      biased; close to the KL for close policies
    k3      e^−d − 1 + d       KL              unbiased; never negative
    exact   Σ_v π log(π/π_ref) KL, no noise    unbiased; never negative but for rounding; the prefixes' noise is left

The sums are unbiased by the chain rule, KL(responses) = E Σ_t KL(token t given the tokens before it), where responses
come from the policy at the law whose log-probs these are (temperature, truncation at T).

As losses they differ from what they estimate. At prefixes held fixed, the mean gradient of k1 is 0, that of k2 is the
gradient of KL(policy || reference), and that of k3 the gradient of KL(reference || policy). A loss takes `exact`, and
adds what no per-token term sees: an early token chooses the prefixes of the later ones.
"""

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.masked import Moments, length_mask, masked_moments


def k1(policy_log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """log π − log π_ref, [..., T] nats a token. Unbiased for the KL, also summed over tokens."""
    chex.assert_equal_shape([policy_log_probs, reference_log_probs])
    return policy_log_probs - reference_log_probs


def k2(policy_log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """(log π − log π_ref)² / 2, [..., T] nats a token. Biased: it agrees with the KL to second order only."""
    return k1(policy_log_probs, reference_log_probs) ** 2 / 2


def k3(policy_log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """π_ref/π − 1 − log(π_ref/π), [..., T] nats a token, never negative. Unbiased, also summed over tokens.

    Unbiased where the policy gives weight to every token that the reference does, as a softmax does. Its variance is
    large where the policy has become much less likely to say what the reference says.
    """
    d = k1(policy_log_probs, reference_log_probs)
    # The two terms of order d cancel, and in float32 leave noise, even below 0, where d is small. The series does not;
    # each branch sees harmless values where the other is taken, so that neither puts nan in the gradient.
    small = jnp.abs(d) < 0.1
    near = jnp.where(small, d, 0)
    far = jnp.where(small, 1, d)
    series = near**2 / 2 * (1 - near / 3 * (1 - near / 4 * (1 - near / 5 * (1 - near / 6))))
    return jnp.where(small, series, jnp.expm1(-far) + far)


def exact(policy_logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
    """Σ_v π(v) (log π(v) − log π_ref(v)) over the whole vocabulary: logits [..., V] to [...] nats a token.

    Differentiable in both arguments. A logit of −inf is a token that cannot be said, and counts 0 where the policy
    cannot say it; the KL is inf where only the reference cannot.
    """
    chex.assert_equal_shape([policy_logits, reference_logits])
    return of_laws(jax.nn.log_softmax(policy_logits), jax.nn.log_softmax(reference_logits))


def of_laws(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """As `exact`, of log-probabilities [..., V].

    >>> policy, reference = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> round(float(of_laws(policy, reference)), 4)
    0.1438
    """
    probabilities = jnp.exp(policy)
    # Where π is 0 its logarithm is −inf: 0 · −inf is nan, in the value and, were the where outside, in the gradient.
    said = probabilities > 0
    log_ratio = jnp.where(said, policy, probabilities) - jnp.where(said, reference, probabilities)
    return jnp.sum(probabilities * log_ratio, axis=-1)


def per_sequence(per_token: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sum over the real tokens: [..., T] nats a token and lengths [...] to [...] nats a response."""
    chex.assert_equal_shape_prefix([per_token, lengths], lengths.ndim)
    chex.assert_rank(per_token, lengths.ndim + 1)
    return jnp.sum(jnp.where(length_mask(lengths, per_token.shape[-1]), per_token, 0), axis=-1)


def estimate(per_sequence: jax.Array, mask: jax.Array | None = None) -> Moments:
    """Mean KL and its standard error from [B, N] nats a response; mask [B] is true for real prompts.

    The N responses of a prompt are not independent draws (the KL differs between prompts), so the entries are the B
    means over a prompt's responses: the error is that of a sample of prompts, and more responses of the same prompts
    cannot hide it.
    """
    chex.assert_rank(per_sequence, 2)
    return masked_moments(jnp.mean(per_sequence, axis=-1), mask)
