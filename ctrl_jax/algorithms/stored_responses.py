"""What algorithms share that learn from the reference's stored responses: targets, log-ratios and metrics.

They fit a law π* = w π_ref that is known, on responses y ~ π_ref that were drawn and scored once. That of `Tilted` is
the optimum of E_{y ~ π} [Φ(C(x, y))] − β KL(π || π_ref), in closed form (InfAlign, arXiv 2412.19792):

    w(y) = exp(Φ(û(y)) / β) / Z(x),    Z(x) = E_{y ~ π_ref} exp(Φ(û(y)) / β)

That of best_of_group.py is the law of best-of-N.

û is the rank of a response among the K − 1 others of its prompt. Without ties the K ranks of a prompt are 0, 1/(K − 1),
..., 1 in some order, whatever was drawn; so their mean of exp(Φ / β) is no estimate but the Z of such ranks, and with
ties it follows those of the prompt.

With few references û is a noisy rank, and a fit averages over that noise what its own loss is linear in: `regression`
the logarithm, Φ(û) / β, and `weighted_likelihood` exp(Φ(û) / β) itself. Of exp(10u) the second is larger by 26 / 13 /
4 % at K = 16 / 32 / 100.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import calibration, kl, logprobs
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.theory.objective import Transformed
from ctrl_jax.types import Metric, Params, Policy, Responses, StoredResponses

MOST = 60.0
"""Nats of log π/π_ref, either way, as far as the metrics follow it: exp of more is no float32. The loss follows all."""


class Targets(NamedTuple):
    calibrated: jax.Array
    """[B, N] û in [0, 1]."""
    log_weights: jax.Array
    """[B, N] log w, nats: the log-ratio of π* to the reference."""
    kl: jax.Array
    """[B] KL(π* || π_ref) on the prompt's K responses, nats."""
    effective_samples: jax.Array
    """[B] (Σ w)² / (K Σ w²): the share of the prompt's K responses that an average under w is worth."""


