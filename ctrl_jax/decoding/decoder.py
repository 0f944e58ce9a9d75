"""What a decoder is: the way in which a policy is served."""

from typing import Protocol

import jax

from ctrl_jax.types import Params, Policy, Prompts, Responses, Score


class Decoder(Protocol):
    """One response to each prompt, [B, 1, T]: `score` may guide it, and `key` draws.

    A prompt's response is a function of (key, prompt id), so that batches and devices change none.
    """

    def __call__(self, policy: Policy, params: Params, score: Score, prompts: Prompts, key: jax.Array) -> Responses: ...
