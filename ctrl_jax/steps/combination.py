"""Several rewards of a response made one: how much of each, or the worst of them by rank.

A combination is a pure function of the R rewards of a response, and, where it compares them with what the reference
policy's own responses to the prompt get, of theirs. `parse` reads a combination's `name` back.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.errors import InputError
from ctrl_jax.steps import calibration
from ctrl_jax.theory.names import number, split_call, unknown


class Combination(abc.ABC):
    """Makes one reward of R."""

    compares: bool = False
    """Whether it asks for the rewards of the reference policy's responses to the same prompt."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What `parse` reads back."""

    @abc.abstractmethod
    def __call__(self, rewards: jax.Array, reference_rewards: jax.Array | None = None) -> jax.Array:
        """One reward [B, N] of `rewards` [B, N, R] and the reference's on the same prompts [B, K, R]."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class WeightedSum(Combination):
    """Σ_m w_m r_m. What the weights mean depends on the rewards' scales, which differ from prompt to prompt as well."""

    weights: tuple[float, ...]
    """[R]"""

    @property
    def name(self) -> str:
        return "weighted_sum"

    def __call__(self, rewards: jax.Array, reference_rewards: jax.Array | None = None) -> jax.Array:
        weights = jnp.asarray(self.weights, jnp.asarray(rewards).dtype)
        return jnp.einsum("bnr,r->bn", rewards, weights, precision="highest")  # on accelerators, too


@dataclass(frozen=True)
class LogSigmoids(Combination):
    """Σ_m log σ(r_m − q_m), q_m the quantile of a level of the reference's rewards on the prompt.

    It is the log of the probability that the response is better than a good one of the reference by all of the rewards,
    were each a Bradley-Terry model and all independent: no reward makes up for another that is low (Wang et al. 2024,
    "Transforming and Combining Rewards for Aligning Large Language Models", arXiv 2402.00742, section 4, at the 85th
    percentile).
    """

    level: float = 0.85
    """Of the quantile, in (0, 1)."""
    compares = True

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise InputError(
                f"log_sigmoids is centred at the quantile {self.level:g}",
                field="combination",
                value=self.level,
                remedy="its level is between 0 and 1, such as log_sigmoids(0.85).",
            )

    @property
    def name(self) -> str:
        return f"log_sigmoids({number(self.level)})"

    def __call__(self, rewards: jax.Array, reference_rewards: jax.Array | None = None) -> jax.Array:
        centres = jnp.quantile(_given(self, reference_rewards), self.level, axis=1, keepdims=True)
        return jax.nn.log_sigmoid(rewards - centres).sum(axis=-1)


@dataclass(frozen=True)
class SmallestCalibrated(Combination):
    """min_m C_m, C_m the rank of r_m among the reference's on the prompt: in [0, 1].

    Ranks are on one scale, whatever the rewards' units, and on each prompt: .9 says of any reward that nine in ten
    responses of the reference are worse. So there are no weights to choose, and no reward can buy another.
    """

    compares = True

    @property
    def name(self) -> str:
        return "smallest_calibrated"

    def __call__(self, rewards: jax.Array, reference_rewards: jax.Array | None = None) -> jax.Array:
        return ranks(rewards, _given(self, reference_rewards)).min(axis=-1)


def ranks(rewards: jax.Array, reference_rewards: jax.Array) -> jax.Array:
    """C_m: [B, N, R] in [0, 1], of each of R rewards [B, N, R] among those of the reference's responses [B, K, R]."""
    first = jnp.moveaxis(jnp.asarray(rewards), -1, 0), jnp.moveaxis(jnp.asarray(reference_rewards), -1, 0)
    return jnp.moveaxis(calibration.calibrate(*first), 0, -1)


def _given(combination: Combination, reference_rewards: jax.Array | None) -> jax.Array:
    if reference_rewards is None:
        raise InputError(
            f"{combination} compares rewards with those of the reference's responses",
            field="reference_rewards",
            value=None,
            remedy="give them, [B, K, R].",
        )
    return jnp.asarray(reference_rewards)


def parse(text: str, weights: tuple[float, ...] = ()) -> Combination:
    """A combination from its name: "weighted_sum", "log_sigmoids(0.85)" or "smallest_calibrated".

    Args:
      text: the name.
      weights: [R], which weighted_sum alone takes.

    Raises:
      InputError: for another name, a number or weights that do not belong to it.
    """
    name, argument = split_call(text)
    if name == "log_sigmoids":
        found: Combination = LogSigmoids() if argument is None else LogSigmoids(argument)
    elif name in ("weighted_sum", "smallest_calibrated"):
        if argument is not None:
            raise InputError(
                f"{text!r} has a number, but {name} takes none",
                field="combination",
                value=text,
                remedy=f"write {name}.",
            )
        found = WeightedSum(weights) if name == "weighted_sum" else SmallestCalibrated()
    else:
        raise unknown("combination", text, ["weighted_sum", "log_sigmoids(0.85)", "smallest_calibrated"])
    if weights and not isinstance(found, WeightedSum):
        raise InputError(
            f"{found} has no weights, and {weights} are given",
            field="weights",
            value=weights,
            remedy="leave them out, or choose weighted_sum.",
        )
    return found
