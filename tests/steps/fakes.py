"""A language model small enough to enumerate: logits are a table over (prompt id mod 2, position, last two tokens).

Of three tokens that is all of a prefix, so that the table can have any law of responses.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.types import Policy, Prompts, Responses

VOCABULARY, LENGTH, EOS = 3, 3, 2


def params(key: jax.Array, scale: float = 1.0) -> jax.Array:
    """[2, LENGTH, VOCABULARY + 1, VOCABULARY + 1, VOCABULARY] logits; a last token has one value more, "none yet"."""
    return scale * jax.random.normal(key, (2, LENGTH, VOCABULARY + 1, VOCABULARY + 1, VOCABULARY))


def logits(params: np.ndarray, prompt: int, before: Sequence[int]) -> np.ndarray:
    """[VOCABULARY] of the token behind those `before`, by the definition."""
    last_but_one, last = [VOCABULARY, VOCABULARY, *before][-2:]
    return params[prompt % 2, len(before), last_but_one, last]


def _apply(params: jax.Array, prompts: Prompts, responses: Responses) -> jax.Array:
    none = ((0, 0), (0, 0), (2, 0))
    before = jnp.pad(responses.tokens, none, constant_values=VOCABULARY)
    position = jnp.arange(responses.tokens.shape[-1])[None, None]
    return params[(prompts.ids % 2)[:, None, None], position, before[..., :-2], before[..., 1:-1]]


def _decode(params, cache, response_cache, lengths, tokens, index):
    """The cache of a response is its last token but one."""
    position = jnp.minimum(index + 1, LENGTH - 1)
    before = response_cache.reshape(tokens.shape)
    return params[(cache % 2)[:, None], position, before, tokens], tokens.reshape(-1)


policy = Policy(
    below=lambda params, prompts, responses: (),
    above=lambda params, trunk, prompts, responses: _apply(params, prompts, responses),
    unembed=lambda params, features: features,
    prefill=lambda params, prompts: (params[prompts.ids % 2, 0, VOCABULARY, VOCABULARY], prompts.ids),
    start=lambda cache, num_samples, max_length: jnp.repeat(0 * cache.astype(jnp.int32) + VOCABULARY, num_samples),
    decode=_decode,
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
