"""The controller that trims β until the measured KL meets the budget.

It starts at the ideal policy's β for the budget. The trained policy is not the ideal one, so its KL misses the budget.
Every few steps

    β ← β · exp(clip(gain · (KL / budget − 1), ±clip)),    KL = mean of the last measurements, nats per response,

so that β rises, and the KL falls, while the policy is over its budget.

Noise. The step of log β is linear in the KL, so a noisy but unbiased measurement leaves the mean KL at the budget; only
the clip bends this, and it acts far from the budget. Near it, with s = −dlog KL / dlog β (2 for a weak tilt, less for a
strong one), an update scales the error of log β by 1 − gain·s: stable for gain·s < 2, without overshoot for gain·s ≤ 1.
Relative noise σ in one measurement becomes gain·σ/√window in log β. This takes the policy to have followed the last β:
one that follows slowly (few steps between updates, a small learning rate) may swing around the budget.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    beta: jax.Array
    """[] weight of the KL against Φ on its range [0, 1]."""
    kl: jax.Array
    """[window] the last measurements, nats per response; step i is at i mod window."""
    steps: jax.Array
    """[] int32, measurements so far."""


def init(beta: float | jax.Array, *, window: int = 5) -> State:
    """A controller at β that averages over the last `window` measurements."""
    return State(jnp.asarray(beta, jnp.float32), jnp.zeros(window), jnp.zeros((), jnp.int32))


def update(
    state: State,
    measured_kl: jax.Array,
    *,
    budget: float,
    every: int = 5,
    gain: float = 0.3,
    clip: float = 0.2,
) -> State:
    """Takes one step's measured KL [], nats per response over all devices, and trims β on each `every`-th step.

    The average is over the measurements there are while they are fewer than the window. A measurement of nan makes β
    nan: a run that has lost its KL should stop, not go on at an old β. The controller of Ziegler et al. 2019 (arXiv
    1909.08593) is proportional in log β in the same way, without the average and on every step.
    """
    chex.assert_rank(measured_kl, 0)
    window = state.kl.shape[0]
    kl = state.kl.at[state.steps % window].set(measured_kl)
    steps = state.steps + 1
    average = jnp.sum(kl) / jnp.minimum(steps, window)
    change = jnp.clip(gain * (average / budget - 1), -clip, clip)
    return State(jnp.where(steps % every == 0, state.beta * jnp.exp(change), state.beta), kl, steps)
