"""Several rewards as one, by a combination that may compare each with what the reference's responses get."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.steps.combination import Combination
from ctrl_jax.types import Prompts, Responses

References = Callable[[Prompts], Responses]
"""The reference policy's own responses [B, K] to prompts, the same ones whenever a prompt is asked for."""


def reward(
    parts: Sequence[Reward], combination: Combination, references: References | None = None, *, drawn: str = ""
) -> Reward:
    """The reward that a combination makes of its R parts.

    Where the combination compares, the reference's responses to a prompt are drawn and scored when the prompt is first
    seen, and what the parts gave them is kept in memory.

    Args:
      parts: R rewards.
      combination: what is made of them.
      references: asked for where the combination compares.
      drawn: names the policy, the options and the keys by which `references` draws; part of the fingerprint.
    """
    known: dict[int, np.ndarray] = {}  # [K, R] by the prompt's id

    def scores(prompts: Prompts, responses: Responses) -> np.ndarray:
        each = [np.asarray(hosts.fetch(part.score(prompts, responses))) for part in parts]
        return np.stack(each, axis=-1)

    def of_references(prompts: Prompts) -> np.ndarray:
        assert references is not None, "a combination that compares is given them"
        ids = np.asarray(hosts.fetch(prompts.ids)).tolist()
        if not known.keys() >= set(ids):
            known.update(zip(ids, scores(prompts, references(prompts)), strict=True))
        return np.stack([known[prompt_id] for prompt_id in ids])

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        compared = jnp.asarray(of_references(prompts)) if combination.compares else None
        return np.asarray(combination(jnp.asarray(scores(prompts, responses)), compared))

    weights = getattr(combination, "weights", ())
    made_of = {"parts": [part.fingerprint for part in parts], "by": str(combination), "weights": weights}
    return Reward(
        score,
        f"combined-{fingerprint(made_of | {'drawn': drawn if combination.compares else ''})}",
        name=f"{combination} of {', '.join(part.name for part in parts)}",
        tolerance=max(part.tolerance for part in parts),
        columns=tuple(dict.fromkeys(column for part in parts for column in part.columns)),
    )
