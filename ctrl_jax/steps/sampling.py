"""Sampling N responses a prompt: one prefill a prompt, one uniform a token, and no work for responses that have ended.

`sample` draws whole responses. `start` and `advance` draw the same ones token by token, to show them as they grow.

Over the vocabulary everything runs along the first axis, [V, rows]: a few rows by many tokens is the shape of decoding,
and on CPU the product that makes it is two to four times as fast that way round.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps import logprobs
from ctrl_jax.types import Cache, Params, Policy, Prompts, Responses, Rollouts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Unfinished responses: `start` returns them, and `advance` draws one more token of each."""

    rollouts: Rollouts
    """The tokens drawn so far; lengths count them."""
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
    """Draws an index [R] by its probability [V, R] with one uniform in [0, 1) each.

    The smallest i with Σ_{j ≤ i} p_j > u Σ_j p_j, so that an index of probability 0 is never drawn. In two levels,
    first a block of about √V indices and then one in it: a single cumulative sum over V is as slow as a small model's
    layers.
    """
    chex.assert_rank([probabilities, uniforms], [2, 1])
    size, rows = probabilities.shape
    block = max(1, math.isqrt(size))
    blocks = -(-size // block)
    blocked = jnp.pad(probabilities, [(0, blocks * block - size), (0, 0)]).reshape(blocks, block, rows)

    sums = blocked.sum(1)
    cumulative = jnp.cumsum(sums, axis=0)
    target = uniforms * cumulative[-1]
    chosen = _first_above(target, cumulative, sums)
    below = jnp.where(chosen > 0, jnp.take_along_axis(cumulative, jnp.maximum(chosen - 1, 0)[None], 0)[0], 0.0)

    inside = jnp.take_along_axis(blocked, chosen[None, None], axis=0)[0]
    return chosen * block + _first_above(target - below, jnp.cumsum(inside, axis=0), inside)


def _first_above(target: jax.Array, cumulative: jax.Array, weights: jax.Array) -> jax.Array:
    """The first index [R] of a positive weight [K, R] whose cumulative sum exceeds the target [R], or the last one.

    Weights are looked at beside their sums, which round: those of two levels apart in the last bit, and those that a
    device makes in parallel not even in order.
    """
    possible = weights > 0
    largest = jnp.where(possible, cumulative, 0.0).max(axis=0)
    target = jnp.minimum(target, jnp.nextafter(largest, jnp.zeros_like(largest)))
    return jnp.argmax(possible & (cumulative > target[None]), axis=0)


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
    top_k: int | None = None,
    top_p: float | None = None,
) -> Rollouts:
    """N responses a prompt from a `logprobs.sampling_law`, each token with its log-prob under that law.

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
      top_k: draw from the k likeliest tokens alone.
      top_p: draw from the smallest set of likeliest tokens that has this probability.

    Returns:
      Rollouts with log-probs in nats.
    """
    law: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    state = start(policy, params, prompts, key, num_samples=num_samples, max_length=max_length, eos_ids=eos_ids, **law)
    return _finish(state, lambda state: advance(policy, params, state, eos_ids=eos_ids, **law)).rollouts


def ended(responses: Responses, eos_ids: tuple[int, ...]) -> jax.Array:
    """[B, N] whether a response has ended: its last token is one of `eos_ids`. Others were cut at the most tokens."""
    last = jnp.take_along_axis(responses.tokens, responses.lengths[..., None] - 1, axis=-1)[..., 0]
    return jnp.isin(last, jnp.asarray(eos_ids))


def rows_left(num_prompts: int, num_samples: int, prompt_length: int, max_length: int) -> int:
    """How many of the B * N responses go on alone once no more of them live, each beside its own copy of the prompt; 0
    where none do.

    Each such number is a program of its own: quarters, not halves, and none that would be too small to save time, or
    whose copies would be more to read than all the caches were.
    """
    rows = num_prompts * num_samples
    left = rows // 4
    copied, shared = left * (prompt_length + max_length), num_prompts * prompt_length + rows * max_length
    return left if rows >= 64 and copied <= shared else 0


def _finish(state: State, advance: Callable[[State], State]) -> State:
    """Advances until all responses have ended; once no more than `rows_left` live, those go on alone."""
    num_prompts, num_samples, max_length = state.uniforms.shape
    num_rows = num_prompts * num_samples
    num_left = rows_left(num_prompts, num_samples, state.rollouts.prompts.tokens.shape[-1], max_length)
    state = jax.lax.while_loop(
        lambda state: state.unfinished & (state.alive.sum() > num_left), lambda state: advance(state), state
    )
    if num_left == 0:
        return state
    living_first = jnp.argsort(~state.alive.reshape(-1), stable=True)[:num_left]
    finished = _finish(_take(state, living_first), advance)

    def put(whole: jax.Array, rows: jax.Array) -> jax.Array:
        flat = whole.reshape(num_rows, *whole.shape[2:])
        return flat.at[living_first].set(rows[:, 0]).reshape(whole.shape)

    rollouts, ended = state.rollouts, finished.rollouts
    responses = jax.tree.map(put, rollouts.responses, ended.responses)
    rollouts = Rollouts(rollouts.prompts, responses, put(rollouts.log_probs, ended.log_probs))
    return replace(state, rollouts=rollouts, alive=put(state.alive, finished.alive), index=finished.index)


