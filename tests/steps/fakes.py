"""A language model small enough to enumerate: logits are a table over (prompt id mod 2, position, last token)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.types import Policy, Prompts, Responses

VOCABULARY, LENGTH, EOS = 3, 3, 2


def params(key: jax.Array, scale: float = 1.0) -> jax.Array:
    """[2, LENGTH, VOCABULARY + 1, VOCABULARY] logits; the last-token axis has one more for "none yet"."""
    return scale * jax.random.normal(key, (2, LENGTH, VOCABULARY + 1, VOCABULARY))


def _apply(params: jax.Array, prompts: Prompts, responses: Responses) -> jax.Array:
    before = jnp.pad(responses.tokens[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=VOCABULARY)
    position = jnp.arange(responses.tokens.shape[-1])[None, None]
    return params[(prompts.ids % 2)[:, None, None], position, before]


policy = Policy(
    apply=_apply,
    unembed=lambda params, features: features,
    prefill=lambda params, prompts: (params[prompts.ids % 2, 0, VOCABULARY], prompts.ids),
    start=lambda cache, num_samples, max_length: jnp.repeat(0.0 * cache, num_samples),
    decode=lambda params, cache, response_cache, lengths, tokens, index: (
        params[(cache % 2)[:, None], jnp.minimum(index + 1, LENGTH - 1), tokens],
        response_cache,
    ),
)


def prompts(*ids: int) -> Prompts:
    size = len(ids)
    return Prompts(jnp.zeros((size, 2), jnp.int32), jnp.ones(size, jnp.int32), jnp.array(ids, jnp.uint32))


def every_response() -> Responses:
    """All responses of the language, [1, Y, LENGTH]: those that end in EOS, and the cut ones without."""
    rows, lengths = [], []
    for length in range(1, LENGTH + 1):
        for body in itertools.product(range(VOCABULARY), repeat=length):
            if EOS in body[:-1] or (length < LENGTH and body[-1] != EOS):
                continue
            rows.append([*body, *[EOS] * (LENGTH - length)])
            lengths.append(length)
    return Responses(jnp.array([rows], jnp.int32), jnp.array([lengths], jnp.int32))


def log_prob_of(params: jax.Array, prompt: Prompts, responses: Responses, temperature: float = 1.0) -> jax.Array:
    """[1, Y] log π of whole responses, by the definition."""
    law = jax.nn.log_softmax(_apply(params, prompt, responses) / temperature)
    chosen = jnp.take_along_axis(law, responses.tokens[..., None], -1)[..., 0]
    mask = np.arange(LENGTH)[None, None] < np.asarray(responses.lengths)[..., None]
    return jnp.where(mask, chosen, 0).sum(-1)
