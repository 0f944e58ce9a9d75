"""Several rewards of texts as one, for `align` and for trainers of your own."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.library.model import Model, Prompt, generate
from ctrl_jax.rewards import function
from ctrl_jax.runtime import checksums
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.steps import calibration, combination

Reward = Callable[[list[Any], list[str]], Sequence[float]]
"""(prompts as they were given, a response to each) to a raw reward of each."""


def combined_reward(
    rewards: Sequence[Reward],
    *,
    by: str = "smallest_calibrated",
    weights: Sequence[float] = (),
    reference: Model | None = None,
    references: int = 64,
    max_length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> Reward:
    """One reward of several.

    - `smallest_calibrated`: min_m C_m, the lowest of the ranks in [0, 1] that the rewards give a response among the
      reference's responses to its prompt. Ranks are comparable whatever the rewards' units, so there is nothing to
      weigh.
    - `log_sigmoids(q)`: Σ_m log σ(r_m − the quantile q of the reference's r_m) (Wang et al. 2024, arXiv 2402.00742).
    - `weighted_sum`: Σ_m w_m r_m.

    For the first two the reference answers a prompt `references` times when it is first seen. What its answers got
    stays in memory.

    Args:
      rewards: two or more functions (prompts, responses) to a float each.
      by: one of the above.
      weights: of each reward, for `weighted_sum` alone.
      reference: what the responses are compared with; what you give `align` as its model.
      references: K, of its responses a prompt.
      max_length: T, tokens of these; as the policy's.
      temperature: of these; as the policy's.
      seed: of these.

    Returns:
      A function (prompts, responses) to a list of floats.

    Raises:
      InputError: for an option that cannot be used.
    """
    made, given = combination.parse(by, tuple(weights)), tuple(weights)
    if len(rewards) < 2:
        raise InputError(
            f"rewards has {len(rewards)}", field="rewards", value=len(rewards), remedy="give at least two functions."
        )
    if isinstance(made, combination.WeightedSum) and not (
        len(given) == len(rewards) and all(map(math.isfinite, given))
    ):
        raise InputError(
            f"weights is {given}, and there are {len(rewards)} rewards",
            field="weights",
            value=given,
            remedy="give a finite number for each.",
        )
    if made.compares and reference is None:
        raise InputError(
            f"{made} compares responses with a reference's",
            field="reference",
            value=None,
            remedy="give the model that the policy starts from, as load_model returns it.",
        )
    draws = {"num_samples": references, "max_length": max_length, "temperature": temperature, "seed": seed}
    return Combined(tuple(rewards), made, reference if made.compares else None, draws)


@dataclass(eq=False)
class Combined:
    """A combination of rewards as a function of texts, which `combined_reward` makes."""

    rewards: tuple[Reward, ...]
    combination: combination.Combination
    reference: Model | None
    """None where nothing is compared."""
    draws: Mapping[str, Any]
    """How the reference is drawn from: options of `generate`."""
    _known: dict[str, np.ndarray] = field(default_factory=dict)
    """[K, R] by the prompt: what the rewards gave the reference's responses to it."""

    def __call__(self, prompts: list[Any], responses: list[str]) -> list[float]:
        values = self._scores(prompts, responses)[:, None]
        compared = None if self.reference is None else self._of_references(self.reference, prompts)
        ones: list[float] = np.asarray(self.combination(values, compared))[:, 0].tolist()  # type: ignore[arg-type]
        return ones

    @functools.cached_property
    def known_by(self) -> dict[str, str]:
        """What its answers depend on, by which `align` recognises it."""
        parts = [function.given(reward).sources for reward in self.rewards]
        model = self.reference
        return {
            "rewards": fingerprint({"parts": parts}),
            "combination": repr(self.combination),
            "reference": repr(model and (checksums.of_arrays(model.params), model.dtype, model.format)),
            "draws": repr(dict(self.draws)),
        }

    def _scores(self, prompts: list[Any], responses: list[str]) -> np.ndarray:
        """[n, R]"""
        found = []
        for place, reward in enumerate(self.rewards):
            values = np.asarray(reward(prompts, responses), np.float32)
            if values.shape != (len(responses),) or calibration.out_of_range(values).any():
                raise InputError(
                    f"rewards[{place}] returned an array of shape {values.shape} for {len(responses)} responses, or "
                    "one with a number that is not finite",
                    field=f"rewards[{place}]",
                    value=values.shape,
                    remedy="return one finite float for each.",
                )
            found.append(values)
        return np.stack(found, axis=-1)

    def _of_references(self, reference: Model, prompts: list[Prompt]) -> np.ndarray:
        """[n, K, R]"""
        new = {repr(prompt): prompt for prompt in prompts if repr(prompt) not in self._known}
        if new:
            texts = generate(reference, [*new.values()], **self.draws)
            asked = [prompt for prompt, row in zip(new.values(), texts, strict=True) for _ in row]
            found = self._scores(asked, [text for row in texts for text in row])
            self._known.update(zip(new, found.reshape(len(new), -1, len(self.rewards)), strict=True))
        return np.stack([self._known[repr(prompt)] for prompt in prompts])
