"""The reward model: the policy's trunk with a scalar head at the last real token of the response; or with several."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.models.lora import Lora
from ctrl_jax.types import Params, Prompts, Responses, RewardApply


class RewardModel(nn.Module):
    architecture: Architecture
    lora: Lora = Lora()
    rematerialize: bool = False
    fused_attention: bool = False

    def setup(self) -> None:
        self.trunk = Decoder(self.architecture, self.lora, self.rematerialize, self.fused_attention)
        # Zero: every response starts with the same reward, whatever the trunk.
        self.head = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Raw rewards [B, N] (`types.RewardApply`)."""
        return self.head(_last_features(self.trunk, prompts, responses))[..., 0]


class RewardEnsemble(nn.Module):
    """Reward models that share their trunk, and have a head each."""

    architecture: Architecture
    members: int
    lora: Lora = Lora()
    rematerialize: bool = False
    fused_attention: bool = False

    def setup(self) -> None:
        self.trunk = Decoder(self.architecture, self.lora, self.rematerialize, self.fused_attention)
        self.heads = nn.Dense(self.members, kernel_init=nn.initializers.zeros)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Raw rewards [B, N, members]."""
        rewards: jax.Array = self.heads(_last_features(self.trunk, prompts, responses))
        return rewards


def _last_features(trunk: Decoder, prompts: Prompts, responses: Responses) -> jax.Array:
    """[B, N, D] at each response's last real token, float32."""
    _, cache = trunk.read_prompts(prompts)
    features = trunk.read_responses(cache, prompts.lengths, responses.tokens)
    last = jnp.take_along_axis(features, (responses.lengths - 1)[..., None, None], axis=2)[:, :, 0]
    return last.astype(jnp.float32)


def reward_apply(model: RewardModel | RewardEnsemble) -> RewardApply:
    """The reward model as the pure function that the steps ask for; an ensemble's has the members last."""

    def apply(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        rewards = model.apply(params, prompts, responses)
        assert isinstance(rewards, jax.Array)  # and not linen's pair with mutable collections, of which there are none
        return rewards

    return apply
