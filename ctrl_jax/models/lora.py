"""Low-rank adapters: how they start, and how they are merged into the weights that they adapt.

A network's variables are {"params": ...} and, with an adapter, {"lora": ...}. Without the second it is the network
before adaptation, so that one copy of the weights serves a policy, its reference, and the trunk of a reward model.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ctrl_jax.errors import InputError
from ctrl_jax.models.architecture import MATRICES
from ctrl_jax.types import Params

PROJECTIONS = tuple(matrix.name for matrix in MATRICES)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank) A B, of which A and B are trained."""

    rank: int = 0
    """0 trains the whole model."""
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    """Which projections have one: of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    last_layers: int | None = None
    """How many layers have them, counted from the last; by default all. The layers below are the reference's: policy
    and reference read them once, and the backward pass ends there."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(
                f"Lora.rank is {self.rank!r}",
                field="model.lora.rank",
                value=self.rank,
                remedy="it must be 0 or greater.",
            )
        if not 1e-6 <= self.alpha <= 1e6:
            raise InputError(
                f"Lora.alpha is {self.alpha!r}",
                field="model.lora.alpha",
                value=self.alpha,
                remedy="it must be between 1e-06 and 1e+06: it scales what the adapters add to weights in float32.",
            )
        unknown = [target for target in self.targets if target not in PROJECTIONS]
        if unknown or not self.targets:
            raise InputError(
                f"Lora.targets has {unknown or 'nothing'}",
                field="model.lora.targets",
                value=self.targets,
                remedy=f"choose from {', '.join(PROJECTIONS)}.",
            )
        if self.last_layers is None:
            return
        if self.last_layers < 1:
            raise InputError(
                f"Lora.last_layers is {self.last_layers!r}",
                field="model.lora.last_layers",
                value=self.last_layers,
                remedy="it must be 1 or greater, or left out.",
            )
        if self.rank == 0:
            raise InputError(
                f"Lora.last_layers is {self.last_layers} and Lora.rank is 0, which trains all weights",
                field="model.lora.last_layers",
                value=self.last_layers,
                remedy="give `model.lora.rank` a number above 0, or leave last_layers out.",
            )

    def first_layer(self, layers: int) -> int:
        """The lowest of a decoder's `layers` that is trained; 0 where there is no adapter.

        Raises:
          InputError: if adapters are asked for in more layers than there are.
        """
        if self.last_layers is None:
            return 0
        if self.last_layers > layers:
            raise InputError(
                f"Lora.last_layers is {self.last_layers}, and the model has {layers} layers",
                field="model.lora.last_layers",
                value=self.last_layers,
                remedy=f"give 1 to {layers}, or leave it out for adapters in all of them.",
            )
        return layers - self.last_layers


def init(params: Params, lora: Lora, key: jax.Array) -> Params:
    """Adapters of a decoder's `params`, {"layers_i": {target: {"a": [in, rank], "b": [rank, out]}}}, in float32.

    A is Gaussian with variance 1 / in and B is 0, so that nothing changes at first (Hu et al. 2021, section 4.1). A
    layer starts with the same A however many layers have one.
    """
    layers = sorted(name for name in params if name.startswith("layers_"))
    first = lora.first_layer(len(layers))
    adapters: dict[str, Any] = {}
    for index, name in enumerate(layers):
        if int(name.removeprefix("layers_")) < first:
            continue
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
    """`params` with W + (alpha / rank) A B in place of every adapted W, in W's own dtype.

    Args:
      params: of a decoder; those without an adapter are returned as they are.
      adapters: as `init` makes them; also of the `embedding` [V, D] and the `head` [D, V].
    """
    if "a" not in adapters:
        return {**params, **{name: merge(params[name], part, lora) for name, part in adapters.items()}}
    (name,) = params.keys() & {"kernel", "embedding"}
    weight = params[name]
    changed = weight.astype(jnp.float32) + lora.alpha / lora.rank * (adapters["a"] @ adapters["b"])
    return {**params, name: changed.astype(weight.dtype)}


def overlay(frozen: Params, trained: Params) -> Params:
    """One nested dict of both; where both have a leaf, the trained one."""
    if not isinstance(trained, dict):
        return trained
    return {**frozen, **{name: overlay(frozen.get(name, {}), part) for name, part in trained.items()}}
