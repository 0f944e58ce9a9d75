"""Calibrated early stopping: draw until a response is as good as the reference's best of some share.

    draw y_1, y_2, ... of the policy until r(y_k) ≥ θ, or until M were drawn, of which then the best is taken

θ is a quantile of the reference's rewards on the prompt, so that to stop at a rank of .97 means the same on every
prompt, whatever a reward's scale. Best-of-N draws as many on a prompt where the first response is excellent as where
none is. Of the reference itself, without ties and with no end M, stopping at rank τ takes 1 / (1 − τ) draws in the mean
and beats one of its responses in (1 + τ) / 2 of the cases: what best-of-N wins with N = 2 / (1 − τ) − 1, nearly twice
as many.

To stop so takes a table of the reference's rewards on the prompt: on one that has none, those responses are to be drawn
first.

Both numbers are known of M responses that are there, as means over all orders in which they may come. Where c ≥ 1 of
them reach θ, the first that does is each of these as likely, and it comes at place (M + 1) / (c + 1) in the mean.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps import win_rate


def draws(scores: jax.Array, thresholds: jax.Array) -> jax.Array:
    """The expected number of draws [B], at most M: of scores [B, M] and thresholds [B].

    >>> round(float(draws(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2.0]))[0]), 3)
    1.333
    """
    reached = _reached(scores, thresholds).sum(axis=1)
    return jnp.where(reached > 0, (scores.shape[1] + 1) / (reached + 1), scores.shape[1])


def pick_probabilities(scores: jax.Array, thresholds: jax.Array) -> jax.Array:
    """The probability of each response to be the one that is taken, [B, M]; the best of those that tie share it."""
    reached = _reached(scores, thresholds)
    first = reached / jnp.maximum(reached.sum(axis=1, keepdims=True), 1)
    best = scores == scores.max(axis=1, keepdims=True)
    return jnp.where(reached.any(axis=1, keepdims=True), first, best / best.sum(axis=1, keepdims=True))


def against_one(
    scores: jax.Array, reference_scores: jax.Array, place: int, judges: Sequence[tuple[jax.Array, jax.Array]]
) -> tuple[list[jax.Array], jax.Array]:
    """(how often what is taken beats one response of the reference, by each judge; the draws it takes), each [B] and
    unbiased.

    θ is the `place`-th highest of M' − 1 of the reference's responses, and the rival is the one that is left out, each
    in turn: a rival that had a part in θ would be too weak.

    Args:
      scores: [B, M] of the policy's responses, by which drawing stops.
      reference_scores: [B, M'].
      place: a, from 1 to M' − 1.
      judges: of each, the values [B, M] and [B, M'] by which one of two wins; those may be the scores themselves.
    """
    known = reference_scores.shape[1]
    # Without one of the a highest, the next below is the a-th highest of the rest.
    order = jnp.argsort(-reference_scores, axis=1)
    descending = jnp.take_along_axis(reference_scores, order, axis=1)
    among_highest = jnp.argsort(order, axis=1) < place
    wins, expected = [jnp.zeros(len(scores)) for _ in judges], jnp.zeros(len(scores))
    for threshold, rivals in ((descending[:, place], among_highest), (descending[:, place - 1], ~among_highest)):
        picked = pick_probabilities(scores, threshold)
        won = [win_rate.wins_of_picks(picked, rivals / known, *values) for values in judges]
        wins = [before + more for before, more in zip(wins, won, strict=True)]
        expected += rivals.mean(axis=1) * draws(scores, threshold)
    return wins, expected


def _reached(scores: jax.Array, thresholds: jax.Array) -> jax.Array:
    chex.assert_rank([scores, thresholds], [2, 1])
    chex.assert_equal_shape_prefix([scores, thresholds], 1)
    return scores >= thresholds[:, None]
