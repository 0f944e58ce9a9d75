"""One reward of an ensemble's: what its members say of a response, made one, and what a member learns from.

Where a reward model is wrong by chance, its likes are wrong otherwise, so a policy that is pushed against the least of
them finds fewer mistakes to climb (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv
2310.02743, equations 3 to 5). Members that share a trunk are more alike than members of their own (Eisenstein et al.
2023, arXiv 2312.09244): they catch what a head learned by chance, not what the trunk did.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory.names import number, split_call, unknown

Ensemble = Callable[[jax.Array], jax.Array]
"""Rewards [..., M] of M members to one [...]."""


def mean(rewards: jax.Array) -> jax.Array:
    """(1/M) Σ_m r_m."""
    return jnp.mean(rewards, axis=-1)


def median(rewards: jax.Array) -> jax.Array:
    """The middle one; of an even number, the mean of the two."""
    return jnp.median(rewards, axis=-1)


def least(rewards: jax.Array) -> jax.Array:
    """min_m r_m: worst-case optimisation."""
    return jnp.min(rewards, axis=-1)


def penalized(weight: float) -> Ensemble:
    """Mean less `weight` times the variance of the members: uncertainty-weighted optimisation.

    Raises:
      InputError: for a weight that is not finite or below 0.
    """
    if not 0 <= weight < np.inf:
        raise InputError(
            f"penalized({number(weight)}) is no ensemble",
            field="ensemble",
            value=weight,
            remedy="the weight of the variance is 0 or more, such as penalized(1).",
        )
    return lambda rewards: jnp.mean(rewards, axis=-1) - weight * jnp.var(rewards, axis=-1)


def parse(text: str) -> tuple[str, Ensemble]:
    """(canonical name, function) of "mean", "median", "min" or "penalized(1)". Raises InputError."""
    name, argument = split_call(text)
    fixed = {"mean": mean, "median": median, "min": least}
    if name in fixed and argument is None:
        return name, fixed[name]
    if name == "penalized" and argument is not None:
        return f"penalized({number(argument)})", penalized(argument)
    raise unknown("ensemble", text, [*fixed, "penalized(1)"])


MOST_DRAWN = 8
"""As often as a pair is drawn, at most; more has a probability of 1e-6."""


def bootstrap_weights(ids: jax.Array, key: jax.Array, members: int) -> jax.Array:
    """How often each member's bootstrap sample has a pair: [B, M] of prompt ids [B], Poisson of mean 1.

    The weight depends on the prompt's id, the member and the key alone, so that it is the same in every batch and epoch
    and on any devices; pairs of one prompt stay together. Oza and Russell 2001, "Online Bagging and Boosting".
    """
    counts = np.arange(MOST_DRAWN)
    probabilities = np.exp(-1.0) / np.cumprod(np.maximum(counts, 1))
    cdf = jnp.asarray(np.cumsum(probabilities), jnp.float32)
    uniform = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (members,)))(ids)
    return jnp.searchsorted(cdf, uniform).astype(jnp.float32)
