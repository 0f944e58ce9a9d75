"""Sampling N responses a prompt: one prefill a prompt, one uniform a token, and a stop as soon as all have ended.

`sample` draws whole responses. `start` and `advance` draw the same ones token by token, for who wants to watch.
"""

import math
from dataclasses import dataclass, replace

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.logprobs import sampling_law
from ctrl_jax.types import Cache, Params, Policy, Prompts, Responses, Rollouts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Responses in the making: what `start` returns and `advance` draws one more token of."""

    rollouts: Rollouts
    """What is drawn so far; lengths count the tokens drawn."""
    index: jax.Array
    """[] int32: tokens drawn of the longest response, at least 1."""
    alive: jax.Array
    """[B, N] bool: no token yet that ends the response."""
    uniforms: jax.Array
    """[B, N, T]: each draws one token."""
    prompt_cache: Cache
    response_cache: Cache
    """Of all tokens drawn but the last."""

    @property
    def unfinished(self) -> jax.Array:
        """[] bool: whether a response still grows."""
        return (self.index < self.uniforms.shape[-1]) & jnp.any(self.alive)


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
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
) -> Rollouts:
    """N responses a prompt from softmax(logits / temperature), each token with its log-prob under that law.

    Args:
      policy: the language model's functions.
      params: its parameters.
      prompts: B prompts.
      key: typed PRNG key, to which the prompt's id and the sample's index are folded.
      num_samples: N.
      max_length: T; a response that has not ended by then is cut, and its log-prob is that of the cut one.
      eos_ids: tokens that end a response, at least one. The one drawn counts in the length; the first of `eos_ids`
        fills what is past it.
      temperature: 1 is the model's own law; towards 0 it becomes greedy.

    Returns:
      Rollouts with log-probs in nats.
    """
    state = start(
        policy, params, prompts, key,
        num_samples=num_samples, max_length=max_length, eos_ids=eos_ids, temperature=temperature,
    )  # fmt: skip
    state = jax.lax.while_loop(
        lambda state: state.unfinished,
        lambda state: advance(policy, params, state, eos_ids=eos_ids, temperature=temperature),
        state,
    )
    return state.rollouts


def start(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    num_samples: int,
    max_length: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
) -> State:
    """Reads the prompts and draws every response's first token; the arguments are those of `sample`."""
    chex.assert_rank([prompts.tokens, prompts.lengths, prompts.ids], [2, 1, 1])
    keys = response_keys(key, prompts.ids, num_samples)
    uniforms = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (max_length,))))(keys)
    features, prompt_cache = policy.prefill(params, prompts)
    features = jnp.broadcast_to(features[:, None], (features.shape[0], num_samples, features.shape[-1]))

    # Made from the uniforms, so that under shard_map they vary over devices as those do.
    zeros = uniforms * 0
    tokens = jnp.full_like(zeros, eos_ids[0], dtype=jnp.int32) + zeros.astype(jnp.int32)
    empty = State(
        rollouts=Rollouts(prompts, Responses(tokens, zeros[..., 0].astype(jnp.int32)), zeros),
        index=jnp.int32(0),
        alive=zeros[..., 0] == 0,
        uniforms=uniforms,
        prompt_cache=prompt_cache,
        response_cache=policy.start(prompt_cache, num_samples, max_length),
    )
    return _draw(policy, params, empty, features, eos_ids, temperature)


def advance(
    policy: Policy, params: Params, state: State, *, eos_ids: tuple[int, ...], temperature: float = 1.0
) -> State:
    """Reads the last token of each response and draws the next one; only for a state that is `unfinished`."""
    last = state.index - 1
    tokens = jax.lax.dynamic_index_in_dim(state.rollouts.responses.tokens, last, axis=2, keepdims=False)
    lengths = state.rollouts.prompts.lengths
    features, cache = policy.decode(params, state.prompt_cache, state.response_cache, lengths, tokens, last)
    return _draw(policy, params, replace(state, response_cache=cache), features, eos_ids, temperature)


def _draw(
    policy: Policy, params: Params, state: State, features: jax.Array, eos_ids: tuple[int, ...], temperature: float
) -> State:
    """The state with one more token of each living response, from the features [B, N, D] that predict it."""
    rollouts, responses, alive, index = state.rollouts, state.rollouts.responses, state.alive, state.index
    law = sampling_law(policy.unembed(params, features), temperature)
    uniform = jax.lax.dynamic_index_in_dim(state.uniforms, index, axis=2, keepdims=False)
    token = jnp.where(alive, inverse_cdf(jnp.exp(law), uniform), eos_ids[0]).astype(jnp.int32)
    log_prob = jnp.where(alive, jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0], 0.0)
    tokens = jax.lax.dynamic_update_index_in_dim(responses.tokens, token, index, axis=2)
    log_probs = jax.lax.dynamic_update_index_in_dim(rollouts.log_probs, log_prob, index, axis=2)
    return replace(
        state,
        rollouts=Rollouts(rollouts.prompts, Responses(tokens, responses.lengths + alive), log_probs),
        index=index + 1,
        alive=alive & ~jnp.isin(token, jnp.array(eos_ids)),
    )
