"""CTRL under constraints: the policy climbs one reward, and its mean rank by others stays at a floor or above.

    maximise     E [Φ(C)] / β − KL(π || π_ref)    where    E [C_m] ≥ floor_m    for each of M other rewards

by a policy gradient on Φ(C) / β + Σ_m λ_m C_m (steps/multipliers.py; Moskovitz et al. 2023, arXiv 2310.04373; Dai et
al. 2023, arXiv 2310.12773). A combination of rewards (steps/combination.py) fixes what one reward is worth in another;
here λ does, and ends at 0 where a floor is kept anyway. Calibration gives the floors a meaning: a rank of .5 is the
mean of the reference's own responses on every prompt, whatever a reward's scale.

What differs from CTRL is the part of λ alone. Its optimum is π ∝ π_ref exp(Φ / β + Σ λ_m C_m); the KL budget is for
both parts, and what the floors take of it, the reward does not get. Floors that take more than all of it, or contradict
each other, have no optimum: λ rises without an end, and training says so (pipeline/watch.py). The floors are for a
single response; of the picks of best-of-N, which the one reward chooses, they say nothing.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms import own_responses
from ctrl_jax.algorithms.ctrl import Ctrl, Targets
from ctrl_jax.steps import multipliers, policy_gradient
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.types import Experience, Metric, Params


class Extra(NamedTuple):
    controller: Controller
    multipliers: multipliers.State


@dataclass(frozen=True)
class Constrained(Ctrl):
    floors: tuple[float, ...] = dataclasses.field(kw_only=True)
    """[M] of the mean ranks, in (0, 1)."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("above_floors", "rank in [0, 1]", "constrained rewards", guarded=True, shown=True),
        *own_responses.METRICS,
        Metric("multiplier", "nats per rank", shown=True),
    )
    internal: ClassVar[tuple[str, ...]] = ("ranks",)

    def start(self) -> Extra:  # type: ignore[override]
        return Extra(super().start(), multipliers.init(len(self.floors)))

    def loss(  # type: ignore[override]
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Extra
    ) -> tuple[Mean, Comparison]:
        comparison = self.compare(params, frozen, batch)
        advantages = self.advantages(targets.scored.transformed) / extra.controller.beta
        advantages += policy_gradient.leave_one_out(_ranks(batch)) @ extra.multipliers.values
        loss = policy_gradient.exact_kl_loss_by(
            comparison.log_probs, comparison.kl, advantages, batch.rollouts.responses.lengths, beta=1.0
        )
        return loss, comparison

    def measure(self, batch: Experience, targets: Targets, auxiliary: Comparison) -> dict[str, Mean | StandardError]:
        ranks = _ranks(batch).sum(axis=(0, 1))
        count = jnp.full_like(ranks, batch.raw.size)
        return super().measure(batch, targets, auxiliary) | {"ranks": Mean(ranks, count)}

    def after(self, extra: Extra, metrics: dict[str, Any]) -> tuple[Extra, dict[str, Any]]:  # type: ignore[override]
        """`above_floors` is that of the constraint that is kept least, `multiplier` the highest λ."""
        controller, more = super().after(extra.controller, metrics)
        floors, ranks = jnp.asarray(self.floors), metrics["ranks"]
        after = Extra(controller, multipliers.update(extra.multipliers, ranks, floors))
        own = {"above_floors": jnp.min(ranks - floors), "multiplier": jnp.max(extra.multipliers.values)}
        return after, more | own

    def share(self, extra: Extra) -> jax.Array:  # type: ignore[override]
        return super().share(extra.controller)


def _ranks(batch: Experience) -> jax.Array:
    assert batch.constrained is not None, "align.policy gives the step what ranks responses by the other rewards"
    return batch.constrained
