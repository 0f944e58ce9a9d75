"""CTRL with a critic: each token is moved by what it changed, and not by what all the others did.

    A_t = Σ_{l ≥ 0} λ^l (V_{t+l+1} − V_{t+l}),    V = R behind the last token

takes the place of CTRL's advantage R at every token (steps/critic.py; Schulman et al. 2016, arXiv 1506.02438, equation
16). The optimum is CTRL's where V is right, and for λ = 1 always. V is no network: two ridge regressions, on the hidden
states of the reference, which the KL needs anyway. It is that of the steps before, so that no response judges itself.

A reward says one number of a whole response. In the gradient of a token's probability, what the other tokens did to
that number is noise; benchmarks/gradient_signal.py measures how much of it the critic takes away. What the critic does
not know yet counts, with λ < 1, for the last tokens alone.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms import own_responses
from ctrl_jax.algorithms.ctrl import Ctrl, Targets
from ctrl_jax.steps import critic, logprobs, policy_gradient
from ctrl_jax.steps.critic import Regression
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError, length_mask, masked_mean
from ctrl_jax.types import Experience, Metric, Params

OF_RANK, OF_REWARD = 1000.0, 10.0
"""Penalties of the two regressions, in responses (critic.learned): the first has hundreds of features or more, the
second six."""


class Extra(NamedTuple):
    controller: Controller
    of_rank: Regression
    """Of a response's rank, on its prefix."""
    of_reward: Regression
    """Of its reward, on the ranks that are found so."""


class Auxiliary(NamedTuple):
    comparison: Comparison
    prefixes: jax.Array
    """[B, N, T, D]."""
    powers: jax.Array
    """[B, N, T, POWERS]."""
    values: jax.Array
    """[B, N, T]."""


@dataclasses.dataclass(frozen=True)
class ActorCritic(Ctrl):
    trace: float = dataclasses.field(kw_only=True)
    """λ."""
    width: int = dataclasses.field(kw_only=True)
    """D, of the hidden states."""
    prompts_per_step: int = dataclasses.field(kw_only=True)
    samples_per_prompt: int = dataclasses.field(kw_only=True)

    metrics: ClassVar[tuple[Metric, ...]] = (
        *own_responses.METRICS, Metric("critic_explains", "share of the reward's variance", shown=True),
    )  # fmt: skip
    internal: ClassVar[tuple[str, ...]] = (
        "rank_gram",
        "rank_moment",
        "reward_gram",
        "reward_moment",
        "errors",
        "squares",
    )

    def start(self) -> Extra:  # type: ignore[override]
        return Extra(super().start(), critic.empty(self.width), critic.empty(critic.POWERS))

    def loss(  # type: ignore[override]
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Extra
    ) -> tuple[Mean, Auxiliary]:
        prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
        features, reference_features = logprobs.read_policies(self.policy, params, frozen, prompts, responses)
        comparison = logprobs.compare(
            self.policy.unembed, params, features, frozen, reference_features, responses.tokens,
            temperature=self.temperature, chunk_size=self.chunk_size,
        )  # fmt: skip
        prefixes = critic.prefixes(jax.lax.stop_gradient(reference_features), responses.lengths)
        powers = critic.powers(prefixes @ extra.of_rank.weights, responses.lengths)
        values = powers @ extra.of_reward.weights
        rewards = self.advantages(targets.scored.transformed)
        pull = critic.advantages(values, rewards, responses.lengths, trace=self.trace) / extra.controller.beta
        pull += targets.price[..., None]  # of which the critic knows nothing: it is that of whole responses
        loss = policy_gradient.exact_kl_loss_by(comparison.log_probs, comparison.kl, pull, responses.lengths)
        return loss, Auxiliary(comparison, prefixes, powers, values)

    def measure(  # type: ignore[override]
        self, batch: Experience, targets: Targets, auxiliary: Auxiliary
    ) -> dict[str, Mean | StandardError]:
        lengths, rewards = batch.rollouts.responses.lengths, self.advantages(targets.scored.transformed)
        ranks = policy_gradient.leave_one_out(targets.scored.calibrated)
        of_rank = critic.sums(auxiliary.prefixes, ranks, lengths)
        of_reward = critic.sums(auxiliary.powers, rewards, lengths)
        mask = length_mask(lengths, auxiliary.values.shape[-1])
        every = jnp.broadcast_to(rewards[..., None], mask.shape)
        measured: dict[str, Mean | StandardError] = {
            "rank_gram": of_rank[0], "rank_moment": of_rank[1],
            "reward_gram": of_reward[0], "reward_moment": of_reward[1],
            "errors": masked_mean((every - auxiliary.values) ** 2, mask), "squares": masked_mean(every**2, mask),
        }  # fmt: skip
        return super().measure(batch, targets, auxiliary.comparison) | measured

    def after(self, extra: Extra, metrics: dict[str, Any]) -> tuple[Extra, dict[str, Any]]:  # type: ignore[override]
        controller, more = super().after(extra.controller, metrics)
        count = self.prompts_per_step * self.samples_per_prompt
        of_rank = critic.learned(extra.of_rank, metrics["rank_gram"], metrics["rank_moment"], count, penalty=OF_RANK)
        of_reward = critic.learned(
            extra.of_reward, metrics["reward_gram"], metrics["reward_moment"], count, penalty=OF_REWARD
        )
        squares = metrics["squares"]
        explains = jnp.where(squares > 0, 1 - metrics["errors"] / jnp.where(squares > 0, squares, 1), 0)
        return Extra(controller, of_rank, of_reward), more | {"critic_explains": explains}

    def share(self, extra: Extra) -> jax.Array:  # type: ignore[override]
        return super().share(extra.controller)
