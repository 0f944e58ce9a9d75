"""Several rewards as one, by a combination that may compare each with what the reference's responses get."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.steps import combination as combinations
from ctrl_jax.steps.combination import Combination
from ctrl_jax.types import Prompts, Responses, Score

Compared = Callable[[Prompts], np.ndarray]
"""Of prompts, what each of the R rewards gives the reference's own responses: [B, K, R]."""


def scores(parts: Sequence[Reward], prompts: Prompts, responses: Responses) -> np.ndarray:
    """What each reward gives: [B, N, R], in the memory of every host."""
    return np.stack([np.asarray(hosts.fetch(part.score(prompts, responses))) for part in parts], axis=-1)


def functions(parts: Sequence[Reward]) -> tuple[Reward, ...]:
    """Those of the rewards that are Python functions."""
    return tuple(part for part in parts if part.fingerprint.startswith("function-"))


def ranks(parts: Sequence[Reward], compared: Compared) -> Score:
    """(prompts, responses [B, N]) to the ranks [B, N, R] by each reward among the reference's own responses."""

    def rank(prompts: Prompts, responses: Responses) -> np.ndarray:
        both = scores(parts, prompts, responses), compared(prompts)
        return np.asarray(combinations.ranks(*map(jnp.asarray, both)))

    return rank


def reward(
    parts: Sequence[Reward], combination: Combination, compared: Compared | None = None, *, drawn: str = ""
) -> Reward:
    """The reward that a combination makes of its R parts.

    Args:
      parts: R rewards.
      combination: what is made of them.
      compared: asked for where the combination compares.
      drawn: names what `compared` follows from besides the parts; it enters the fingerprint where it is asked for.
    """

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        references = None
        if combination.compares:
            assert compared is not None, "a combination that compares is given it"
            references = jnp.asarray(compared(prompts))
        return np.asarray(combination(jnp.asarray(scores(parts, prompts, responses)), references))

    made_of = {
        "parts": [part.fingerprint for part in parts],
        "by": str(combination),
        "weights": getattr(combination, "weights", ()),
        "drawn": drawn if combination.compares else "",
    }
    return Reward(
        score,
        f"combined-{fingerprint(made_of)}",
        name=f"{combination} of {', '.join(part.name for part in parts)}",
        tolerance=max(part.tolerance for part in parts),
        columns=tuple(dict.fromkeys(column for part in parts for column in part.columns)),
        functions=functions(parts),
    )
