"""What every reward is to the steps and the stages, wherever it comes from."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ctrl_jax.types import Prompts, Responses

Score = Callable[[Prompts, Responses], Any]
"""Raw rewards [B, N] of responses: a jitted network, or a function of the host."""


class Reward(NamedTuple):
    score: Score
    fingerprint: str
    """Names the reward by content: whatever depends on it has this in its key."""
    name: str = "model"
    """Names it to a reader."""
    tolerance: float = 1e-5
    """How far two of its answers to the same text may be apart, as a share of the largest reward. Of a function it is
    small, but not 0: it may be a network as well, on another machine than before."""
    columns: tuple[str, ...] = ()
    """Columns of the data that it reads beside prompts and responses."""


ROUNDING = {"float32": 0.02, "bfloat16": 0.1}
"""The tolerance of a network by its dtype: rounding differs between devices, and another network's answers differ by
far more."""
