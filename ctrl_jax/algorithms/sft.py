"""Supervised fine-tuning: maximum likelihood of the demonstrated responses' tokens, −mean log π(token | before it)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import logprobs
from ctrl_jax.steps.masked import Mean, length_mask, masked_mean
from ctrl_jax.types import Examples, Metric, Params, Policy


@dataclass(frozen=True)
class Sft(Algorithm):
    policy: Policy
    chunk_size: int
    """Tokens whose logits exist at a time."""

    source = Source.DEMONSTRATIONS
    metrics: ClassVar[tuple[Metric, ...]] = (loss_in("nats per token", shown=True), GRADIENT)

    def loss(
        self, params: Params, frozen: Params, batch: Examples, targets: Any, extra: None
    ) -> tuple[Mean, dict[str, Any]]:
        responses = batch.responses
        features = self.policy.apply(params, batch.prompts, responses)
        log_probs = logprobs.token_log_probs(
            self.policy.unembed, params, features, responses.tokens, chunk_size=self.chunk_size
        )
        return masked_mean(-log_probs, length_mask(responses.lengths, log_probs.shape[-1])), {}
