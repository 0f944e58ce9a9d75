"""Several rewards of texts as one, for `align` and for trainers of your own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.library.model import Model, Prompt, generate
from ctrl_jax.steps import combination

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
    made, weights = combination.parse(by, tuple(weights)), tuple(weights)
    if len(rewards) < 2:
        raise InputError(
            f"rewards has {len(rewards)}", field="rewards", value=len(rewards), remedy="give at least two functions."
        )
    if isinstance(made, combination.WeightedSum) and len(weights) != len(rewards):
        raise InputError(
            f"There are {len(weights)} weights and {len(rewards)} rewards",
            field="weights",
            value=weights,
            remedy="give one for each.",
        )
    if made.compares and reference is None:
        raise InputError(
            f"{made} compares responses with a reference's",
            field="reference",
            value=None,
            remedy="give the model that the policy starts from, as load_model returns it.",
        )
    known: dict[str, np.ndarray] = {}  # [K, R] by the prompt

    def scores(prompts: list[Any], responses: list[str]) -> np.ndarray:
        return np.stack([np.asarray(reward(prompts, responses), np.float32) for reward in rewards], axis=-1)

    def of_references(prompts: list[Prompt]) -> np.ndarray:
        new = {repr(prompt): prompt for prompt in prompts if repr(prompt) not in known}
        if new:
            assert reference is not None, "refused above"
            texts = generate(
                reference, [*new.values()],
                num_samples=references, max_length=max_length, temperature=temperature, seed=seed,
            )  # fmt: skip
            asked = [prompt for prompt in new.values() for _ in range(references)]
            found = scores(asked, [text for row in texts for text in row])
            known.update(zip(new, found.reshape(len(new), references, -1), strict=True))
        return np.stack([known[repr(prompt)] for prompt in prompts])

    def combined(prompts: list[Any], responses: list[str]) -> list[float]:
        values = scores(prompts, responses)[:, None]
        compared = of_references(prompts) if made.compares else None
        ones: list[float] = np.asarray(made(values, compared))[:, 0].tolist()  # type: ignore[arg-type]
        return ones

    return combined
