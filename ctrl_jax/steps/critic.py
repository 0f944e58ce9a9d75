"""What a response's first tokens say of its reward: a critic, which takes the other tokens' noise from a gradient.

    V_t = E[ R(y) | x, y_<t ] − E[ R(y) | x ]

of the policy's own responses, by two ridge regressions on all responses so far (`Regression`; Schulman et al. 2016,
arXiv 1506.02438, has V by a network). The first is of a response's rank û on its prefix φ_t, the sum of the reference's
hidden states that have read its tokens before t; the second of R on powers of what the first found, at t:

    û_t = w · φ_t,    V_t = v · ψ(û_t, t / T)

Each is centred over the prompt's N responses at t, where a response that has ended stays as it is. So what the prompt
alone says does not count, and V is 0 before the first token.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.masked import Mean, length_mask
from ctrl_jax.steps.policy_gradient import leave_one_out

POWERS = 6
"""Of ψ."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Regression:
    """A ridge regression on D features, each in units of its spread, of responses that come a batch at a time."""

    gram: jax.Array
    """[D, D] Σ x xᵀ over responses, each the mean over its tokens."""
    moment: jax.Array
    """[D] Σ x y."""
    count: jax.Array
    """[] responses."""
    weights: jax.Array
    """[D] w: y is w · x."""


def empty(features: int) -> Regression:
    """Of nothing yet: all predictions are 0."""
    return Regression(jnp.zeros((features, features)), jnp.zeros(features), jnp.zeros(()), jnp.zeros(features))


def learned(
    before: Regression, gram: jax.Array, moment: jax.Array, count: float, *, penalty: float, forget: float = 0.95
) -> Regression:
    """The regression with one more batch, in which all that was before weighs `forget` of what it did.

    min_w Σ (y − w·x)² + penalty Σ_d σ_d² w_d²,    σ_d² the mean of x_d²

    Args:
      before: the regression so far.
      gram: [D, D] of the batch, a mean over its responses, as `moment` [D].
      moment: of the batch.
      count: its responses.
      penalty: in responses: as many weigh as much as it.
      forget: a share; the policy that the older responses are from is not the one that is trained.
    """
    gram, moment = forget * before.gram + count * gram, forget * before.moment + count * moment
    total = forget * before.count + count
    spread = jnp.sqrt(jnp.diag(gram) / total)
    scale = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1), 0)
    scaled = gram * jnp.outer(scale, scale) + penalty * jnp.eye(len(moment))
    weights = scale * jax.scipy.linalg.solve(scaled, scale * moment, assume_a="pos")
    return Regression(gram, moment, total, weights)


def sums(x: jax.Array, y: jax.Array, lengths: jax.Array) -> tuple[Mean, Mean]:
    """(gram, moment) of a batch, means over responses: of features x [B, N, T, D] and y [B, N], at real tokens."""
    chex.assert_rank([x, y, lengths], [4, 2, 2])
    weights = length_mask(lengths, x.shape[2]) / lengths[..., None]
    count, high = jnp.asarray(lengths.size, jnp.float32), jax.lax.Precision.HIGHEST
    rows, of_rows = x.reshape(-1, x.shape[-1]), weights.reshape(-1)
    gram = jnp.matmul((rows * of_rows[:, None]).T, rows, precision=high)
    targets = (weights * y[..., None]).reshape(-1)
    return Mean(gram, count), Mean(jnp.matmul(targets, rows, precision=high), count)


def prefixes(features: jax.Array, lengths: jax.Array) -> jax.Array:
    """φ [B, N, T, D] of hidden states [B, N, T, D], from each of which a token is predicted; float32, centred.

    φ_t = 1/T Σ_{0 < s ≤ t} h_s: those that have read no token of the response, and those behind it, are left out.
    """
    chex.assert_rank([features, lengths], [4, 2])
    size = features.shape[2]
    position = jnp.arange(size)[None, None]
    read = (position > 0) & (position <= lengths[..., None])
    return leave_one_out(jnp.cumsum(jnp.where(read[..., None], features.astype(jnp.float32), 0), axis=2) / size)


def powers(ranks: jax.Array, lengths: jax.Array) -> jax.Array:
    """ψ [B, N, T, POWERS] of predicted ranks û [B, N, T]: û, û², û³, each alone and times t / T; centred."""
    size = ranks.shape[2]
    time = jnp.minimum(jnp.arange(size)[None, None], lengths[..., None]) / size
    alone = jnp.stack([ranks, ranks**2, ranks**3], axis=-1)
    return leave_one_out(jnp.concatenate([alone, alone * time[..., None]], axis=-1))


def advantages(values: jax.Array, rewards: jax.Array, lengths: jax.Array, *, trace: float) -> jax.Array:
    """A [B, N, T] of each token: what it changed of the reward to be expected, and `trace` of what the next one did.

        A_t = Σ_{l ≥ 0} λ^l (V_{t+l+1} − V_{t+l}),    V = R behind the last token

    (Schulman et al. 2016, equation 16). With λ = 1 it is R − V_t, whose gradient has no bias whatever V is; with less,
    it has less noise, and the bias of V.

    Args:
      values: V [B, N, T].
      rewards: R [B, N], centred over the prompt's responses.
      lengths: [B, N].
      trace: λ in [0, 1].
    """
    chex.assert_rank([values, rewards, lengths], [3, 2, 2])
    size = values.shape[2]
    position = jnp.arange(size)[None, None]
    after = jnp.concatenate([values[..., 1:], rewards[..., None]], axis=-1)
    after = jnp.where(position == lengths[..., None] - 1, rewards[..., None], after)
    changes = jnp.where(position < lengths[..., None], after - values, 0)

    def back(later: jax.Array, change: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = change + trace * later
        return found, found

    _, found = jax.lax.scan(back, jnp.zeros_like(rewards), jnp.moveaxis(changes, -1, 0), reverse=True)
    return jnp.moveaxis(found, 0, -1)