def _take(state: State, rows: jax.Array) -> State:
    """The state of the responses at `rows` of the flattened [B * N], each beside its own copy of the prompt."""
    num_samples = state.alive.shape[1]

    def of_prompts(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[rows // num_samples], tree)

    def of_responses(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[rows][:, None], tree)

    return State(
        rollouts=Rollouts(
            of_prompts(state.rollouts.prompts),
            of_responses(state.rollouts.responses),
            of_responses(state.rollouts.log_probs),
        ),
        index=state.index,
        alive=of_responses(state.alive),
        uniforms=of_responses(state.uniforms),
        prompt_cache=of_prompts(state.prompt_cache),
        response_cache=jax.tree.map(lambda x: x[rows], state.response_cache),
    )


def continued(state: State, index: jax.Array) -> State:
    """The state in which each place of [B, N] goes on from its prompt's response at `index` [B, N], by the draws of its
    own place."""

    def of_responses(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1), tree
        )

    def of_rows(x: jax.Array) -> jax.Array:
        return of_responses(x.reshape(*index.shape, *x.shape[1:])).reshape(x.shape)

    rollouts = state.rollouts
    return replace(
        state,
        rollouts=Rollouts(rollouts.prompts, of_responses(rollouts.responses), of_responses(rollouts.log_probs)),
        alive=of_responses(state.alive),
        response_cache=jax.tree.map(of_rows, state.response_cache),
    )


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
    top_k: int | None = None,
    top_p: float | None = None,
) -> State:
    """Reads the prompts and draws every response's first token; the arguments are those of `sample`."""
    chex.assert_rank([prompts.tokens, prompts.lengths, prompts.ids], [2, 1, 1])
    keys = response_keys(key, prompts.ids, num_samples)
    uniforms = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (max_length,))))(keys)
    features, prompt_cache = policy.prefill(params, prompts)
    features = jnp.broadcast_to(features[:, None], (features.shape[0], num_samples, features.shape[-1]))
    law: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

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
    return _draw(policy, params, empty, features, eos_ids, **law)


def advance(
    policy: Policy,
    params: Params,
    state: State,
    *,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> State:
    """Reads the last token of each response and draws the next one; only for a state that is `unfinished`."""
    last = state.index - 1
    tokens = jax.lax.dynamic_index_in_dim(state.rollouts.responses.tokens, last, axis=2, keepdims=False)
    lengths = state.rollouts.prompts.lengths
    features, cache = policy.decode(params, state.prompt_cache, state.response_cache, lengths, tokens, last)
    state, law = replace(state, response_cache=cache), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _draw(policy, params, state, features, eos_ids, **law)


def _draw(
    policy: Policy, params: Params, state: State, features: jax.Array, eos_ids: tuple[int, ...], **law: Any
) -> State:
    """The state with one more token of each living response, from the features [B, N, D] that predict it."""
    rollouts, responses, alive, index = state.rollouts, state.rollouts.responses, state.alive, state.index
    with jax.named_scope("unembed"):  # profiles find it by this name, once XLA has made one product of both
        logits = policy.unembed(params, features.reshape(-1, features.shape[-1])).T
    log_law = logprobs.sampling_law(logits, axis=0, **law)
    uniform = jax.lax.dynamic_index_in_dim(state.uniforms, index, axis=2, keepdims=False)
    drawn = inverse_cdf(jnp.exp(log_law), uniform.reshape(-1))
    log_prob = jnp.take_along_axis(log_law, drawn[None], axis=0)[0].reshape(alive.shape)
    token = jnp.where(alive, drawn.reshape(alive.shape), eos_ids[0]).astype(jnp.int32)
    tokens = jax.lax.dynamic_update_index_in_dim(responses.tokens, token, index, axis=2)
    log_probs = jax.lax.dynamic_update_index_in_dim(rollouts.log_probs, jnp.where(alive, log_prob, 0.0), index, axis=2)
    return replace(
        state,
        rollouts=Rollouts(rollouts.prompts, Responses(tokens, responses.lengths + alive), log_probs),
        index=index + 1,
        alive=alive & ~jnp.isin(token, jnp.array(eos_ids)),
    )
