"""Win rates under an inference-time procedure, without bias, and their intervals over prompts.

The same procedure decodes both sides: its pick from the policy's samples is compared with its pick from the reference's
(inference-time win rate, InfAlign, Balashankar et al. 2024, arXiv 2412.19792).
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.steps.calibration import ranks
from ctrl_jax.theory.procedures import Procedure

LEAST_PROMPTS = 5
"""Fewer prompts show too little of how prompts differ: an interval over them would not cover at its level."""

LEAST_RESAMPLES = 100
"""Of fewer resamples the two highest or lowest alone make an end of a 95 % interval."""


class Interval(NamedTuple):
    """All of shape []; `low` and `high` are nan where there is no interval."""

    mean: jax.Array
    low: jax.Array
    high: jax.Array


def win_rate(
    policy_scores: jax.Array, reference_scores: jax.Array, procedure: Procedure, against: Procedure | None = None
) -> jax.Array:
    """Policy scores [B, M] and reference scores [B, M'] of the same prompts to win rates [B], ties counting ½.

    Σ_ij w_i v_j (1{a_i > b_j} + ½ 1{a_i = b_j}) over ascending scores a, b, where w_i is the probability that the
    procedure picks the i-th lowest of M scores when run on a random subset of them, and v_j likewise of M'. That is the
    mean over all pairs of subsets, so it is unbiased; resampling with replacement would not be. `against` decodes the
    reference; by default it is decoded as the policy.

    nan scores make their prompt's win rate nan. Raises InputError if a procedure needs more samples than M or M'.

    >>> from ctrl_jax.theory.procedures import BestOfN, Sampling
    >>> policy, reference = jnp.array([[1.0, 3.0, 5.0]]), jnp.array([[0.0, 2.0, 4.0]])
    >>> [round(float(win_rate(policy, reference, by)[0]), 3) for by in (Sampling(), BestOfN(2), BestOfN(3))]
    [0.667, 0.778, 1.0]
    """
    chex.assert_rank([policy_scores, reference_scores], 2)
    chex.assert_equal_shape_prefix([policy_scores, reference_scores], 1)
    against = against or procedure
    for side, scores, decodes in (("policy", policy_scores, procedure), ("reference", reference_scores, against)):
        if scores.shape[1] < decodes.num_samples:
            raise InputError(
                f"{decodes} needs {decodes.num_samples} samples a prompt, but the {side} has {scores.shape[1]} "
                "scores a prompt",
                field="procedure",
                value=decodes,
                remedy=f"score at least {decodes.num_samples}, or choose a procedure with fewer samples.",
            )
    policy, reference = jnp.sort(policy_scores, axis=-1), jnp.sort(reference_scores, axis=-1)
    policy_weights = jnp.asarray(procedure.order_weights(policy.shape[1]))
    wins = wins_against_pick(policy, reference, against)
    nan = jnp.isnan(policy[:, -1]) | jnp.isnan(reference[:, -1])
    # A sum and not a matrix product, which accelerators round to bfloat16 or so by default.
    return jnp.where(nan, jnp.nan, jnp.sum(wins * policy_weights[None, :], axis=-1))


def wins_against_pick(scores: jax.Array, reference: jax.Array, procedure: Procedure) -> jax.Array:
    """How often each score beats the procedure's pick from the reference's, ties counting ½: [B, M] to [B, M].

    Σ_j v_j (1{a > b_j} + ½ 1{a = b_j}), where `reference` [B, M'] ascends. Raises InputError if the procedure needs
    more than M' samples.
    """
    # The weight of the reference scores below a is a prefix sum, so the M × M' comparisons are two binary searches.
    prefix_sums = jnp.asarray(np.cumsum([0.0, *procedure.order_weights(reference.shape[1])]))
    below, not_above = ranks(scores, reference)
    return (prefix_sums[below] + prefix_sums[not_above]) / 2


def judged_win_rate(
    policy_scores: jax.Array,
    reference_scores: jax.Array,
    policy_judged: jax.Array,
    reference_judged: jax.Array,
    procedure: Procedure,
    against: Procedure | None = None,
) -> jax.Array:
    """What a second judge says of the responses that the procedure picks *by the scores*: win rates [B].

    Scores [B, M] and [B, M'] select, as deployment does; the judge's values, of the same shapes, decide who wins, ties
    counting ½. With the scores themselves as the judge it is `win_rate`:

        Σ_ij p_i q_j (1{g_i > h_j} + ½ 1{g_i = h_j})

    p_i is the probability that the procedure picks response i, run on a random subset of the M by its scores a, and q_j
    likewise; g and h are the judge's values. It is unbiased for the same reason. If the judge selected too, a policy
    that exploits the scores would hide it: its worst picks by the judge would never be looked at. `against` decodes the
    reference; by default it is decoded as the policy.

    Raises InputError if a procedure needs more samples than M or M'.
    """
    chex.assert_equal_shape([policy_scores, policy_judged])
    chex.assert_equal_shape([reference_scores, reference_judged])
    picked = pick_probabilities(policy_scores, procedure)
    return wins_of_picks(
        picked, pick_probabilities(reference_scores, against or procedure), policy_judged, reference_judged
    )


def wins_of_picks(
    picked: jax.Array, reference_picked: jax.Array, policy_judged: jax.Array, reference_judged: jax.Array
) -> jax.Array:
    """Σ_ij p_i q_j (1{g_i > h_j} + ½ 1{g_i = h_j}), [B]: of the probabilities of each response to be picked, p [B, M]
    and q [B, M'], and a judge's values, g and h of the same shapes."""
    chex.assert_equal_shape([picked, policy_judged])
    chex.assert_equal_shape([reference_picked, reference_judged])
    chex.assert_equal_shape_prefix([picked, reference_picked], 1)
    order = jnp.argsort(reference_judged, axis=-1)
    ordered = jnp.take_along_axis(reference_judged, order, axis=-1)
    sums = jnp.cumsum(jnp.take_along_axis(reference_picked, order, axis=-1), axis=-1)
    prefix_sums = jnp.pad(sums, ((0, 0), (1, 0)))
    below, not_above = ranks(policy_judged, ordered)
    wins = sum(jnp.take_along_axis(prefix_sums, place, axis=-1) for place in (below, not_above)) / 2
    nan = jnp.isnan(policy_judged).any(axis=-1) | jnp.isnan(reference_judged).any(axis=-1)
    return jnp.where(nan, jnp.nan, jnp.sum(wins * picked, axis=-1))


def pick_probabilities(scores: jax.Array, procedure: Procedure) -> jax.Array:
    """The probability of each of M responses to be the procedure's pick among a random subset of them: [B, M].

    Equal scores share theirs, since responses of one prompt come in no order. Raises InputError if the procedure needs
    more than M.
    """
    chex.assert_rank(scores, 2)
    prefix_sums = jnp.asarray(np.cumsum([0.0, *procedure.order_weights(scores.shape[1])]))
    below, not_above = ranks(scores, jnp.sort(scores, axis=-1))
    return (prefix_sums[not_above] - prefix_sums[below]) / jnp.maximum(not_above - below, 1)


def share_of_ties(policy_scores: jax.Array, reference_scores: jax.Array) -> jax.Array:
    """The share of pairs (policy, reference) with equal scores: [B, M] and [B, M'] to [B].

    Many ties mean that the score does not distinguish responses, and that the theory, which has no ties, fits badly.

    >>> share_of_ties(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 3.0]]))
    Array([0.25], dtype=float32)
    """
    chex.assert_rank([policy_scores, reference_scores], 2)
    below, not_above = ranks(policy_scores, jnp.sort(reference_scores, axis=-1))
    return jnp.mean((not_above - below) / reference_scores.shape[1], axis=-1)


def interval(
    per_prompt: jax.Array,
    key: jax.Array,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The mean m of [B] independent prompts with its bootstrap-t interval over prompts: (mean, low, high), each [].

    The key draws `resamples` resamples of B prompts with replacement. Of each, with mean m* and standard deviation s*,
    t = (m* − m) / s*; the interval is m − s q, with s the prompts' own standard deviation and q the quantiles of t at
    (1 + level) / 2 and (1 − level) / 2 (Efron 1981, "Nonparametric standard errors and confidence intervals"). Unlike
    percentiles of m* it is no narrower for small B and follows the skew of win rates near 0 and 1. Prompts are the
    unit, since the responses of one prompt are not independent. `bounds` are the least and the greatest that a mean can
    be, such as (0, 1) for win rates; the interval is cut to them. The mean is always inside.

    `low` and `high` are nan, there is no interval, where B < LEAST_PROMPTS, and where all prompts are equal: how far
    others may differ from them cannot be read off them. A nan among the prompts makes all three nan.

    Raises InputError for B = 0, fewer than LEAST_RESAMPLES resamples, or a level outside (0, 1).
    """
    chex.assert_rank(per_prompt, 1)
    check_interval(per_prompt.shape[0], resamples=resamples, level=level)
    mean = jnp.mean(per_prompt)
    # Equal prompts may have a spread, of rounding.
    none = jnp.max(per_prompt) == jnp.min(per_prompt)
    spread = jnp.where(none, jnp.nan, jnp.std(per_prompt, ddof=1))
    drawn = per_prompt[resampled(key, per_prompt.shape[0], resamples)]
    return bootstrap_t(
        mean, spread, jnp.mean(drawn, axis=-1), jnp.std(drawn, axis=-1, ddof=1), level=level, bounds=bounds,
        num_prompts=per_prompt.shape[0],
    )  # fmt: skip


def resampled(key: jax.Array, num_prompts: int, resamples: int) -> jax.Array:
    """Resamples of the prompts with replacement, as their places: [resamples, B]."""
    return jax.random.randint(key, (resamples, num_prompts), 0, num_prompts)


def bootstrap_t(
    estimate: jax.Array,
    spread: jax.Array,
    drawn: jax.Array,
    drawn_spreads: jax.Array,
    *,
    level: float,
    bounds: tuple[float, float],
    num_prompts: int,
) -> Interval:
    """The bootstrap-t interval of a statistic of B prompts, from its values in resamples of them.

    Args:
      estimate: [] the statistic of the prompts.
      spread: [] the standard deviation over prompts of what each contributes to it; nan where there is no interval.
      drawn: [R] the statistic of each resample.
      drawn_spreads: [R] the spread of each resample.
      level: of confidence.
      bounds: the interval is cut to them.
      num_prompts: B; there is no interval for fewer than LEAST_PROMPTS.
    """
    if num_prompts < LEAST_PROMPTS:
        return Interval(estimate, jnp.full_like(estimate, jnp.nan), jnp.full_like(estimate, jnp.nan))
    # Where nearly all prompts are equal, all prompts of many a resample are, and t would be infinite.
    t = (drawn - estimate) / jnp.maximum(drawn_spreads, spread / 4)
    lower, upper = jnp.quantile(t, jnp.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = estimate - spread * jnp.maximum(upper, 0), estimate - spread * jnp.minimum(lower, 0)
    return Interval(estimate, jnp.clip(low, *bounds), jnp.clip(high, *bounds))


def check_interval(num_prompts: int, *, resamples: int, level: float) -> None:
    """Raises InputError for an interval over no prompts, of too few resamples, or of a level outside (0, 1)."""
    if num_prompts < 1:
        raise InputError(
            "An interval over 0 prompts was asked for", field="per_prompt", value=0, remedy="it needs at least 1."
        )
    if resamples < LEAST_RESAMPLES:
        raise InputError(
            f"An interval of {resamples} resamples was asked for",
            field="resamples",
            value=resamples,
            remedy=f"take at least {LEAST_RESAMPLES}.",
        )
    if not 0 < level < 1:
        raise InputError(
            f"The level of an interval is {level}",
            field="level",
            value=level,
            remedy="it must be between 0 and 1, such as 0.95.",
        )
