"""Low-rank adapters: how they start, and how they are merged into the weights that they adapt.

A network's variables are {"params": ...} and, with an adapter, {"lora": ...}. Without the second it is the network
before adaptation, so that one copy of the weights serves a policy, its reference, and the trunk of a reward model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ctrl_jax.config import Lora
from ctrl_jax.types import Params


def init(params: Params, lora: Lora, key: jax.Array) -> Params:
    """Adapters of a decoder's `params`, {"layers_i": {target: {"a": [in, rank], "b": [rank, out]}}}, in float32.

    A is Gaussian with variance 1 / in and B is 0, so that nothing changes at first (Hu et al. 2021, section 4.1).
    """
    layers = sorted(name for name in params if name.startswith("layers_"))
    adapters: dict[str, Any] = {}
    for index, name in enumerate(layers):
        adapters[name] = {}
        for position, target in enumerate(lora.targets):
            rows, columns = params[name][target]["kernel"].shape
            place = jax.random.fold_in(jax.random.fold_in(key, index), position)
            adapters[name][target] = {
                "a": jax.random.normal(place, (rows, lora.rank)) * rows**-0.5,
                "b": jnp.zeros((lora.rank, columns)),
            }
    return adapters


def merge(params: Params, adapters: Params, lora: Lora) -> Params:
    """A decoder's `params` with W + (alpha / rank) A B in place of every adapted W, in W's own dtype."""

    def merged(layer: Params, name: str) -> Params:
        kernels = {
            target: {
                **layer[target],
                "kernel": (
                    layer[target]["kernel"].astype(jnp.float32) + lora.alpha / lora.rank * (adapter["a"] @ adapter["b"])
                ).astype(layer[target]["kernel"].dtype),
            }
            for target, adapter in adapters[name].items()
        }
        return {**layer, **kernels}

    return {name: merged(part, name) if name in adapters else part for name, part in params.items()}


def overlay(frozen: Params, trained: Params) -> Params:
    """One nested dict of both; where both have a leaf, the trained one."""
    if not isinstance(trained, dict):
        return trained
    return {**frozen, **{name: overlay(frozen.get(name, {}), part) for name, part in trained.items()}}