@dataclass(frozen=True)
class FromStored(Algorithm):
    """An algorithm whose loss is a function of log π/π_ref of a group's responses, [B, N], and of their rewards."""

    policy: Policy
    temperature: float
    """Of the law whose log-probs are compared."""
    chunk_size: int
    """Tokens whose logits exist at a time."""

    source = Source.REFERENCE
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kl", "nats per response", "KL", guarded=True, shown=True),
        loss_in("nats per group", shown=True),
        GRADIENT,
        Metric("target_kl", "nats per response"),
        Metric("group_divergence", "nats per group", shown=True),
        Metric("calibrated_reward", "rank in [0, 1]", shown=True),
        Metric("raw_reward", "raw reward"),
        Metric("constant_rewards", "share of groups"),
        Metric("target_effective_samples", "share of a prompt's responses"),
        Metric("effective_samples", "share of a group"),
        Metric("kl_standard_error", "nats per response"),
        Metric("response_length", "tokens"),
    )

    @abc.abstractmethod
    def log_weights(self, batch: StoredResponses, calibrated: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log w of a group's responses, [B, N], whose û is `calibrated`, and of all of the prompt's, [B, K]."""

    def targets(self, batch: StoredResponses) -> Targets:
        calibrated = calibration.without_themselves(batch.raw, batch.reference_rewards)
        of_group, of_every = self.log_weights(batch, calibrated)
        target_kl = jnp.mean(jnp.exp(of_every) * of_every, axis=-1)
        return Targets(calibrated, of_group, target_kl, _effective(of_every))

    def log_ratios(self, params: Params, batch: StoredResponses) -> jax.Array:
        """log π/π_ref of whole responses, [B, N] nats."""
        # On disk tokens take 2 bytes where the vocabulary allows it.
        responses = Responses(*(x.astype(jnp.int32) for x in (batch.responses.tokens, batch.responses.lengths)))
        log_probs = logprobs.of_responses(
            self.policy, params, batch.prompts, responses, temperature=self.temperature, chunk_size=self.chunk_size
        )
        return log_probs - batch.log_probs

    def measure(self, batch: StoredResponses, targets: Targets, auxiliary: Any) -> dict[str, Mean | StandardError]:
        """Expectations under the policy, by the responses of the reference and their ratios ρ = π/π_ref.

        The KL is the mean of ρ log ρ − ρ + 1, without bias and never negative; its error is that of the groups. Ranks
        and lengths are Σ ρ x / Σ ρ over the whole batch, whose bias falls as 1 / (B N). All of them lean on few
        responses where `effective_samples` is small. `group_divergence`, KL(q || p) of the normalised w and ρ of a
        group, is 0 at π*, whatever the loss.
        """
        log_ratio = jnp.clip(auxiliary, -MOST, MOST)
        ratio = jnp.exp(log_ratio)
        own_kl = ratio * kl.k3(log_ratio, jnp.zeros_like(log_ratio))

        def under_the_policy(values: jax.Array) -> Mean:
            return Mean(jnp.sum(ratio * values), jnp.sum(ratio))

        return {
            "kl": masked_mean(own_kl, None),
            "kl_standard_error": StandardError(kl.estimate(own_kl)),
            "target_kl": masked_mean(targets.kl, None),
            "group_divergence": masked_mean(divergence(targets.log_weights, auxiliary), None),
            "calibrated_reward": under_the_policy(targets.calibrated),
            "raw_reward": under_the_policy(batch.raw),
            "response_length": under_the_policy(batch.responses.lengths.astype(jnp.float32)),
            "constant_rewards": masked_mean((batch.raw.max(axis=1) == batch.raw.min(axis=1)).astype(jnp.float32), None),
            "target_effective_samples": masked_mean(targets.effective_samples, None),
            "effective_samples": masked_mean(_effective(auxiliary), None),
        }


@dataclass(frozen=True)
class Tilted(FromStored):
    """An algorithm whose loss is a function of log w and of log π/π_ref, each [B, N], w = exp(Φ / β) / Z."""

    transformed: Transformed
    """Φ, on (raw, calibrated)."""
    beta: float
    """The weight of the KL, in transformed rewards per nat."""

    metrics: ClassVar[tuple[Metric, ...]] = (*FromStored.metrics, Metric("beta", "transformed reward per nat"))

    @abc.abstractmethod
    def of_log_ratios(self, log_ratio: jax.Array, log_weights: jax.Array) -> Mean:
        """The loss of log π/π_ref and log w, each [B, N]."""

    def log_weights(self, batch: StoredResponses, calibrated: jax.Array) -> tuple[jax.Array, jax.Array]:
        every = batch.reference_rewards
        exponents = self.transformed(every, calibration.leave_one_out(every)) / self.beta
        log_mean = jax.nn.logsumexp(exponents, axis=-1, keepdims=True) - jnp.log(every.shape[-1])  # log Z
        return self.transformed(batch.raw, calibrated) / self.beta - log_mean, exponents - log_mean

    def loss(
        self, params: Params, frozen: Params, batch: StoredResponses, targets: Targets, extra: None
    ) -> tuple[Mean, jax.Array]:
        log_ratio = self.log_ratios(params, batch)
        return self.of_log_ratios(log_ratio, targets.log_weights), log_ratio

    def after(self, extra: None, metrics: dict[str, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        return None, {"beta": jnp.asarray(self.beta, jnp.float32)}


def divergence(log_weights: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """KL(q || p) of w and ρ normalised within each group: [B] nats, of log w and log ρ, each [B, N]."""
    q, p = (jax.nn.log_softmax(x, axis=-1) for x in (log_weights, log_ratio))
    return jnp.sum(jnp.exp(q) * (q - p), axis=-1)


def _effective(log_weights: jax.Array) -> jax.Array:
    """(Σ w)² / (n Σ w²) of log-weights [..., n], in [1/n, 1]."""
    both = 2 * jax.nn.logsumexp(log_weights, axis=-1) - jax.nn.logsumexp(2 * log_weights, axis=-1)
    return jnp.exp(both) / log_weights.shape[-1]
