"""Decoders that draw n independent samples and pick one by the order of its reward: best-of-n, worst-of-n, ...

Of these alone theory knows all that it says of a procedure: win rates have an exact, unbiased estimator on more samples
than n (`steps.win_rate`), ideal policies a closed form (`theory.ideal`), and the best transform is known
(`theory.optimal`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ctrl_jax.decoding.decoder import Decoded, Decoder
from ctrl_jax.steps import sampling
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Params, Policy, Prompts, Responses, Rollouts, Score


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
        def sample(params: Params, prompts: Prompts, key: jax.Array) -> Rollouts:
            return sampling.sample(
                policy, params, prompts, key,
                num_samples=procedure.num_samples, max_length=max_length, eos_ids=eos_ids,
                temperature=temperature, top_k=top_k, top_p=top_p,
            )  # fmt: skip

        return run(procedure, sample, partial(pick, procedure), params, score, prompts, key)

    return decode


def run(
    procedure: Procedure,
    sample: Callable[[Params, Prompts, jax.Array], Rollouts],
    choose: Callable[[Prompts, Responses, jax.Array, jax.Array], tuple[Responses, jax.Array]],
    params: Params,
    score: Score,
    prompts: Prompts,
    key: jax.Array,
) -> Decoded:
    """Draws and picks by these functions or programs, with `score` between them, which may be one of the host."""
    draw_key, pick_key = jax.random.split(key)
    responses = sample(params, prompts, draw_key).responses
    return Decoded(*choose(prompts, responses, score(prompts, responses), pick_key), procedure.num_samples)


def pick(
    procedure: Procedure, prompts: Prompts, responses: Responses, rewards: jax.Array, key: jax.Array
) -> tuple[Responses, jax.Array]:
    """(the procedure's pick [B, 1, T] among responses [B, n, T] by their rewards [B, n], the tokens [B] of all n)"""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.ids)
    index = jax.vmap(procedure.select)(rewards, keys)
    return take(responses, index), responses.lengths.sum(axis=1)


def take(responses: Responses, index: jax.Array) -> Responses:
    """The response [B, 1, T] at `index` [B] among each prompt's [B, N, T]."""
    rows, tokens, lengths = jnp.arange(len(index)), jnp.asarray(responses.tokens), jnp.asarray(responses.lengths)
    return Responses(tokens[rows, index][:, None], lengths[rows, index][:, None])
