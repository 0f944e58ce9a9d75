"""Win rates under many procedures of arrays that anybody sampled and scored."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate
from ctrl_jax.steps import calibration
from ctrl_jax.steps import win_rate as steps
from ctrl_jax.theory.precision import double_precision
from ctrl_jax.theory.procedures import BestOfN, Procedure, Sampling, WorstOfN

RANK = "calibrated reward"
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Judgement:
    """A policy beside its reference; intervals are over prompts."""

    prompts: int
    samples: tuple[int, int]
    """M and M', responses a prompt of the policy and of the reference."""
    calibrated_reward: Estimate
    """The mean rank of a single response among the reference's, in [0, 1]; the reference's own is ½."""
    ties: float
    """The share of pairs (policy, reference) with equal rewards."""
    win_rates: Mapping[str, Estimate]
    """By procedure, which decodes both sides."""
    judge_win_rates: Mapping[str, Estimate]
    """What the judge says of the same picks; empty without one."""

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "samples": list(self.samples),
            "calibrated_reward": self.calibrated_reward._asdict(),
            "ties": self.ties,
            "win_rates": by_name(self.win_rates),
            "judge_win_rates": by_name(self.judge_win_rates),
        }


class Sides(NamedTuple):
    """Float64, [B, M] of the policy and [B, M'] of the reference."""

    policy_rewards: np.ndarray
    reference_rewards: np.ndarray
    policy_judged: np.ndarray | None
    reference_judged: np.ndarray | None


def judge(
    policy_rewards: ArrayLike,
    reference_rewards: ArrayLike,
    *,
    procedures: Sequence[Procedure] | None = None,
    policy_judged: ArrayLike | None = None,
    reference_judged: ArrayLike | None = None,
    resamples: int = 1000,
) -> Judgement:
    """Unbiased win rates of a policy against its reference, from rewards of responses that anybody sampled.

    Both sides are decoded by the same procedure, and ties count ½ (InfAlign, Balashankar et al. 2024, arXiv
    2412.19792). Intervals are 95 %, bootstrap-t over prompts.

    Args:
      policy_rewards: [B, M] of the policy's responses to B prompts.
      reference_rewards: [B, M'] of the reference's responses to the same prompts.
      procedures: by default one sample, and best and worst of 2, 4, 8 ... as far as both sides have samples.
      policy_judged: [B, M] of a judge, who says which of the picks wins; with `reference_judged`.
      reference_judged: [B, M'].
      resamples: of the prompts, behind the intervals.

    Raises:
      InputError: if shapes do not fit, a number is not finite, or a procedure needs more samples than there are.
    """
    sides = checked(policy_rewards, reference_rewards, policy_judged, reference_judged)
    _check_procedures(procedures)
    samples = sides.policy_rewards.shape[1], sides.reference_rewards.shape[1]
    asked = _nested(min(samples)) if procedures is None else procedures
    with double_precision():
        ours, theirs = jnp.asarray(sides.policy_rewards), jnp.asarray(sides.reference_rewards)
        per_prompt = {RANK: calibration.calibrate(ours, theirs).mean(axis=1)}
        per_prompt |= {one.name: won(sides, one) for one in asked}
        found = estimates(per_prompt, resamples)
        judged = {one.name: won_by_judge(sides, one) for one in asked if has_judge(sides)}
        return Judgement(
            prompts=len(ours),
            samples=samples,
            calibrated_reward=found.pop(RANK),
            ties=float(steps.share_of_ties(ours, theirs).mean()),
            win_rates=found,
            judge_win_rates=estimates(judged, resamples),
        )


def checked(
    policy: ArrayLike, reference: ArrayLike, policy_judged: ArrayLike | None, reference_judged: ArrayLike | None
) -> Sides:
    """Raises InputError where the arrays are not [B, M], [B, M'] and the judge's of the same shapes, all finite."""
    ours, theirs = _array("policy_rewards", policy), _array("reference_rewards", reference)
    if len(ours) != len(theirs):
        raise InputError(
            f"policy_rewards has shape {ours.shape} and reference_rewards {theirs.shape}",
            field="reference_rewards",
            value=theirs.shape,
            remedy="give a row for each of the same B prompts.",
        )
    if policy_judged is None or reference_judged is None:
        if policy_judged is not None or reference_judged is not None:
            missing = "policy_judged" if policy_judged is None else "reference_judged"
            raise InputError(
                f"{missing} is missing", field=missing, value=None, remedy="give the judge's values of both sides."
            )
        return Sides(ours, theirs, None, None)
    our_values, their_values = _array("policy_judged", policy_judged), _array("reference_judged", reference_judged)
    check_judged(policy=(ours, our_values), reference=(theirs, their_values))
    return Sides(ours, theirs, our_values, their_values)


