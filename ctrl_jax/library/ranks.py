"""Calibrated rewards and win rates of arrays from any sampler.

NumPy arrays and lists are computed in float64 and come back as NumPy. JAX arrays, also traced ones, stay JAX's and
keep their precision, so that the functions serve inside `jax.jit` too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ctrl_jax.errors import InputError
from ctrl_jax.report.judgement import check_judged
from ctrl_jax.steps import calibration
from ctrl_jax.steps import win_rate as steps
from ctrl_jax.theory.objective import Objective
from ctrl_jax.theory.precision import double_precision
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Scored


class Interval(NamedTuple):
    """A mean over prompts with its confidence interval; `low` and `high` are nan where there is none."""

    mean: float
    low: float
    high: float


@overload
def calibrate(rewards: jax.Array, reference_rewards: jax.Array) -> jax.Array: ...  # type: ignore[overload-overlap]
@overload
def calibrate(rewards: ArrayLike, reference_rewards: ArrayLike) -> np.ndarray: ...
def calibrate(rewards: Any, reference_rewards: Any) -> Any:
    """Calibrated rewards: each reward's rank among the reference policy's rewards on the same prompt, in [0, 1].

        Ĉ = (1/K) Σ_k (1{r > r_k} + ½ 1{r = r_k})

    (InfAlign, Balashankar et al. 2024, arXiv 2412.19792). Some K = 100 references make it precise to 0.05.

    Args:
      rewards: [..., N] raw rewards of responses.
      reference_rewards: [..., K] raw rewards of the reference policy's responses to the same prompts.

    Returns:
      [..., N]. A nan reward has no rank: it stays nan, and one among the references makes its prompt nan.

    Raises:
      InputError: if the leading shapes differ, or there are no references.
    """
    rewards, reference_rewards = _array("rewards", rewards), _array("reference_rewards", reference_rewards)
    if not rewards.ndim == reference_rewards.ndim >= 1 or rewards.shape[:-1] != reference_rewards.shape[:-1]:
        raise InputError(
            f"rewards has shape {rewards.shape} and reference_rewards {reference_rewards.shape}",
            field="reference_rewards",
            value=reference_rewards.shape,
            remedy="give rewards [..., N] and reference_rewards [..., K] of the same leading shape, one row a prompt.",
        )
    return _computed(calibration.calibrate, rewards, reference_rewards)


def score(rewards: ArrayLike, reference_rewards: ArrayLike, objective: Objective) -> Scored:
    """Raw rewards with what an objective makes of them: (raw, calibrated, transformed), each [B, N].

    The transformed rewards are Φ on the range [0, 1]; with `objective.beta(K, reference_rewards)` they are what
    `exact_kl_loss` takes. JAX arrays may be traced.

    Args:
      rewards: [B, N] raw rewards of the policy's responses.
      reference_rewards: [B, K] raw rewards of the reference policy's responses to the same prompts.
      objective: the transform, for a procedure, at a KL budget.

    Raises:
      InputError: if the leading shapes differ.
    """
    raw, references = _array("rewards", rewards), _array("reference_rewards", reference_rewards)
    calibrated = calibrate(raw, references)
    transformed = objective.transformed(references.shape[-1])
    return Scored(raw, calibrated, _computed(transformed, raw, calibrated))


@overload
def win_rate(  # type: ignore[overload-overlap]
    policy_rewards: jax.Array, reference_rewards: jax.Array, procedure: Procedure
) -> jax.Array: ...
@overload
def win_rate(policy_rewards: ArrayLike, reference_rewards: ArrayLike, procedure: Procedure) -> np.ndarray: ...
def win_rate(policy_rewards: Any, reference_rewards: Any, procedure: Any) -> Any:
    """How often the policy beats the reference on each prompt, both decoded by `procedure`; ties count ½.

    Unbiased: the mean over all subsets of the samples that the procedure may look at. More samples than it needs make
    the estimate less noisy.

    Args:
      policy_rewards: [B, M] rewards of the policy's responses to B prompts.
      reference_rewards: [B, M'] rewards of the reference's responses to the same prompts.
      procedure: such as `best_of(4)`.

    Returns:
      [B] win rates. `interval` gives their mean over prompts.

    Raises:
      InputError: if the shapes do not fit, or the procedure needs more samples than there are.
    """
    policy, reference = _array("policy_rewards", policy_rewards), _array("reference_rewards", reference_rewards)
    _check_sides(policy, reference)
    _check_procedure(procedure)
    return _computed(lambda ours, theirs: steps.win_rate(ours, theirs, procedure), policy, reference)


def judged_win_rate(
    policy_rewards: ArrayLike,
    reference_rewards: ArrayLike,
    policy_judged: ArrayLike,
    reference_judged: ArrayLike,
    procedure: Procedure,
) -> np.ndarray:
    """How often a second judge prefers what the procedure picks by the rewards: win rates [B], ties counting ½.

    The rewards select, as they do where a policy is served; the judge's values decide who wins. Over-optimisation of
    the reward shows as a judged win rate that falls while the win rate rises.

    Args:
      policy_rewards, reference_rewards: [B, M] and [B, M'], which pick.
      policy_judged, reference_judged: the judge's values of the same responses, of the same shapes.
      procedure: such as `best_of(4)`.

    Raises:
      InputError: if the shapes do not fit, or the procedure needs more samples than there are.
    """
    policy, reference = _array("policy_rewards", policy_rewards), _array("reference_rewards", reference_rewards)
    ours, theirs = _array("policy_judged", policy_judged), _array("reference_judged", reference_judged)
    _check_sides(policy, reference)
    check_judged(policy=(policy, ours), reference=(reference, theirs))
    _check_procedure(procedure)

    def computed(policy: Any, reference: Any, ours: Any, theirs: Any) -> jax.Array:
        return steps.judged_win_rate(policy, reference, ours, theirs, procedure)

    return np.asarray(_computed(computed, policy, reference, ours, theirs))


def interval(
    per_prompt: ArrayLike,
    key: jax.Array | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The mean of [B] independent prompts with its bootstrap-t interval over prompts (Efron 1981).

    Args:
      per_prompt: [B] one value a prompt, such as its win rate.
      key: draws the resamples; by default `jax.random.key(0)`, the same interval at every call.
      level: of confidence.
      resamples: of the prompts, with replacement; at least 100.
      bounds: the least and the greatest that a mean can be, such as (0, 1) for win rates; the interval is cut there.

    Returns:
      (mean, low, high) as floats. `low` and `high` are nan for fewer than 5 prompts, and where all prompts are equal:
      nothing shows then how far others may differ. A nan among the prompts makes all three nan.

    Raises:
      InputError: if `per_prompt` is not one row of numbers, or an option is out of range.
    """
    values = _array("per_prompt", per_prompt)
    if values.ndim != 1:
        raise InputError(
            f"per_prompt has shape {values.shape}",
            field="per_prompt",
            value=values.shape,
            remedy="give one number a prompt, such as win_rate returns.",
        )
    key = jax.random.key(0) if key is None else key
    found = _computed(
        lambda row: steps.interval(row, key, level=level, resamples=resamples, bounds=bounds), np.asarray(values)
    )
    return Interval(*map(float, found))


def difference(
    first: ArrayLike, second: ArrayLike, key: jax.Array | None = None, *, level: float = 0.95, resamples: int = 1000
) -> Interval:
    """The mean of first − second over the same [B] prompts, with its paired interval over prompts.

    Prompts that are easy for both policies, or hard for both, move both means and not their difference: the interval is
    that of the per-prompt differences, and narrower than two separate ones suggest. Where it excludes 0, the two differ
    by more than a choice of B prompts makes.

    Args:
      first: [B] one value a prompt, such as a policy's win rate against the reference, or its KL.
      second: [B] another policy's on the same prompts, in the same order.
      key: draws the resamples; by default `jax.random.key(0)`, the same interval at every call.
      level: of confidence.
      resamples: of the prompts, with replacement; at least 100.

    Returns:
      (mean, low, high) as `interval` does of the differences.

    Raises:
      InputError: if the two are not rows of one length, or an option is out of range.
    """
    ours, theirs = _array("first", first), _array("second", second)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise InputError(
            f"first has shape {ours.shape} and second {theirs.shape}",
            field="second",
            value=theirs.shape,
            remedy="give two rows of one length, a number for each of the same prompts.",
        )
    return interval(np.asarray(ours) - np.asarray(theirs), key, level=level, resamples=resamples)


def _array(name: str, values: Any) -> Any:
    """JAX arrays as they are; anything else as float64 in NumPy."""
    if isinstance(values, jax.Array):
        return values
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is no array of numbers ({error})", field=name, value=values, remedy="give rows of equal length."
        ) from error


def _computed(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function` of the arrays: JAX's own where one of them is, otherwise in float64 and as NumPy.

    In float32 two rewards that differ in the eighth digit would tie.
    """
    if any(isinstance(array, jax.Array) for array in arrays):
        return function(*map(jnp.asarray, arrays))
    with double_precision():
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays)))


def _check_sides(policy: Any, reference: Any) -> None:
    if not policy.ndim == reference.ndim == 2 or len(policy) != len(reference):
        raise InputError(
            f"policy_rewards has shape {policy.shape} and reference_rewards {reference.shape}",
            field="reference_rewards",
            value=reference.shape,
            remedy="give [B, M] and [B, M'], a row for each of the same B prompts.",
        )


def _check_procedure(procedure: Any) -> None:
    if not isinstance(procedure, Procedure):
        raise InputError(
            f"procedure is {procedure!r}",
            field="procedure",
            value=procedure,
            remedy="give a procedure, such as best_of(4); ctrl_jax.procedure reads names.",
        )
