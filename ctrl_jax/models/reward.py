"""The reward model: the policy's trunk with a scalar head on what it makes of the response; or with several."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.models.lora import Lora
from ctrl_jax.types import Params, Prompts, Responses, RewardApply

Pooling = Literal["last", "mean"]


def _last(features: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, N, D] at each response's last real token."""
    return jnp.take_along_axis(features, (lengths - 1)[..., None, None], axis=2)[:, :, 0].astype(jnp.float32)


def _mean(features: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, N, D], the mean over each response's real tokens."""
    real = (jnp.arange(features.shape[2])[None, None] < lengths[..., None])[..., None]
    return jnp.where(real, features.astype(jnp.float32), 0).sum(axis=2) / lengths[..., None]


POOLED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"last": _last, "mean": _mean}
"""(features [B, N, T, D], lengths [B, N]) to those that a head reads, [B, N, D] float32."""


class Pooled(nn.Module):
    """The trunk, and what it makes of a whole response."""

    architecture: Architecture
    lora: Lora = Lora()
    rematerialize: bool = False
    fused_attention: bool = False
    pooling: Pooling = "last"

    def setup(self) -> None:
        self.trunk = Decoder(self.architecture, self.lora, self.rematerialize, self.fused_attention)

    def features(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """[B, N, D] of the responses, float32. Each token's features have read it and all before it."""
        _, cache = self.trunk.read_prompts(prompts)
        features = self.trunk.read_responses(cache, prompts.lengths, responses.tokens)
        return POOLED[self.pooling](features, responses.lengths)


class RewardModel(Pooled):
    def setup(self) -> None:
        super().setup()
        # Zero: every response starts with the same reward, whatever the trunk.
        self.head = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Raw rewards [B, N] (`types.RewardApply`)."""
        return self.head(self.features(prompts, responses))[..., 0]


class RewardEnsemble(Pooled):
    """Reward models that share their trunk, and have a head each."""

    members: int = 2

    def setup(self) -> None:
        super().setup()
        self.heads = nn.Dense(self.members, kernel_init=nn.initializers.zeros)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Raw rewards [B, N, members]."""
        rewards: jax.Array = self.heads(self.features(prompts, responses))
        return rewards


def features_apply(model: Pooled) -> RewardApply:
    """What the heads read, [B, N, D], as a pure function of a decoder's parameters."""

    def apply(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        features = model.apply({"params": {"trunk": params["params"]}}, prompts, responses, method="features")
        assert isinstance(features, jax.Array)
        return features

    return apply


def reward_apply(model: RewardModel | RewardEnsemble) -> RewardApply:
    """The reward model as the pure function that the steps ask for; an ensemble's has the members last."""

    def apply(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        rewards = model.apply(params, prompts, responses)
        assert isinstance(rewards, jax.Array)  # and not linen's pair with mutable collections, of which there are none
        return rewards

    return apply
