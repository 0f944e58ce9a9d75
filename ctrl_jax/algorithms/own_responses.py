"""What algorithms that sample from the policy report of its responses."""

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.protocol import GRADIENT, loss_in
from ctrl_jax.steps import kl, sampling
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError, length_mask, masked_mean
from ctrl_jax.types import Metric, Rollouts, Scored

METRICS = (
    Metric("raw_reward", "raw reward", "reward", guarded=True),
    Metric("sampler_scorer_gap", "nats per token", "log-probs"),
    Metric("kl", "nats per response", "KL", guarded=True, shown=True),
    loss_in("nats per response"),
    GRADIENT,
    Metric("beta", "transformed reward per nat", shown=True),
    Metric("update_share", "share of the optimizer's update"),
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


def measure(
    rollouts: Rollouts, scored: Scored, win_rate: jax.Array | None, comparison: Comparison, *, eos_ids: tuple[int, ...]
) -> dict[str, Mean | StandardError]:
    """The metrics of the policy's own responses, by their comparison with the reference."""
    responses = rollouts.responses

    def over_responses(values: jax.Array) -> Mean:
        return masked_mean(values, None)

    def sequence_kl(per_token: jax.Array) -> Mean:
        return over_responses(kl.per_sequence(per_token, responses.lengths))

    mask = length_mask(responses.lengths, responses.tokens.shape[-1])
    unfinished = ~sampling.ended(responses, eos_ids)
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
        "sampler_scorer_gap": masked_mean(jnp.abs(comparison.log_probs - rollouts.log_probs), mask),
    }
    if win_rate is not None:
        means["win_rate"] = over_responses(win_rate)
    return means | {"kl_standard_error": StandardError(kl.estimate(exact_kl))}
