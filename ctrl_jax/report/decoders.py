"""Decoders beside one another: what the policy wins by each, at which cost, and the procedure that each comes near."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ctrl_jax.evaluation import Estimate, Picks
from ctrl_jax.report.judgement import by_name, estimates
from ctrl_jax.steps import win_rate
from ctrl_jax.theory.nearest import Nearest
from ctrl_jax.theory.precision import double_precision
from ctrl_jax.theory.procedures import Sampling

SIDES = ("policy", "reference")


@dataclass(frozen=True)
class Decoding:
    """A policy and its reference, both decoded alike; intervals are over prompts."""

    name: str
    win_rate: Estimate
    """How often the policy's response beats the reference's."""
    gold_win_rate: Estimate | None
    against_one: Mapping[str, Estimate]
    """By side: how often what it returns beats one plain response of the reference: what the decoder's cost buys."""
    tokens: Mapping[str, float]
    """By side: tokens drawn for one response, in the mean over prompts."""
    scored: int
    """Responses, or beginnings, that the reward reads for one."""
    is_search: bool
    """Whether it is no procedure."""
    nearest: Nearest | None
    """The procedure that a search comes near; None where the run has no calibration table to know it by."""
    difference: Estimate | None = None
    """What the policy wins more than the one beside it, on the same prompts."""

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        tree["nearest"] = self.nearest and {
            "procedure": self.nearest.procedure.name,
            "distance": self.nearest.distance,
        }
        for name in ("win_rate", "gold_win_rate", "difference"):
            estimate = getattr(self, name)
            tree[name] = estimate and estimate._asdict()
        tree["against_one"] = by_name(self.against_one)
        return tree


def measure(
    name: str,
    sides: Mapping[str, Picks],
    one: np.ndarray,
    is_search: bool,
    nearest: Nearest | None,
    *,
    resamples: int = 1000,
) -> Decoding:
    """Of R responses that a decoder returned on each side, and plain responses of the reference.

    Win rates are means over all pairs of responses of a prompt, ties counting ½, and so unbiased.

    Args:
      name: the decoder's.
      sides: by `policy` and `reference`, and perhaps `beside`, for the same B prompts.
      one: [B, M] raw rewards of the reference's responses.
      is_search: whether the decoder is no procedure.
      nearest: of theory/nearest.py, for a search.
      resamples: of the prompts, behind the intervals.
    """
    policy, reference = (sides[side] for side in SIDES)

    def won(ours: np.ndarray, theirs: np.ndarray) -> Any:
        return win_rate.win_rate(jnp.asarray(ours, jnp.float64), jnp.asarray(theirs, jnp.float64), Sampling())

    with double_precision():
        per_prompt = {"win_rate": won(policy.rewards, reference.rewards)}
        if policy.gold is not None and reference.gold is not None:
            per_prompt["gold"] = won(policy.gold, reference.gold)
        per_prompt |= {side: won(sides[side].rewards, one) for side in SIDES}
        found = estimates(per_prompt, resamples)
        beside = sides.get("beside")
        more = {} if beside is None else {"more": per_prompt["win_rate"] - won(beside.rewards, reference.rewards)}
        difference = estimates(more, resamples, bounds=(-1, 1)).get("more")
    return Decoding(
        name=name,
        win_rate=found["win_rate"],
        gold_win_rate=found.get("gold"),
        against_one={side: found[side] for side in SIDES},
        tokens={side: float(sides[side].sampled.mean()) for side in SIDES},
        scored=policy.scored,
        is_search=is_search,
        nearest=nearest,
        difference=difference,
    )
