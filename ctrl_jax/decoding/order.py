"""Decoders that draw n independent samples and pick one by the order of its reward: best-of-n, worst-of-n, ...

Of these alone theory knows all that it says of a procedure: win rates have an exact, unbiased estimator on more samples
than n (`steps.win_rate`), ideal policies a closed form (`theory.ideal`), and the best transform is known
(`theory.optimal`).
"""

import jax
import jax.numpy as jnp

from ctrl_jax.decoding.decoder import Decoded, Decoder
from ctrl_jax.steps import sampling
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Params, Policy, Prompts, Responses, Score


def decoder(
    procedure: Procedure,
    *,
    max_length: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Decoder:
    """Samples as `sampling.sample` does, and picks as the procedure does by the rewards of the samples."""

    def decode(policy: Policy, params: Params, score: Score, prompts: Prompts, key: jax.Array) -> Decoded:
        draw, pick = jax.random.split(key)
        responses = sampling.sample(
            policy, params, prompts, draw,
            num_samples=procedure.num_samples, max_length=max_length, eos_ids=eos_ids,
            temperature=temperature, top_k=top_k, top_p=top_p,
        ).responses  # fmt: skip
        return picked(procedure, prompts, responses, score(prompts, responses), pick)

    return decode


def picked(procedure: Procedure, prompts: Prompts, responses: Responses, rewards: jax.Array, key: jax.Array) -> Decoded:
    """The procedure's pick among responses [B, n, T] by their rewards [B, n]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.ids)
    index = jax.vmap(procedure.select)(rewards, keys)
    return Decoded(take(responses, index), responses.lengths.sum(axis=1), procedure.num_samples)


def take(responses: Responses, index: jax.Array) -> Responses:
    """The response [B, 1, T] at `index` [B] among each prompt's [B, N, T]."""
    rows, tokens, lengths = jnp.arange(len(index)), jnp.asarray(responses.tokens), jnp.asarray(responses.lengths)
    return Responses(tokens[rows, index][:, None], lengths[rows, index][:, None])
