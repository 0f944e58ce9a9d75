"""Expectations over all groups of responses of the three-token language, each by its probability: no Monte Carlo."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.types import Experience, Responses, Rollouts
from tests.steps import fakes

EVERY = fakes.every_response()
Y = EVERY.lengths.shape[1]
PROMPT = fakes.prompts(0)


def law(params: jax.Array, every: Responses = EVERY) -> jax.Array:
    """[Y] π(y)."""
    return jnp.exp(fakes.log_prob_of(params, PROMPT, every)[0])


def token_log_probs(params: jax.Array, every: Responses = EVERY) -> jax.Array:
    """[Y, T], read from the table; behind a response they mean nothing."""
    laws = jax.nn.log_softmax(fakes.policy.apply(params, PROMPT, every))
    return jnp.take_along_axis(laws, every.tokens[..., None], -1)[0, ..., 0]


def groups(size: int, count: int = Y) -> tuple[np.ndarray, np.ndarray]:
    """([G, N] every multiset of responses by their places, [G] in how many orders it can be drawn)."""
    places = np.array(list(itertools.combinations_with_replacement(range(count), size)))
    repeats = [np.unique(row, return_counts=True)[1] for row in places]
    orders = [math.factorial(size) / math.prod(map(math.factorial, row.tolist())) for row in repeats]
    return places, np.array(orders, np.float32)


def experience(
    params: jax.Array, places: np.ndarray, raw: np.ndarray, references: np.ndarray, every: Responses = EVERY,
    constrained: np.ndarray | None = None,
) -> Experience:  # fmt: skip
    """Groups [G, N] of responses that `params` sampled, with raw rewards [Y], the reference's [K], and perhaps ranks
    [Y, M] by rewards that are constrained."""
    size = len(places)
    responses = Responses(every.tokens[0][places], every.lengths[0][places])
    sampled = jax.lax.stop_gradient(token_log_probs(params, every))[places]
    ascending = jnp.broadcast_to(jnp.sort(jnp.asarray(references, jnp.float32)), (size, len(references)))
    rollouts = Rollouts(fakes.prompts(*[0] * size), responses, sampled)
    ranks = None if constrained is None else jnp.asarray(constrained, jnp.float32)[places]
    return Experience(rollouts, jnp.asarray(raw, jnp.float32)[places], ascending, ranks)


def padded_otherwise(batch: Experience) -> Experience:
    """The batch with other tokens behind its responses."""
    responses = batch.rollouts.responses
    real = np.arange(responses.tokens.shape[-1]) < np.asarray(responses.lengths)[..., None]
    tokens = np.where(real, responses.tokens, 1)
    assert (tokens != responses.tokens).any()
    rollouts = dataclasses.replace(batch.rollouts, responses=dataclasses.replace(responses, tokens=tokens))
    return dataclasses.replace(batch, rollouts=rollouts)


def losses(algorithm: Ctrl, params: jax.Array, reference: jax.Array, batch: Experience) -> jax.Array:
    """[G] of each group by itself."""

    def one(group: Experience) -> jax.Array:
        return algorithm.loss(params, reference, group, algorithm.targets(group), algorithm.start())[0].value

    return jax.vmap(one)(jax.tree.map(lambda x: x[:, None], batch))


def expected_loss(
    algorithm: Ctrl, params: jax.Array, reference: jax.Array, *, size: int, raw: np.ndarray, references: np.ndarray,
    every: Responses = EVERY, constrained: np.ndarray | None = None,
) -> jax.Array:  # fmt: skip
    """Whose gradient is the expected gradient: the probabilities of groups are constants."""
    places, orders = groups(size, every.lengths.shape[1])
    chances = jax.lax.stop_gradient(law(params, every))[places].prod(axis=1) * orders
    batch = experience(params, places, raw, references, every, constrained)
    return jnp.sum(chances * losses(algorithm, params, reference, batch))


def where_it_rests(gradient, start: jax.Array, *, steps: int, rate: float) -> jax.Array:
    """The parameters at which steps along −gradient end."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), None, length=steps)[0][0]

    return train(start)
