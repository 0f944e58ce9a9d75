"""Sampling N responses a prompt: one prefill a prompt, one uniform a token, and a stop as soon as all have ended."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.logprobs import sampling_law
from ctrl_jax.steps.masked import length_mask
from ctrl_jax.types import Params, Policy, Prompts, Responses, Rollouts


def response_keys(key: jax.Array, prompt_ids: jax.Array, num_samples: int) -> jax.Array:
    """Typed keys [B, N], a function of (key, prompt, sample) alone: the same for any batch split or device count."""
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_prompt, jnp.arange(num_samples))


def inverse_cdf(probabilities: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws an index [...] by its probability [..., V] with one uniform in [0, 1) each.

    The smallest i with Σ_{j ≤ i} p_j > u Σ_j p_j, so that an index of probability 0 is never drawn. In two levels,
    first a block of about √V indices and then one in it: a single cumulative sum over V is as slow as a small model's
    layers.
    """
    chex.assert_equal_shape_prefix([probabilities, uniforms], uniforms.ndim)
    size = probabilities.shape[-1]
    block = max(1, math.isqrt(size))
    blocks = -(-size // block)
    padding = [(0, 0)] * uniforms.ndim + [(0, blocks * block - size)]
    blocked = jnp.pad(probabilities, padding).reshape(*uniforms.shape, blocks, block)

    cumulative = jnp.cumsum(blocked.sum(-1), axis=-1)
    target = uniforms * cumulative[..., -1]
    chosen = (cumulative <= target[..., None]).sum(-1)
    below = jnp.where(
        chosen > 0, jnp.take_along_axis(cumulative, jnp.maximum(chosen - 1, 0)[..., None], -1)[..., 0], 0.0
    )

    inside = jnp.take_along_axis(blocked, chosen[..., None, None], axis=-2)[..., 0, :]
    cumulative = jnp.cumsum(inside, axis=-1)
    # The two levels round apart in the last bit: what is left to find is kept below the block's own sum.
    rest = jnp.minimum(target - below, jnp.nextafter(cumulative[..., -1], jnp.zeros_like(target)))
    return chosen * block + (cumulative <= rest[..., None]).sum(-1)


def sample(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    num_samples: int,
    max_length: int,
    eos_id: int,
    temperature: float = 1.0,
) -> Rollouts:
    """N responses a prompt from softmax(logits / temperature), each token with its log-prob under that law.

    Args:
      policy: the language model's functions.
      params: its parameters.
      prompts: B prompts.
      key: typed PRNG key, to which the prompt's id and the sample's index are folded.
      num_samples: N.
      max_length: T; a response that has no EOS by then is cut, and its log-prob is that of the cut one.
      eos_id: the token that ends a response. It counts in the length, and fills what is past it.
      temperature: 1 is the model's own law; towards 0 it becomes greedy.

    Returns:
      Rollouts with log-probs in nats.
    """
    chex.assert_rank([prompts.tokens, prompts.lengths, prompts.ids], [2, 1, 1])
    keys = response_keys(key, prompts.ids, num_samples)
    uniforms = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (max_length,))))(keys)
    features, prompt_cache = policy.prefill(params, prompts)
    features = jnp.broadcast_to(features[:, None], (features.shape[0], num_samples, features.shape[-1]))

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        index, alive, *_ = carry
        return (index < max_length) & jnp.any(alive)

    def draw(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, alive, features, cache, tokens, log_probs = carry
        law = sampling_law(policy.unembed(params, features), temperature)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, index, axis=2, keepdims=False)
        token = jnp.where(alive, inverse_cdf(jnp.exp(law), uniform), eos_id).astype(jnp.int32)
        log_prob = jnp.where(alive, jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0], 0.0)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, axis=2)
        log_probs = jax.lax.dynamic_update_index_in_dim(log_probs, log_prob, index, axis=2)
        features, cache = policy.decode(params, prompt_cache, cache, prompts.lengths, token, index)
        return index + 1, alive & (token != eos_id), features, cache, tokens, log_probs

    # Made from the uniforms, so that under shard_map they vary over devices as those do.
    zeros = uniforms * 0
    alive = zeros[..., 0] == 0
    tokens = jnp.full_like(zeros, eos_id, dtype=jnp.int32) + zeros.astype(jnp.int32)
    start = (jnp.int32(0), alive, features, policy.start(prompt_cache, num_samples, max_length), tokens, zeros)
    _, _, _, _, tokens, log_probs = jax.lax.while_loop(unfinished, draw, start)

    ended = tokens == eos_id
    lengths = jnp.where(ended.any(-1), jnp.argmax(ended, axis=-1) + 1, max_length).astype(jnp.int32)
    log_probs = jnp.where(length_mask(lengths, max_length), log_probs, 0.0)
    return Rollouts(prompts, Responses(tokens, lengths), log_probs)
