"""InfAlign-CTRL: calibrate and transform the reward, then maximise it under a KL penalty.

For a prompt x, the policy's own responses y and their raw rewards r (Balashankar et al. 2024, arXiv 2412.19792):

    calibrate    C(x, y) = how often y beats a response of the reference policy, in [0, 1]
    transform    R(x, y) = Φ(C(x, y)), Φ chosen for the procedure that decodes the policy
    maximise     E_{y ~ π} [ R(x, y) / β − KL(π || π_ref) ] by policy gradient, with the KL exact at every token
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import calibration, kl, kl_budget, logprobs, policy_gradient, win_rate
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError, length_mask, masked_mean
from ctrl_jax.theory.objective import Transformed
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Experience, Metric, Params, Policy, Scored

METRICS = (
    Metric("raw_reward", "raw reward", "reward", guarded=True),
    Metric("sampler_scorer_gap", "nats per token", "log-probs"),
    Metric("kl", "nats per response", "KL", guarded=True, shown=True),
    loss_in("nats per response"),
    GRADIENT,
    Metric("beta", "transformed reward per nat", shown=True),
    Metric("calibrated_reward", "rank in [0, 1]", shown=True),
    Metric("win_rate", "share of prompts", shown=True),
    Metric("transformed_reward", "transformed reward"),
    Metric("constant_rewards", "share of prompts"),
    Metric("kl_k1", "nats per response"),
    Metric("kl_k2", "nats per response"),
    Metric("kl_k3", "nats per response"),
    Metric("kl_standard_error", "nats per response"),
    Metric("response_length", "tokens"),
    Metric("unfinished", "share of responses"),
)


class Targets(NamedTuple):
    scored: Scored
    win_rate: jax.Array | None
    """[B] under the procedure; None where there are too few rewards to estimate it."""


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

    source = Source.POLICY
    metrics: ClassVar[tuple[Metric, ...]] = METRICS

    def start(self) -> Controller:
        return kl_budget.init(self.beta, budget=self.kl_budget, held=self.hold_beta)

    def targets(self, batch: Experience) -> Targets:
        return targets(batch, self.transformed, self.procedure)

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Controller
    ) -> tuple[Mean, Comparison]:
        prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
        comparison = logprobs.compare_policies(
            self.policy, params, frozen, prompts, responses, temperature=self.temperature, chunk_size=self.chunk_size
        )
        rewards = targets.scored.transformed
        loss = policy_gradient.exact_kl_loss(
            comparison.log_probs, comparison.kl, rewards, responses.lengths, beta=extra.beta
        )
        return loss, comparison

    def measure(self, batch: Experience, targets: Targets, auxiliary: Comparison) -> dict[str, Mean | StandardError]:
        return measure(batch, targets, auxiliary, self.eos_ids)

    def after(self, extra: Controller, metrics: dict[str, jax.Array]) -> tuple[Controller, dict[str, jax.Array]]:
        return kl_budget.update(extra, metrics["kl"]), {"beta": extra.beta}


def targets(batch: Experience, transformed: Transformed, procedure: Procedure) -> Targets:
    """Calibrated and transformed rewards, and the win rate against the reference."""
    raw, reference_rewards = batch.raw, batch.reference_rewards
    calibrated = calibration.calibrate_sorted(raw, reference_rewards)
    scored = Scored(raw, calibrated, transformed(raw, calibrated))
    if min(raw.shape[1], reference_rewards.shape[1]) < procedure.num_samples:
        return Targets(scored, None)
    # Unbiased of all K rewards. Of Q quantiles, which are no sample, it is an approximation, off by some n / Q for
    # best-of-n; the evaluation has samples of its own.
    return Targets(scored, win_rate.win_rate(raw, reference_rewards, procedure))


def measure(
    batch: Experience, targets: Targets, comparison: Comparison, eos_ids: tuple[int, ...]
) -> dict[str, Mean | StandardError]:
    """The metrics of the policy's own responses, by their comparison with the reference."""
    responses, scored = batch.rollouts.responses, targets.scored

    def over_responses(values: jax.Array) -> Mean:
        return masked_mean(values, None)

    def sequence_kl(per_token: jax.Array) -> Mean:
        return over_responses(kl.per_sequence(per_token, responses.lengths))

    mask = length_mask(responses.lengths, responses.tokens.shape[-1])
    last = jnp.take_along_axis(responses.tokens, responses.lengths[..., None] - 1, axis=-1)[..., 0]
    unfinished = ~jnp.isin(last, jnp.asarray(eos_ids))
    exact_kl = kl.per_sequence(comparison.kl, responses.lengths)
    both = comparison.log_probs, comparison.reference_log_probs
    means: dict[str, Mean | StandardError] = {
        "kl": over_responses(exact_kl),
        "kl_k1": sequence_kl(kl.k1(*both)),
        "kl_k2": sequence_kl(kl.k2(*both)),
        "kl_k3": sequence_kl(kl.k3(*both)),
        "raw_reward": over_responses(scored.raw),
        "constant_rewards": masked_mean((scored.raw.max(axis=1) == scored.raw.min(axis=1)).astype(jnp.float32), None),
        "calibrated_reward": over_responses(scored.calibrated),
        "transformed_reward": over_responses(scored.transformed),
        "response_length": over_responses(responses.lengths.astype(jnp.float32)),
        "unfinished": over_responses(unfinished.astype(jnp.float32)),
        "sampler_scorer_gap": masked_mean(jnp.abs(comparison.log_probs - batch.rollouts.log_probs), mask),
    }
    if targets.win_rate is not None:
        means["win_rate"] = over_responses(targets.win_rate)
    return means | {"kl_standard_error": StandardError(kl.estimate(exact_kl))}
