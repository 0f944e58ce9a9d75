"""Whether a policy can climb a reward, before it is trained: can the reward be read off what the model itself sees?

A linear probe (ridge regression; Alain and Bengio 2016, arXiv 1610.01644) of the reference's frozen features of a
response to its rank among the reference's responses to the same prompt. A rank that no linear map of the features finds
on prompts it was not fitted on is one that a few updates of the same network will hardly find either.
"""

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.steps.masked import length_mask, masked_mean
from ctrl_jax.types import Params, Policy, Prompts, Responses

FOLDS = 5
"""Parts of the prompts: each is predicted from the others. At least two prompts a part."""
STRENGTHS = tuple(10.0**power for power in range(-2, 5))
"""Of the ridge, in mean eigenvalues of the features' Gram matrix."""


def pooled_features(policy: Policy, params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
    """[B, N, D] float32: mean over the response's tokens of the last hidden states from which each is predicted.

    The states have read the prompt and the response but for its last token. What stands behind a response's length does
    not count.
    """
    features = policy.apply(params, prompts, responses).astype(jnp.float32)
    mask = length_mask(responses.lengths, features.shape[2])[..., None]
    return masked_mean(features, jnp.broadcast_to(mask, features.shape), axis=2).value


def held_out_ranks(features: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Ranks [B, N], up to a constant a prompt, as features [B, N, D] predict them; each from other prompts alone.

    min_w Σ (û − w·φ)² + λ |w|² over the responses of four in five prompts, where φ and û are centred at each prompt
    and φ scaled by its spread in each of the D. λ is the best of STRENGTHS by cross-validation over these prompts. In
    the form of its kernel, so that the cost follows from B × N and hardly from D. Float64 on the host.

    Raises:
      ValueError: for fewer than 2 × FOLDS prompts.
    """
    chex.assert_rank([features, ranks], [3, 2])
    chex.assert_equal_shape_prefix([features, ranks], 2)
    prompts, samples = ranks.shape
    if prompts < 2 * FOLDS:
        raise ValueError(f"A probe of {prompts} prompts was asked for; it needs {2 * FOLDS}.")
    x, y = (np.asarray(array, np.float64) for array in (features, ranks))
    x, y = x - x.mean(axis=1, keepdims=True), (y - y.mean(axis=1, keepdims=True)).reshape(-1)
    spread = np.sqrt(np.mean(x**2, axis=(0, 1)))
    x = np.where(spread > 0, x / np.where(spread > 0, spread, 1), 0).reshape(prompts * samples, -1)
    fold = np.repeat(np.arange(prompts) % FOLDS, samples)
    fitted = _fits(x @ x.T / max(1, int(np.count_nonzero(spread))), y, fold)
    predicted = np.zeros_like(y)
    for held_out in range(FOLDS):
        others = [other for other in range(FOLDS) if other != held_out]
        errors = np.sum([_errors(fitted, y, fold, held_out, other) for other in others], axis=0)
        part, predictions = fitted(frozenset([held_out]))
        predicted[part] = predictions[int(np.argmin(errors))]
    return predicted.reshape(prompts, samples)


Fitted = Callable[[frozenset[int]], tuple[np.ndarray, np.ndarray]]


def _fits(kernel: np.ndarray, y: np.ndarray, fold: np.ndarray) -> Fitted:
    """A function of the folds that are left out: which rows those are, and their predictions by each strength."""

    @functools.cache
    def fitted(left_out: frozenset[int]) -> tuple[np.ndarray, np.ndarray]:
        out = np.isin(fold, list(left_out))
        values, vectors = np.linalg.eigh(kernel[np.ix_(~out, ~out)])
        values = np.maximum(values, 0)  # below it by rounding alone
        strengths = np.array(STRENGTHS)[:, None] * max(values.mean(), 1e-12)
        weights = (vectors.T @ y[~out]) / (values + strengths)
        return np.flatnonzero(out), weights @ vectors.T @ kernel[np.ix_(~out, out)]

    return fitted


def _errors(fitted: Fitted, y: np.ndarray, fold: np.ndarray, held_out: int, other: int) -> Sequence[float]:
    """By each strength, the squared error on one fold of a fit to all folds but this one and the one held out."""
    rows, predictions = fitted(frozenset([held_out, other]))
    inside = fold[rows] == other
    return np.sum((predictions[:, inside] - y[rows[inside]]) ** 2, axis=1)
