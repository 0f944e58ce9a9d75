"""The controller that trims β until the measured KL meets the budget, and the brake that keeps it from running past.

It starts at the ideal policy's β for the budget, or below by what the probe says that can be learned of the reward
(pipeline/train.py). The trained policy is not the ideal one, so its KL misses the budget, and it follows β only after a
delay, so a controller that merely integrates the error swings around it. Hence a proportional and an integral term on
log β, once the KL has first reached the budget:

    e    = clip(KL / budget − 1, ±clip),    KL = mean of the last measurements, nats per response
    base ← base · exp(integral · e)
    β    = base · exp(proportional · e)

so that β rises, and the KL falls, while the policy is over its budget. Before the KL has reached the budget, an error
only says that training has begun, and β stays where it is for as long as the KL still rises. A mean that for `patience`
steps is not above an earlier one by `rise` has come to rest below the budget, or creeps, as with a large model, which
finds less reward for its KL than the ideal policy. Near the reference the KL of any such policy goes as 1/β², so that

    base ← base · √max(KL / budget, 1/4)

brings it to the budget, or somewhat below, where it comes to rest again: further away the KL grows more slowly.

Why both: let a policy follow β with a lag of τ steps, d log KL/dt = −(log KL + s log β) / τ near the budget, where s is
1 to 2. The damping ratio is then (1 + s · proportional) / (2 √(τ s · integral)): with τ = 12 and s = 1.5 the defaults
give 1.1. Twice the integral and no proportional term give .5, and let the KL swing by a third for a whole run of 150
steps; twice the proportional term follows the noise of single steps.

A learning rate that is too high carries the KL past its budget before any β can hold it. So a part of the optimiser's
update is made where a whole one might do that. Near the reference d = √KL grows by about as much a step as before:

    speed ← max(forget · speed, (d − d_before − noise) / share)        by which a whole update moved d at most
    share ← clip(room / (margin · speed), least, 1),    room = max(√(limit · budget) − d, d − √budget)

where `noise`, `allowance` standard errors of the KL over d, is what measurements of one policy differ by. Where a
training goes on from a start, its first measurement is how far that came, and says nothing of the speed. The share is
1 where learning is slow, and it is 1 again once the speed is forgotten; above the budget it leaves room for the way
back. It is 1 where β is held, for then no budget is kept.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    beta: jax.Array
    """[] weight of the KL against Φ on its range [0, 1]: the one to train with."""
    base: jax.Array
    """[] β without the proportional term."""
    kl: jax.Array
    """[window] the last measurements, nats per response; step i is at i mod window."""
    steps: jax.Array
    """[] int32, measurements so far."""
    started: jax.Array
    """[] bool, whether the KL has reached the budget."""
    highest: jax.Array
    """[] the mean that was last a rise or a rest, nats per response."""
    waited: jax.Array
    """[] int32, steps since then."""
    budget: jax.Array
    """[] nats per response. Data rather than a constant, so that all budgets share one compiled step."""
    held: jax.Array
    """[] bool, whether β stays as it is."""
    speed: jax.Array
    """[] by how much a whole update has raised √KL at most, with what is forgotten of it."""
    share: jax.Array
    """[] of the next update, how much is made."""
    before: jax.Array
    """[] the last measurement: 0 at the reference, and nan behind a start, which came nobody knows how far."""


def init(
    beta: float | jax.Array, *, budget: float, held: bool = False, goes_on: bool = False, window: int = 5
) -> State:
    """A controller at β that averages over the last `window` measurements; one that is `held` only records them.

    `goes_on` says that the training begins where a start ended, and not at the reference.
    """
    beta = jnp.asarray(beta, jnp.float32)
    return State(
        beta,
        beta,
        jnp.zeros(window),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
        jnp.zeros(()),
        jnp.zeros((), jnp.int32),
        jnp.asarray(budget, jnp.float32),
        jnp.asarray(held),
        jnp.zeros(()),
        jnp.ones(()),
        jnp.asarray(jnp.nan if goes_on else 0.0),
    )


def update(
    state: State,
    measured_kl: jax.Array,
    standard_error: jax.Array | float = 0.0,
    *,
    proportional: float = 0.4,
    integral: float = 0.03,
    clip: float = 0.5,
    patience: int = 10,
    rise: float = 0.15,
) -> State:
    """Takes one step's measured KL [] and its standard error [], nats per response over all devices, and trims β.

    The average is over the measurements there are while they are fewer than the window. A measurement of nan makes β
    nan: a run that has lost its KL should stop, not go on at an old β. After Ziegler et al. 2019 (arXiv 1909.08593,
    section 2.2), whose controller is the integral term alone.
    """
    chex.assert_rank(measured_kl, 0)
    window = state.kl.shape[0]
    kl = state.kl.at[state.steps % window].set(measured_kl)
    steps = state.steps + 1
    average = jnp.sum(kl) / jnp.minimum(steps, window)
    rises = average > (1 + rise) * state.highest
    started = state.started | (average >= state.budget) | jnp.isnan(average)
    rests = ~started & ~rises & (state.waited + 1 >= patience)
    highest = jnp.where(rises | rests, average, state.highest)
    waited = jnp.where(rises | rests, 0, state.waited + 1)
    error = jnp.where(started, jnp.clip(average / state.budget - 1, -clip, clip), 0.0)
    error = jnp.where(state.held, 0.0, error)
    nearer = jnp.where(rests & ~state.held, jnp.sqrt(jnp.maximum(average / state.budget, 0.25)), 1.0)
    base = state.base * nearer * jnp.exp(integral * error)
    beta = base * jnp.exp(proportional * error)
    speed, share = _brake(state, measured_kl, jnp.asarray(standard_error))
    return State(beta, base, kl, steps, started, highest, waited, state.budget, state.held, speed, share, measured_kl)


def _brake(
    state: State,
    measured_kl: jax.Array,
    standard_error: jax.Array,
    *,
    limit: float = 1.15,
    margin: float = 3.0,
    allowance: float = 1.0,
    forget: float = 0.97,
    least: float = 0.02,
) -> tuple[jax.Array, jax.Array]:
    """(speed, share) after a measurement."""
    tiny = jnp.finfo(measured_kl.dtype).tiny
    last = jnp.where(jnp.isnan(state.before), measured_kl, state.before)
    before, distance = (jnp.sqrt(jnp.maximum(kl, 0.0)) for kl in (last, measured_kl))
    noise = allowance * standard_error / jnp.maximum(distance, tiny)
    speed = jnp.maximum(forget * state.speed, (distance - before - noise) / state.share)
    room = jnp.maximum(jnp.sqrt(limit * state.budget) - distance, distance - jnp.sqrt(state.budget))
    share = jnp.clip(room / jnp.maximum(margin * speed, tiny), least, 1.0)
    return speed, jnp.where(state.held, 1.0, share)
