"""What a decoder is: the way in which a policy is served."""

from typing import NamedTuple, Protocol

import jax

from ctrl_jax.types import Params, Policy, Prompts, Responses, Score

MOST_SAMPLES = 1024
"""Responses that are drawn at a time for one, at most."""


class Decoded(NamedTuple):
    responses: Responses
    """[B, 1, T]."""
    sampled: jax.Array
    """[B] tokens that were drawn for it, those of what was thrown away among them."""
    scored: int
    """Responses, or beginnings of them, that `score` read for it."""


class Decoder(Protocol):
    """One response to each prompt: `score` may guide it, and `key` draws.

    A prompt's response is a function of (key, prompt id), so that batches and devices change none.
    """

    def __call__(self, policy: Policy, params: Params, score: Score, prompts: Prompts, key: jax.Array) -> Decoded: ...
