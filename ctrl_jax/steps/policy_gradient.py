"""The KL-regularised policy gradient on transformed rewards.

Objective, a prompt (the last step of CTRL; InfAlign, Balashankar et al. 2024, arXiv 2412.19792), divided by β so that
one learning rate serves every transform:

    J(π) = E_{y ~ π} [ R(y) / β − Σ_t KL_t ],     KL_t = KL( π(· | y_<t) || π_ref(· | y_<t) )

whose sum over t is the sequence's KL by the chain rule. With the next-token KL exact, only later tokens' KL needs the
score function:

    ∇J = E [ Σ_t ∇log π(y_t | y_<t) · ( R / β − Σ_{s > t} KL_s )  −  Σ_t ∇KL_t ]

Every baseline here is the mean of the prompt's *other* rollouts, which keeps the estimate unbiased.
"""

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.masked import Mean, length_mask


def leave_one_out(values: jax.Array) -> jax.Array:
    """values [B, N, ...] minus the mean of the prompt's other rollouts, (x_i − mean_j x_j) · N / (N − 1).

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".

    >>> leave_one_out(jnp.array([[1.0, 2.0, 6.0]]))
    Array([[-3. , -1.5,  4.5]], dtype=float32)
    """
    samples = values.shape[1]
    return (values - values.mean(axis=1, keepdims=True)) * (samples / (samples - 1))


def exact_kl_advantages(kl: jax.Array, advantages: jax.Array, *, beta: jax.Array | float = 1.0) -> jax.Array:
    """A / β less the leave-one-out of Σ_{s > t} KL_s: of kl [B, N, T], 0 behind a response, to [B, N, T].

    A is [B, N], of whole responses, or [B, N, T], of each token. Gradients pass through it: a loss stops them.
    """
    later_kl = jnp.flip(jnp.cumsum(jnp.flip(kl, -1), axis=-1), -1) - kl
    by_token = advantages if advantages.ndim == kl.ndim else advantages[..., None]
    return by_token / beta - leave_one_out(later_kl)


def exact_kl_loss(
    log_probs: jax.Array, kl: jax.Array, rewards: jax.Array, lengths: jax.Array, *, beta: jax.Array | float
) -> Mean:
    """−J / responses, with the exact per-token KL; its gradient is an unbiased estimate of −∇J.

    Args:
      log_probs: [B, N, T] log π of each sampled token, differentiable.
      kl: [B, N, T] exact KL of each next-token law in nats, differentiable.
      rewards: [B, N] transformed rewards; no gradient passes through them.
      lengths: [B, N].
      beta: weight of the KL, in rewards per nat.

    Returns:
      Mean over the responses, as (sum, weight).
    """
    _check(log_probs, kl, rewards, lengths)
    return exact_kl_loss_by(log_probs, kl, leave_one_out(rewards), lengths, beta=beta)


def exact_kl_loss_by(
    log_probs: jax.Array, kl: jax.Array, advantages: jax.Array, lengths: jax.Array, *, beta: jax.Array | float = 1.0
) -> Mean:
    """As `exact_kl_loss`, by advantages A [B, N] or [B, N, T] that need not be a reward less a baseline.

    Its gradient estimates −∇(V / β − KL) for the V that the advantages climb: E[A ∇log π(y)] = ∇V.
    """
    if advantages.ndim == 3:
        chex.assert_equal_shape([log_probs, advantages])
    _check(log_probs, kl, advantages[..., 0] if advantages.ndim == 3 else advantages, lengths)
    mask = length_mask(lengths, log_probs.shape[-1])
    kl = jnp.where(mask, kl, 0.0)
    return _surrogate(log_probs, exact_kl_advantages(kl, advantages, beta=beta), mask, kl.sum(-1))


def sampled_kl_loss(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    rewards: jax.Array,
    lengths: jax.Array,
    *,
    beta: jax.Array | float,
) -> Mean:
    """The same objective with the KL as a sampled cost (k1): A_t = R / β − Σ_{s ≥ t} log π/π_ref(y_s).

    Unbiased too, and what most trainers do; its gradient varies more than `exact_kl_loss`'s, since the KL enters by the
    score function alone. Arguments as there, with the reference's log-probs [B, N, T] instead of the KL.
    """
    _check(log_probs, reference_log_probs, rewards, lengths)
    mask = length_mask(lengths, log_probs.shape[-1])
    cost = jnp.where(mask, jax.lax.stop_gradient(log_probs) - reference_log_probs, 0.0)
    cost_to_go = jnp.flip(jnp.cumsum(jnp.flip(cost, -1), axis=-1), -1)
    advantages = leave_one_out(rewards)[..., None] / beta - leave_one_out(cost_to_go)
    return _surrogate(log_probs, advantages, mask, jnp.zeros_like(rewards))


def _check(log_probs: jax.Array, other: jax.Array, rewards: jax.Array, lengths: jax.Array) -> None:
    chex.assert_rank([log_probs, other, rewards, lengths], [3, 3, 2, 2])
    chex.assert_equal_shape([log_probs, other])
    chex.assert_equal_shape_prefix([log_probs, rewards, lengths], 2)
    chex.assert_axis_dimension_gt(rewards, 1, 1)


def _surrogate(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array, penalty: jax.Array) -> Mean:
    gain = jnp.where(mask, jax.lax.stop_gradient(advantages) * log_probs, 0.0).sum(-1)
    return Mean((penalty - gain).sum(), jnp.ones_like(penalty).sum())
