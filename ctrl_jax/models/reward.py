"""The reward model: the policy's trunk with a scalar head at the last real token of the response."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctrl_jax.config import Model
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.types import Params, Prompts, Responses, RewardApply


class RewardModel(nn.Module):
    config: Model
    vocabulary_size: int

    def setup(self) -> None:
        self.trunk = Decoder(self.config, self.vocabulary_size)
        # Zero: every response starts with the same reward, whatever the trunk.
        self.head = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Raw rewards [B, N] (`types.RewardApply`)."""
        _, cache = self.trunk.read_prompts(prompts)
        features = self.trunk.read_responses(cache, prompts.lengths, responses.tokens)
        last = jnp.take_along_axis(features, (responses.lengths - 1)[..., None, None], axis=2)[:, :, 0]
        return self.head(last)[..., 0]


def reward_apply(model: RewardModel) -> RewardApply:
    """The reward model as the pure function that the steps ask for."""

    def apply(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        rewards = model.apply({"params": params}, prompts, responses)
        assert isinstance(rewards, jax.Array)  # and not linen's pair with mutable collections, of which there are none
        return rewards

    return apply


def from_policy(reward_params: Params, policy_params: Params) -> Params:
    """Reward parameters whose trunk starts as the policy's."""
    return {**reward_params, "trunk": policy_params}
