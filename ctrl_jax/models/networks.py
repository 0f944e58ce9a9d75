"""The networks of an experiment as pure functions: how their parameters start, and what they compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.models import decoder, lora, reward
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.lora import Lora
from ctrl_jax.types import Params, Policy, Prompts, Responses, RewardApply


class Networks(NamedTuple):
    """A language model and a reward model on its trunk, of one architecture."""

    architecture: Architecture
    lora: Lora
    decoder: decoder.Decoder
    policy: Policy
    reward: RewardApply
    """Of an ensemble, [B, N, members]."""
    features: RewardApply
    """(a decoder's parameters, prompts, responses) to what the heads read of each response, [B, N, D]."""
    members: int = 1
    """Heads of the reward model."""


def create(
    architecture: Architecture,
    adapters: Lora,
    *,
    members: int = 1,
    pooling: reward.Pooling = "last",
    rematerialize: bool = False,
    fused_attention: bool = False,
) -> Networks:
    """The networks of an architecture.

    Args:
      architecture: its sizes.
      adapters: what is trained beside it, if anything.
      members: heads of the reward model; several are an ensemble.
      pooling: what of the response's features they read.
      rematerialize: compute activations anew in the backward pass.
      fused_attention: as `attention.has_kernel` finds it on their mesh.
    """
    language_model = decoder.Decoder(architecture, adapters, rematerialize, fused_attention)
    trunk = (architecture, adapters, rematerialize, fused_attention, pooling)
    reward_model = reward.RewardModel(*trunk) if members == 1 else reward.RewardEnsemble(*trunk, members)
    return Networks(
        architecture, adapters, language_model, decoder.policy(language_model),
        reward.reward_apply(reward_model), reward.features_apply(reward_model), members,
    )  # fmt: skip


def initial(networks: Networks, key: jax.Array) -> Params:
    """The variables of a decoder from scratch."""
    prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32))
    responses = Responses(jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1), jnp.int32))
    return {"params": networks.decoder.init(key, prompts, responses)["params"]}


def initial_adapters(networks: Networks, params: Params, key: jax.Array) -> Params:
    """Adapters of a decoder's `params` that change nothing yet."""
    return lora.init(params, networks.lora, key)


def initial_head(networks: Networks) -> Params:
    """The head of a reward model, or those of an ensemble. Zeros: every response starts with the same reward."""
    return head(networks, jnp.zeros((networks.architecture.width, networks.members)))


def head(networks: Networks, kernel: jax.Array) -> Params:
    """The head, or those of an ensemble, with a kernel [D, members]; no reward is added to what that gives."""
    return {"head" if networks.members == 1 else "heads": {"kernel": kernel, "bias": jnp.zeros(networks.members)}}


def merged(networks: Networks, params: Params) -> Params:
    """A decoder's variables with its adapter, if it has one, in the weights."""
    if "lora" not in params:
        return params
    # Not one program: it would copy the weights that have no adapter.
    return {"params": lora.merge(params["params"], params["lora"], networks.lora)}


def cast(networks: Networks, params: Params) -> Params:
    """Parameters in the type that they are computed with, where layers cast them: once, and not for every token.

    Vectors stay as they are: norms are computed in float32.
    """
    dtype = networks.architecture.dtype
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
