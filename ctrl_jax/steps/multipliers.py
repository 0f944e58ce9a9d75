"""The multipliers of constraints: what a rank of another reward is worth, raised until the policy keeps its floor.

    maximise     E_{y ~ π} [ R(y) ] / β − KL(π || π_ref)    where    E_{y ~ π} [ C_m(y) ] ≥ floor_m    for each m

C_m is the rank of reward m among the reference's responses, in [0, 1]: .5 is what the reference itself has. By the
Lagrangian, which adds Σ_m λ_m (E[C_m] − floor_m) with λ_m ≥ 0, the optimum is

    π ∝ π_ref exp( R / β + Σ_m λ_m C_m ),    λ_m = 0 where the floor is kept without it

(Moskovitz et al. 2023, arXiv 2310.04373; Dai et al. 2023, arXiv 2310.12773). λ is in nats per rank, the unit of R / β,
so that β, which the KL's controller moves, does not move it. It follows what is measured, as β does (kl_budget.py):

    e    = floor − mean rank of a step's responses
    base ← max(0, base + integral · e)
    λ    = max(0, base + proportional · e)

Near the reference, λ raises a mean rank by λ / 12, the variance of ranks. Let it do that with a lag of τ steps: then
the damping ratio is (1 + proportional / 12) / (2 √(τ · integral / 12)), and with τ = 12 the defaults give .93. The
integral alone (plain dual ascent) has .56, and swings.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    values: jax.Array
    """[M] λ, nats per rank: those to train with."""
    base: jax.Array
    """[M] λ without the proportional term."""


def init(count: int) -> State:
    """M multipliers of 0."""
    return State(jnp.zeros(count), jnp.zeros(count))


def update(
    state: State, ranks: jax.Array, floors: jax.Array, *, proportional: float = 8.0, integral: float = 0.8
) -> State:
    """Takes one step's mean ranks [M] over all devices, and moves λ towards keeping the floors [M].

    A measurement of nan makes λ nan: a run that has lost its rewards should stop.
    """
    chex.assert_equal_shape([state.base, ranks, floors])
    missing = floors - ranks
    base = jnp.maximum(state.base + integral * missing, 0.0)
    return State(jnp.maximum(base + proportional * missing, 0.0), base)
