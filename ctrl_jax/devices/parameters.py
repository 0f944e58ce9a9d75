"""Parameters of networks before training, each made on the devices that it is split over."""

import functools

import jax
from jax.sharding import Mesh

from ctrl_jax.devices import partitioning
from ctrl_jax.devices.programs import placed
from ctrl_jax.models import networks
from ctrl_jax.models.networks import Networks
from ctrl_jax.types import Params


def init_decoder(parts: Networks, mesh: Mesh, key: jax.Array) -> Params:
    """The variables of a decoder from scratch."""
    return placed(mesh, functools.partial(networks.initial, parts), key)


def check_they_divide(parts: Networks, mesh: Mesh) -> None:
    """Raises InputError if a parameter of the decoder cannot be split over the mesh; nothing is made."""
    partitioning.specs(mesh, jax.eval_shape(functools.partial(networks.initial, parts), jax.random.key(0)))


def adapt_decoder(parts: Networks, mesh: Mesh, key: jax.Array, params: Params) -> Params:
    """What is trained when a decoder starts as `params`: its adapter, or all of it."""
    if parts.lora.rank == 0:
        return params
    return {"lora": _init_adapters(parts, mesh, key, params["params"])}


def adapt_reward(parts: Networks, mesh: Mesh, key: jax.Array, reference: Params) -> tuple[Params, Params]:
    """(frozen, trained) parameters of a reward model whose trunk starts as the reference."""
    trunk = reference["params"]
    head = placed(mesh, functools.partial(networks.initial_head, parts))
    if parts.lora.rank == 0:
        return {}, {"params": {"trunk": trunk, **head}}
    adapters = _init_adapters(parts, mesh, key, trunk)
    return {"params": {"trunk": trunk}}, {"params": head, "lora": {"trunk": adapters}}


def reward_of(parts: Networks, mesh: Mesh, reference: Params, kernel: jax.Array) -> Params:
    """A reward model on the reference itself, whose head has this kernel [D, members]."""
    head = placed(mesh, functools.partial(networks.head, parts), kernel)
    return {"params": {"trunk": reference["params"], **head}}


def _init_adapters(parts: Networks, mesh: Mesh, key: jax.Array, params: Params) -> Params:
    return placed(mesh, functools.partial(networks.initial_adapters, parts), params, key)
