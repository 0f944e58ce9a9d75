"""Win rates under an inference-time procedure, without bias, and their intervals over prompts.

The same procedure decodes both sides: its pick from the policy's samples is compared with its pick from the reference's
(inference-time win rate, InfAlign, Balashankar et al. 2024, arXiv 2412.19792).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.steps.calibration import ranks
from ctrl_jax.theory.procedures import Procedure


class Interval(NamedTuple):
    mean: jax.Array
    low: jax.Array
    high: jax.Array


def win_rate(policy_scores: jax.Array, reference_scores: jax.Array, procedure: Procedure) -> jax.Array:
    """Policy scores [B, M] and reference scores [B, M'] of the same prompts to win rates [B], ties counting ½.

    Σ_ij w_i v_j (1{a_i > b_j} + ½ 1{a_i = b_j}) over ascending scores a, b, where w_i is the probability that the
    procedure picks the i-th lowest of M scores when run on a random subset of them, and v_j likewise of M'. That is the
    mean over all pairs of subsets, so it is unbiased; resampling with replacement would not be.

    nan scores make their prompt's win rate nan. Raises InputError if the procedure needs more samples than M or M'.
    """
    chex.assert_rank([policy_scores, reference_scores], 2)
    chex.assert_equal_shape_prefix([policy_scores, reference_scores], 1)
    for side, scores in (("policy", policy_scores), ("reference", reference_scores)):
        if scores.shape[1] < procedure.num_samples:
            raise InputError(
                f"{procedure} needs {procedure.num_samples} samples a prompt, but the {side} has {scores.shape[1]} "
                f"scores a prompt; score at least {procedure.num_samples}, or choose a procedure with fewer samples."
            )
    policy, reference = jnp.sort(policy_scores, axis=-1), jnp.sort(reference_scores, axis=-1)
    policy_weights = jnp.asarray(procedure.order_weights(policy.shape[1]))
    # The weight of the reference scores below a_i is a prefix sum, so the M × M' comparisons are two binary searches.
    prefix_sums = jnp.asarray(np.cumsum([0.0, *procedure.order_weights(reference.shape[1])]))
    below, not_above = ranks(policy, reference)
    wins = (prefix_sums[below] + prefix_sums[not_above]) / 2
    nan = jnp.isnan(policy[:, -1]) | jnp.isnan(reference[:, -1])
    # A sum and not a matrix product, which accelerators round to bfloat16 or so by default.
    return jnp.where(nan, jnp.nan, jnp.sum(wins * policy_weights[None, :], axis=-1))


def judged_win_rate(
    policy_scores: jax.Array,
    reference_scores: jax.Array,
    policy_judged: jax.Array,
    reference_judged: jax.Array,
    procedure: Procedure,
) -> jax.Array:
    """What a second judge says of the responses that the procedure picks *by the scores*: win rates [B].

    Scores [B, M] and [B, M'] select, as deployment does; the judge's values, of the same shapes, decide who wins, ties
    counting ½. With the scores themselves as the judge it is `win_rate`:

        Σ_ij p_i q_j (1{g_i > h_j} + ½ 1{g_i = h_j})

    p_i is the probability that the procedure picks response i, run on a random subset of the M by its scores a, and q_j
    likewise; g and h are the judge's values. It is unbiased for the same reason. If the judge selected too, a policy
    that exploits the scores would hide it: its worst picks by the judge would never be looked at.

    Raises InputError if the procedure needs more samples than M or M'.
    """
    chex.assert_equal_shape([policy_scores, policy_judged])
    chex.assert_equal_shape([reference_scores, reference_judged])
    chex.assert_equal_shape_prefix([policy_scores, reference_scores], 1)
    picked, reference_picked = (pick_probabilities(scores, procedure) for scores in (policy_scores, reference_scores))
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

    Many ties mean that the score cannot tell responses apart, and that the theory without ties describes it badly.
    """
    chex.assert_rank([policy_scores, reference_scores], 2)
    below, not_above = ranks(policy_scores, jnp.sort(reference_scores, axis=-1))
    return jnp.mean((not_above - below) / reference_scores.shape[1], axis=-1)


def interval(per_prompt: jax.Array, key: jax.Array, *, resamples: int = 1000, level: float = 0.95) -> Interval:
    """The mean of [B] independent prompts with its percentile bootstrap interval over prompts.

    The key draws the `resamples` resamples of B prompts with replacement. Prompts are the unit, since the responses of
    one prompt are not independent. Percentile intervals are somewhat narrow for small B (by a factor √(1 − 1/B) and the
    missing t-quantile): read those of fewer than 30 prompts with care. Raises InputError for B = 0 or a level outside
    (0, 1).
    """
    chex.assert_rank(per_prompt, 1)
    size = per_prompt.shape[0]
    if size < 1:
        raise InputError("An interval over 0 prompts was asked for; it needs at least 1.")
    if not 0 < level < 1:
        raise InputError(f"The level of an interval is {level}; it must lie between 0 and 1, such as 0.95.")
    means = jnp.mean(per_prompt[jax.random.randint(key, (resamples, size), 0, size)], axis=-1)
    low, high = jnp.quantile(means, jnp.array([(1 - level) / 2, (1 + level) / 2]))
    return Interval(jnp.mean(per_prompt), low, high)
