"""Log-probabilities of response tokens at the law that samples them, and that law's KL to the reference's.

The vocabulary is read a chunk of tokens at a time and recomputed in the backward pass, so the [B, N, T, V] logits never
exist: at 128k tokens of vocabulary they are most of a step's memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ctrl_jax.steps import kl
from ctrl_jax.types import Params, Policy, Prompts, Responses, Trunk, Unembed

_KEPT = "one number a token"
"""Names what a chunk keeps for its backward pass, beside its features."""


class Comparison(NamedTuple):
    """A policy beside the reference, on the policy's responses; nats."""

    log_probs: jax.Array
    """[B, N, T] of each token under the policy."""
    reference_log_probs: jax.Array
    """[B, N, T] of each token under the reference."""
    kl: jax.Array
    """[B, N, T] exact KL(policy || reference) of the next-token law, over the whole vocabulary."""


def compare_policies(
    policy: Policy,
    params: Params,
    reference: Params,
    prompts: Prompts,
    responses: Responses,
    *,
    temperature: float,
    chunk_size: int,
) -> Comparison:
    """A policy and a reference of one network on given responses, as `compare` compares their features."""
    features, reference_features = read_policies(policy, params, reference, prompts, responses)
    return compare(
        policy.unembed, params, features, reference, reference_features, responses.tokens,
        temperature=temperature, chunk_size=chunk_size,
    )  # fmt: skip


def read_policies(
    policy: Policy, params: Params, reference: Params, prompts: Prompts, responses: Responses
) -> tuple[jax.Array, jax.Array]:
    """The policy's and the reference's features [B, N, T, D], from each of which a token is predicted.

    The layers below the first that is trained are read once for both, by the reference's parameters.
    """
    trunk = policy.below(reference, prompts, responses)
    return policy.above(params, trunk, prompts, responses), policy.above(reference, trunk, prompts, responses)


def sampling_law(
    logits: jax.Array,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    axis: int = -1,
) -> jax.Array:
    """log softmax(logits / temperature) over an axis, in f32: the law that is sampled, scored and compared.

    With `top_k` only the k likeliest tokens keep their probability, then with `top_p` (Holtzman et al. 2020, arXiv
    1904.09751) only the smallest set of likeliest ones that has at least p of what is left; the rest is −inf, and what
    is kept sums to 1. Tokens as likely as the least likely one that is kept are kept too.
    """
    law = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=axis)
    if top_p is not None and top_p >= 1:
        # All tokens, where a rounded sum would reach 1 before the last of them.
        top_p = None
    if top_k is None and top_p is None:
        return law
    law = jnp.moveaxis(law, axis, -1)
    if top_k is not None:
        law = _likeliest(law, jnp.full(law.shape[:-1], min(top_k, law.shape[-1])))
    if top_p is not None:
        falling = -jnp.sort(-jnp.exp(law), axis=-1)
        # A token is in while those before it have less than p: the likeliest always is.
        before = jnp.cumsum(falling, axis=-1) - falling
        law = _likeliest(law, jnp.maximum(1, (before < top_p).sum(-1)))
    return jnp.moveaxis(law, -1, axis)


def _likeliest(law: jax.Array, count: jax.Array) -> jax.Array:
    """The law [..., V] on its `count` [...] likeliest tokens."""
    falling = -jnp.sort(-law, axis=-1)
    least = jnp.take_along_axis(falling, (count - 1)[..., None], axis=-1)
    return jax.nn.log_softmax(jnp.where(law >= least, law, -jnp.inf), axis=-1)