def check_judged(**sides: tuple[Any, Any]) -> None:
    """Raises InputError unless the judge's values of each side have the shape of its rewards: (rewards, values)."""
    for name, (rewards, values) in sides.items():
        if values.shape != rewards.shape:
            raise InputError(
                f"{name}_judged has shape {values.shape} and {name}_rewards {rewards.shape}",
                field=f"{name}_judged",
                value=values.shape,
                remedy="give one value for each response.",
            )


def _check_procedures(procedures: Any) -> None:
    """Raises InputError unless it is None or a list of procedures."""
    listed = isinstance(procedures, Sequence) and all(isinstance(one, Procedure) for one in procedures)
    if procedures is not None and not listed:
        raise InputError(
            f"procedures is {procedures!r:.80}",
            field="procedures",
            value=procedures,
            remedy="give a list of procedures, such as [best_of(4)]; ctrl_jax.procedure reads names.",
        )


def has_judge(sides: Sides) -> bool:
    return sides.policy_judged is not None


def won(sides: Sides, procedure: Procedure, against: Procedure | None = None) -> jax.Array:
    """Win rates [B] by the rewards; within `double_precision`."""
    ours, theirs = jnp.asarray(sides.policy_rewards), jnp.asarray(sides.reference_rewards)
    return steps.win_rate(ours, theirs, procedure, against)


def won_by_judge(sides: Sides, procedure: Procedure, against: Procedure | None = None) -> jax.Array:
    """Win rates [B] of the same picks by the judge."""
    policy, reference, ours, theirs = (jnp.asarray(values) for values in sides)
    return steps.judged_win_rate(policy, reference, ours, theirs, procedure, against)


def estimates(
    per_prompt: Mapping[Name, jax.Array],
    resamples: int,
    *,
    bounds: tuple[float, float] = (0, 1),
    level: float = 0.95,
) -> dict[Name, Estimate]:
    """What `steps.interval` says of the mean of each [B], of resamples that are drawn once for all."""
    if not per_prompt:
        return {}
    values = np.stack([np.asarray(one) for one in per_prompt.values()], axis=1)
    count = len(values)
    steps.check_interval(count, resamples=resamples, level=level)
    means = values.mean(axis=0)
    apart = values - means  # so that squares lose nothing
    spreads = np.where(np.ptp(values, axis=0) == 0, np.nan, values.std(axis=0, ddof=min(1, count - 1)))
    drawn = np.asarray(steps.resampled(jax.random.key(0), count, resamples))
    weights = np.stack([np.bincount(places, minlength=count) for places in drawn]) / count
    offsets = weights @ apart
    variances = np.maximum(weights @ apart**2 - offsets**2, 0) * count / max(count - 1, 1)
    return {
        name: Estimate.of(
            *steps.bootstrap_t(
                *map(jnp.asarray, (means[i], spreads[i], means[i] + offsets[:, i], np.sqrt(variances[:, i]))),
                level=level, bounds=bounds, num_prompts=count,
            )
        )
        for i, name in enumerate(per_prompt)
    }  # fmt: skip


def by_name(estimates: Mapping[Any, Estimate]) -> dict[str, dict[str, Any]]:
    """Estimates in JSON."""
    return {str(name): one._asdict() for name, one in estimates.items()}


def _nested(most: int) -> list[Procedure]:
    sizes = [2**power for power in range(1, most.bit_length()) if 2**power <= most]
    return [Sampling(), *map(BestOfN, sizes), *map(WorstOfN, sizes)]


def _array(name: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is no array of numbers ({error})", field=name, value=values, remedy="give rows of equal length."
        ) from error
    if array.ndim != 2 or not array.size:
        raise InputError(
            f"{name} has shape {array.shape}",
            field=name,
            value=array.shape,
            remedy="give [prompts, responses]: a row a prompt.",
        )
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise InputError(
            f"{name}[{row}, {column}] is {array[row, column]}",
            field=name,
            value=array[row, column],
            remedy="give finite numbers, or leave the prompt out on both sides.",
        )
    return array
