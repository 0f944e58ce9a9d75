"""An algorithm under constraints: the policy climbs one reward, and its mean rank by others stays at a floor or above.

    maximise     J    where    E [C_m] ≥ floor_m    for each of M other rewards

J is what the algorithm climbs, such as CTRL's E [Φ(C)] / β − KL(π || π_ref). By the Lagrangian a response earns Σ_m λ_m
C_m nats besides (steps/multipliers.py; Moskovitz et al. 2023, arXiv 2310.04373; Dai et al. 2023, arXiv 2310.12773): its
price, which each algorithm that learns from the policy's own responses adds to the advantages behind ∇log π. A
combination of rewards (steps/combination.py) fixes what one reward is worth in another; here λ does, and ends at 0
where a floor is kept anyway. Calibration gives the floors a meaning: a rank of .5 is the mean of the reference's own
responses on every prompt, whatever a reward's scale.

What differs from the algorithm alone is the part of λ. CTRL's optimum becomes π ∝ π_ref exp(Φ / β + Σ λ_m C_m); the KL
budget is for both parts, and what the floors take of it, the reward does not get. Floors that take more than all of it,
or contradict each other, have no optimum: λ rises without an end, and training says so (pipeline/watch.py). The floors
are for a single response; of the picks of best-of-N, which the one reward chooses, they say nothing. GRPO takes means
over tokens, and its λ is in nats per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.ctrl import Ctrl, Targets
from ctrl_jax.algorithms.protocol import Algorithm, Source
from ctrl_jax.steps import multipliers, policy_gradient
from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Experience, Metric, Params


class Extra(NamedTuple):
    algorithm: Any
    """The extra state of the algorithm."""
    multipliers: multipliers.State


@dataclass(frozen=True)
class Constrained(Algorithm):
    algorithm: Ctrl
    floors: tuple[float, ...]
    """[M] of the mean ranks, in (0, 1)."""

    source = Source.POLICY

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        above = Metric("above_floors", "rank in [0, 1]", "constrained rewards", guarded=True, shown=True)
        return above, *self.algorithm.metrics, Metric("multiplier", "nats per rank", shown=True)

    @property
    def internal(self) -> tuple[str, ...]:  # type: ignore[override]
        return *self.algorithm.internal, "ranks"

    @property
    def epochs(self) -> int:  # type: ignore[override]
        return self.algorithm.epochs

    @property
    def minibatches(self) -> int:  # type: ignore[override]
        return self.algorithm.minibatches

    @property
    def beta(self) -> float:
        return self.algorithm.beta

    def first_beta(self, objective: Objective, num_references: int, reference_rewards: Any) -> float:
        return self.algorithm.first_beta(objective, num_references, reference_rewards)

    def start(self) -> Extra:
        return Extra(self.algorithm.start(), multipliers.init(len(self.floors)))

    def targets(self, batch: Experience) -> Targets:
        return self.algorithm.targets(batch)

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Extra
    ) -> tuple[Mean, Any]:
        price = policy_gradient.leave_one_out(_ranks(batch)) @ extra.multipliers.values
        return self.algorithm.loss(params, frozen, batch, targets._replace(price=price), extra.algorithm)

    def measure(self, batch: Experience, targets: Targets, auxiliary: Any) -> dict[str, Mean | StandardError]:
        ranks = _ranks(batch).sum(axis=(0, 1))
        count = jnp.full_like(ranks, batch.raw.size)
        return self.algorithm.measure(batch, targets, auxiliary) | {"ranks": Mean(ranks, count)}

    def after(self, extra: Extra, metrics: dict[str, Any]) -> tuple[Extra, dict[str, Any]]:
        """`above_floors` is that of the constraint that is kept least, `multiplier` the highest λ."""
        inner, more = self.algorithm.after(extra.algorithm, metrics)
        floors, ranks = jnp.asarray(self.floors), metrics["ranks"]
        after = Extra(inner, multipliers.update(extra.multipliers, ranks, floors))
        own = {"above_floors": jnp.min(ranks - floors), "multiplier": jnp.max(extra.multipliers.values)}
        return after, more | own

    def share(self, extra: Extra) -> jax.Array | float:
        return self.algorithm.share(extra.algorithm)


def _ranks(batch: Experience) -> jax.Array:
    assert batch.constrained is not None, "align.policy gives the step what ranks responses by the other rewards"
    return batch.constrained
