"""Search by segments: of K responses that grow, the m best beginnings go on, in K / m copies each.

    draw the first L tokens of K responses
    until they are whole:    score the K beginnings, keep the m best, copy each K / m times, draw L tokens more of each
    take the best whole response

With m = 1 it is blockwise best-of-K (Mudgal et al. 2024, arXiv 2310.17022), otherwise TreeBoN (Qiu et al. 2024, arXiv
2410.16033) with the reward of a beginning as its score: K leaves in each layer, K / m children, segments of L tokens.
Where L is all of a response it is best-of-K. For the price of best-of-K, which draws as many tokens, it looks ahead
K / m ways from each of the best; it pays where the beginning of a response says how good the whole will be.

What it returns has no law in closed form, and no order of whole responses decides: theory/nearest.py finds the
procedure that comes nearest to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.decoding.decoder import MOST_SAMPLES, Decoded, Decoder
from ctrl_jax.decoding.order import take
from ctrl_jax.errors import InputError
from ctrl_jax.steps import sampling
from ctrl_jax.types import Params, Policy, Prompts, Responses, Score


@dataclass(frozen=True)
class Tree:
    width: int
    """K: responses that grow at a time."""
    kept: int
    """m, which divides K."""
    segment: int
    """L, in tokens."""

    def __post_init__(self) -> None:
        if not 2 <= self.width <= MOST_SAMPLES:
            raise InputError(
                f"The width of {self} is {self.width}",
                field="decoder",
                value=self.width,
                remedy=f"it must be between 2 and {MOST_SAMPLES}.",
            )
        if not 1 <= self.kept < self.width or self.width % self.kept:
            raise InputError(
                f"{self} keeps {self.kept} of {self.width}",
                field="decoder",
                value=self.kept,
                remedy="the number that is kept must divide the width, and be less.",
            )
        if self.segment < 1:
            raise InputError(
                f"The segments of {self} have {self.segment} tokens",
                field="decoder",
                value=self.segment,
                remedy="give at least 1.",
            )

    @property
    def num_samples(self) -> int:
        """Responses that are drawn at a time, as a procedure's."""
        return self.width

    @property
    def name(self) -> str:
        """What `names.parse` reads back."""
        if self.kept == 1:
            return f"blockwise_best_of_{self.width}({self.segment})"
        return f"tree_of_{self.width}({self.kept},{self.segment})"

    def __str__(self) -> str:
        return self.name

    def check_length(self, max_length: int) -> None:
        """Raises InputError where a segment is all of a response."""
        if self.segment >= max_length:
            raise InputError(
                f"{self} has segments of {self.segment} tokens, and responses have at most {max_length}",
                field="decoder",
                value=self.segment,
                remedy=f"give fewer, or best_of_{self.width}, which it would be.",
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Growth:
    """The K responses to each prompt while they grow."""

    state: sampling.State
    sampled: jax.Array
    """[B] tokens drawn so far."""


class Programs(NamedTuple):
    """The parts of a search that compute, between which `score` may be a function of the host."""

    start: Callable[[Params, Prompts, jax.Array], Growth]
    """The first token of each."""
    grow: Callable[[Params, Growth, jax.Array], Growth]
    """So many tokens more, [] int32."""
    keep: Callable[[Growth, jax.Array], Growth]
    """The best beginnings by their rewards [B, K], copied."""
    best: Callable[[Growth, jax.Array], Responses]
    """The best response [B, 1, T] by the rewards [B, K]."""


def programs(
    tree: Tree, policy: Policy, *, max_length: int, eos_ids: tuple[int, ...], temperature: float = 1.0
) -> Programs:
    """As plain functions."""
    law: dict[str, Any] = {"eos_ids": eos_ids, "temperature": temperature}

    def start(params: Params, prompts: Prompts, key: jax.Array) -> Growth:
        state = sampling.start(policy, params, prompts, key, num_samples=tree.width, max_length=max_length, **law)
        return Growth(state, state.rollouts.responses.lengths.sum(axis=1))

    def grow(params: Params, found: Growth, tokens: jax.Array) -> Growth:
        end = found.state.index + tokens

        def one(state: sampling.State) -> sampling.State:
            return sampling.advance(policy, params, state, **law)

        state = jax.lax.while_loop(lambda state: (state.index < end) & state.alive.any(), one, found.state)
        # Behind the end of all responses nothing is read; the place is the same on all devices.
        state = replace(state, index=end)
        drawn = state.rollouts.responses.lengths - found.state.rollouts.responses.lengths
        return Growth(state, found.sampled + drawn.sum(axis=1))

    return Programs(start, grow, partial(keep, tree), best)


def keep(tree: Tree, found: Growth, rewards: jax.Array) -> Growth:
    """The `kept` best of each prompt's beginnings by their rewards [B, K], in K / m copies; those that are first, of
    equal ones. A copy goes on by the draws of its own place, so that no two are alike for long."""
    _, kept = jax.lax.top_k(rewards, tree.kept)
    index = jnp.repeat(kept, tree.width // tree.kept, axis=1)
    return replace(found, state=sampling.continued(found.state, index))


def best(found: Growth, rewards: jax.Array) -> Responses:
    return take(found.state.rollouts.responses, jnp.argmax(rewards, axis=1))


def search(
    tree: Tree, made: Programs, params: Params, score: Score, prompts: Prompts, key: jax.Array, *, max_length: int
) -> Decoded:
    """Runs the programs, with `score` between them."""
    found, drawn = made.start(params, prompts, key), 1
    ends = [*range(tree.segment, max_length, tree.segment), max_length]
    for end in ends:
        found = made.grow(params, found, jnp.int32(end - drawn))
        drawn = end
        rewards = score(prompts, found.state.rollouts.responses)
        if end < max_length:
            found = made.keep(found, rewards)
    return Decoded(made.best(found, rewards), found.sampled, len(ends) * tree.width)


def decoder(tree: Tree, *, max_length: int, eos_ids: tuple[int, ...], temperature: float = 1.0) -> Decoder:
    """Raises InputError where a segment is all of a response."""
    tree.check_length(max_length)

    def decode(policy: Policy, params: Params, score: Score, prompts: Prompts, key: jax.Array) -> Decoded:
        made = programs(tree, policy, max_length=max_length, eos_ids=eos_ids, temperature=temperature)
        return search(tree, made, params, score, prompts, key, max_length=max_length)

    return decode
