"""InfAlign-CTRL: calibrate and transform the reward, then maximise it under a KL penalty.

For a prompt x, the policy's own responses y and their raw rewards r (Balashankar et al. 2024, arXiv 2412.19792):

    calibrate    C(x, y) = how often y beats a response of the reference policy, in [0, 1]
    transform    R(x, y) = Φ(C(x, y)), Φ chosen for the procedure that decodes the policy
    maximise     E_{y ~ π} [ R(x, y) / β − KL(π || π_ref) ] by policy gradient, with the KL exact at every token

Rivals that learn from the policy's own responses are subclasses, with `rewards` or `advantages` of their own. With Φ =
raw it is RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the objective and the leave-one-out baseline are the same, and
so is the expected gradient; RLOO takes the KL as a sampled cost in the reward, where it is exact here.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms import own_responses
from ctrl_jax.algorithms.protocol import Algorithm, Source
from ctrl_jax.steps import calibration, kl_budget, logprobs, policy_gradient, win_rate
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.theory.objective import Transformed
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Experience, Metric, Params, Policy, Scored


class Targets(NamedTuple):
    scored: Scored
    win_rate: jax.Array | None
    """[B] under the procedure; None where there are too few rewards to estimate it."""
    price: jax.Array
    """[B, N] nats that a response earns besides, less their baseline: 0 but under constraints (constrained.py)."""


@dataclass(frozen=True)
class Ctrl(Algorithm):
    policy: Policy
    transformed: Transformed
    """Φ, on (raw, calibrated)."""
    procedure: Procedure
    """How the policy will be decoded; the metric `win_rate` is under it."""
    beta: float
    """The weight of the KL to start with, in transformed rewards per nat."""
    kl_budget: float
    """Nats per response, which a controller steers β for."""
    hold_beta: bool
    """Whether β stays as it is."""
    eos_ids: tuple[int, ...]
    temperature: float
    """Of the sampling law, at which both policies are compared."""
    chunk_size: int
    """Tokens whose logits exist at a time."""
    goes_on: bool = dataclasses.field(default=False, kw_only=True)
    """Whether the training begins where a start ended, and not at the reference."""

    source = Source.POLICY
    metrics: ClassVar[tuple[Metric, ...]] = own_responses.METRICS

    def start(self) -> Controller:
        return kl_budget.init(self.beta, budget=self.kl_budget, held=self.hold_beta, goes_on=self.goes_on)

    def rewards(self, raw: jax.Array, calibrated: jax.Array, reference_rewards: jax.Array) -> jax.Array:
        """[B, N] what is trained on: of raw and calibrated rewards [B, N] and the reference's [B, K], ascending."""
        return self.transformed(raw, calibrated)

    def advantages(self, rewards: jax.Array) -> jax.Array:
        """[B, N] what ∇log π of a response is multiplied by, times β, beside the KL's part: of `rewards` [B, N]."""
        return policy_gradient.leave_one_out(rewards)

    def pull(self, targets: Targets, controller: Controller) -> jax.Array:
        """[B, N] what ∇log π of a response is multiplied by, beside the KL's part, in nats: A / β and the price."""
        return self.advantages(targets.scored.transformed) / controller.beta + targets.price

    def targets(self, batch: Experience) -> Targets:
        raw, reference_rewards = batch.raw, batch.reference_rewards
        calibrated = calibration.calibrate_sorted(raw, reference_rewards)
        scored, price = Scored(raw, calibrated, self.rewards(raw, calibrated, reference_rewards)), jnp.zeros_like(raw)
        if min(raw.shape[1], reference_rewards.shape[1]) < self.procedure.num_samples:
            return Targets(scored, None, price)
        # Unbiased of all K rewards. Of Q quantiles, which are no sample, it is an approximation, off by some n / Q for
        # best-of-n; the evaluation has samples of its own.
        return Targets(scored, win_rate.win_rate(raw, reference_rewards, self.procedure), price)

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Controller
    ) -> tuple[Mean, Comparison]:
        comparison = self.compare(params, frozen, batch)
        pull, lengths = self.pull(targets, extra), batch.rollouts.responses.lengths
        return policy_gradient.exact_kl_loss_by(comparison.log_probs, comparison.kl, pull, lengths), comparison

    def compare(self, params: Params, frozen: Params, batch: Experience) -> Comparison:
        """Policy and reference on the batch's responses."""
        prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
        return logprobs.compare_policies(
            self.policy, params, frozen, prompts, responses, temperature=self.temperature, chunk_size=self.chunk_size
        )

    def measure(self, batch: Experience, targets: Targets, auxiliary: Comparison) -> dict[str, Mean | StandardError]:
        return own_responses.measure(batch.rollouts, targets.scored, targets.win_rate, auxiliary, eos_ids=self.eos_ids)

    def after(self, extra: Controller, metrics: dict[str, jax.Array]) -> tuple[Controller, dict[str, jax.Array]]:
        controller = kl_budget.update(extra, metrics["kl"], metrics["kl_standard_error"])
        braked = controller if self.updates == 1 else extra  # protocol.py: several are made by the state before
        return controller, {"beta": extra.beta, "update_share": braked.share}

    def share(self, extra: Controller) -> jax.Array:
        return extra.share
