"""The reward model: the policy's trunk with a scalar head at the last real token of the response."""

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
        _, cache = self.trunk.read_prompts(prompts)
        features = self.trunk.read_responses(cache, prompts.lengths, responses.tokens)
        last = jnp.take_along_axis(features, (responses.lengths - 1)[..., None, None], axis=2)[:, :, 0]
        return self.head(last.astype(jnp.float32))[..., 0]


def reward_apply(model: RewardModel) -> RewardApply:
    """The reward model as the pure function that the steps ask for."""

    def apply(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        rewards = model.apply(params, prompts, responses)
        assert isinstance(rewards, jax.Array)  # and not linen's pair with mutable collections, of which there are none
        return rewards

    return apply