def token_log_probs(
    unembed: Unembed,
    params: Params,
    features: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> jax.Array:
    """log π(token | what came before) in nats.

    Args:
      unembed: features to logits.
      params: its parameters.
      features: [B, N, T, D] that predict the tokens.
      tokens: [B, N, T].
      temperature: of the sampling law.
      chunk_size: tokens whose logits exist at a time.

    Returns:
      [B, N, T]; past a response's length the values mean nothing.
    """
    chex.assert_rank([features, tokens], [4, 3])
    chex.assert_equal_shape_prefix([features, tokens], 3)

    def chunk(features: jax.Array, tokens: jax.Array) -> jax.Array:
        return _select(sampling_law(unembed(params, features), temperature=temperature), tokens)

    return _in_chunks(chunk, (features, tokens), chunk_size)


def of_responses(
    policy: Policy, params: Params, prompts: Prompts, responses: Responses, *,
    temperature: float, chunk_size: int, trunk: Trunk | None = None,
) -> jax.Array:  # fmt: skip
    """log π(response | prompt), [B, N] nats of whole responses; the arguments are those of `token_log_probs`.

    A `trunk` is that of the same prompts and responses, where it has been read already.
    """
    trunk = policy.below(params, prompts, responses) if trunk is None else trunk
    per_token = token_log_probs(
        policy.unembed,
        params,
        policy.above(params, trunk, prompts, responses),
        responses.tokens,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    return kl.per_sequence(per_token, responses.lengths)


def compare(
    unembed: Unembed,
    params: Params,
    features: jax.Array,
    reference_params: Params,
    reference_features: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> Comparison:
    """Policy and reference log-probs of the tokens [B, N, T], and the exact KL of each next-token law; nats.

    Differentiable in the policy's parameters and features, not in the reference's.
    """
    chex.assert_rank([features, reference_features, tokens], [4, 4, 3])
    chex.assert_equal_shape_prefix([features, reference_features, tokens], 3)

    def chunk(features: jax.Array, reference_features: jax.Array, tokens: jax.Array) -> Comparison:
        logits = unembed(params, features).astype(jnp.float32) / temperature
        reference_logits = unembed(reference_params, reference_features).astype(jnp.float32) / temperature
        return _compared(logits, reference_logits, tokens)

    return _in_chunks(chunk, (features, reference_features, tokens), chunk_size)


@jax.custom_vjp
def _compared(logits: jax.Array, reference_logits: jax.Array, tokens: jax.Array) -> Comparison:
    """The comparison of logits [R, V] over tokens [R]; `kl.exact` and `sampling_law` say what it is.

    Its gradient is written out because automatic differentiation needs six arrays [R, V] at a time, and this four.
    """
    return _compared_forward(logits, reference_logits, tokens)[0]


def _compared_forward(logits: jax.Array, reference_logits: jax.Array, tokens: jax.Array) -> tuple[Comparison, Any]:
    normaliser = checkpoint_name(jax.nn.logsumexp(logits, axis=-1), _KEPT)
    reference_normaliser = checkpoint_name(jax.nn.logsumexp(reference_logits, axis=-1), _KEPT)
    exact_kl = kl.of_laws(logits - normaliser[:, None], reference_logits - reference_normaliser[:, None])
    exact_kl = checkpoint_name(exact_kl, _KEPT)
    comparison = Comparison(
        # Subtracted after the choice: the law of the whole vocabulary would have to be written down to choose from it.
        log_probs=_select(logits, tokens) - normaliser,
        reference_log_probs=_select(reference_logits, tokens) - reference_normaliser,
        kl=exact_kl,
    )
    return comparison, (logits, reference_logits, tokens, normaliser, reference_normaliser, exact_kl)


def _compared_backward(kept: Any, cotangents: Comparison) -> tuple[jax.Array, None, None]:
    """∂ log π(y) / ∂ logit_v = 1{v = y} − π_v,  ∂ KL / ∂ logit_v = π_v (log π_v − log π_ref,v − KL)."""
    logits, reference_logits, tokens, normaliser, reference_normaliser, exact_kl = kept
    law, reference_law = logits - normaliser[:, None], reference_logits - reference_normaliser[:, None]
    policy = jnp.exp(law)
    chosen = jnp.arange(logits.shape[-1])[None, :] == tokens[:, None]
    of_log_prob, of_kl = cotangents.log_probs[:, None], cotangents.kl[:, None]
    excess = jnp.where(policy > 0, law - reference_law, policy) - exact_kl[:, None]
    return chosen * of_log_prob + policy * (of_kl * excess - of_log_prob), None, None


_compared.defvjp(_compared_forward, _compared_backward)


def _select(log_law: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_law, tokens[..., None], axis=-1)[..., 0]


def _in_chunks(function: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk_size: int) -> Any:
    """`function` over the flattened leading [B, N, T] of the arrays, `chunk_size` rows at a time, rematerialised."""
    shape = arrays[0].shape[:3]
    rows = shape[0] * shape[1] * shape[2]
    flat = [x.reshape(rows, *x.shape[3:]) for x in arrays]
    function = jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    if rows <= chunk_size:
        out = function(*flat)
    else:
        chunks = -(-rows // chunk_size)
        # Equal chunks waste fewer padded rows than full ones and a remainder.
        size = -(-rows // chunks)
        pad = chunks * size - rows
        chunked = [jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:]) for x in flat]
        out = jax.lax.map(lambda chunk: function(*chunk), chunked)
        out = jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:rows], out)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
