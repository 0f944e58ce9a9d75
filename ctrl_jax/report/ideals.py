"""Win rates of ideal policies, by the names of their transforms and procedures, for curves over the KL."""

import functools
import math

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Ideal, Objective


@functools.lru_cache(maxsize=512)
def policy(transform: str, procedure: str, kl: float) -> Ideal | None:
    """The ideal policy of a transform, by its name, at a KL. None for a raw reward, and where there is none."""
    try:
        return Objective.parse(transform, procedure, kl).ideal() if kl > 0 else None
    except InputError:
        # Out of reach: past some KL a worst-of-N always wins, and no optimum has more; or Φ is flat at its top.
        return None


def win_rates(transform: str, procedure: str, kls: np.ndarray) -> np.ndarray:
    """Ideal win rates at each KL, ½ at KL 0; nan where there is none."""
    rule = procedures.parse(procedure)
    policies = [policy(transform, procedure, float(kl)) for kl in kls]
    return np.array(
        [
            0.5 if kl <= 0 else math.nan if policy is None else policy.win_rate(rule)
            for kl, policy in zip(kls, policies, strict=True)
        ]
    )


def kl_grid(widest: float) -> np.ndarray:
    """From 0 to `widest`, denser near 0: a win rate rises there as the square root of the KL."""
    return widest * np.linspace(0, 1, 17) ** 2
