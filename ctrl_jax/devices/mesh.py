"""Devices and where arrays live on them.

This is where a user of `jax.pmap` should look. Since jax 0.10 `pmap` *is* `jit(shard_map)`, and its documentation sends
new code to `jax.shard_map`: the steps are mapped over the axes `data` and `fsdp` of this mesh by `shard_map` inside
`jit` (programs.py), and arrays are placed by `shard` and `replicate`, where pmap had a leading device axis. How a
network's parameters are sharded is in devices/partitioning.py.
"""

import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts

Tree = TypeVar("Tree")

BATCH_AXES = ("data", "fsdp")
"""What batches are split over. Along `data` the parameters are copied, along `fsdp` they are split as well."""
BATCH = PartitionSpec(BATCH_AXES)


def num_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divide_cpu(num_devices: int) -> None:
    """Makes so many devices of this host's CPU, unless the environment says how many. Call it before jax's first use.

    XLA gives one device's program all cores, but in a small model few of its operations are large enough to use them.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.values["jax_num_cpu_devices"] < 0:
        jax.config.update("jax_num_cpu_devices", num_devices)


def make_mesh(num_devices: int | None = None, *, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `model`; what the last two leave of the devices is `data`.

    Args:
      num_devices: by default all, of all processes.
      fsdp: devices that share the parameters and what is kept for each, and split a batch.
      model: devices that share the work on one part of a batch, as well as the parameters.

    Raises:
      InputError: if there are fewer devices, if a process would have none of them, or if their number does not divide
        by fsdp × model.
    """
    devices = jax.devices()
    num_devices = len(devices) if num_devices is None else num_devices
    if not 1 <= num_devices <= len(devices):
        raise InputError(
            f"{num_devices} devices asked for, but there are {len(devices)} ({devices[0].device_kind}).",
            field="devices",
            value=num_devices,
            remedy=f"Ask for 1 to {len(devices)}, or, on CPU, start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}.",
        )
    working = {device.process_index for device in devices[:num_devices]}
    idle = sorted({device.process_index for device in devices} - working)
    if idle:
        raise InputError(
            f"{num_devices} of the {len(devices)} devices asked for, which leaves {len(idle)} of the processes "
            f"without one (process {idle[0]} the first), and all have to take part.",
            field="devices",
            value=num_devices,
            remedy="Start fewer processes, or leave `devices` out.",
        )
    if fsdp < 1 or model < 1 or num_devices % (fsdp * model):
        raise InputError(
            f"`fsdp` is {fsdp} and `model_parallel` {model}: the {num_devices} devices do not divide by {fsdp} × "
            f"{model}.",
            field="fsdp",
            value=fsdp,
            remedy=f"Make each at least 1, and their product a divisor of {num_devices}.",
        )
    shape = (num_devices // (fsdp * model), fsdp, model)
    # Auto: on jax's default, Explicit axes, gathers and reshapes raise.
    return jax.make_mesh(shape, (*BATCH_AXES, "model"), axis_types=(AxisType.Auto,) * 3, devices=devices[:num_devices])


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into: data × fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Places arrays with their leading axis split over `data` and `fsdp`.

    Every process passes the same whole arrays, and keeps its devices' parts of them.

    Raises:
      InputError: if a leading axis does not divide by the number of parts.
    """
    parts = batch_parts(mesh)
    for path, leaf in jax.tree.leaves_with_path(tree):
        name, shape = jax.tree_util.keystr(path) or "the array", jax.numpy.shape(leaf)
        if not shape:
            raise InputError(
                f"{name} is a scalar and cannot be split over {parts} devices",
                field=name,
                value=leaf,
                remedy="replicate it instead.",
            )
        if shape[0] % parts:
            below = shape[0] - shape[0] % parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise InputError(
                f"{name} has a leading axis of {shape[0]}, which does not divide by the {parts} devices.",
                field=name,
                value=shape,
                remedy=f"Make it {nearest}, or use a number of devices that divides {shape[0]}.",
            )
    sharding = NamedSharding(mesh, BATCH)
    if not hosts.several():
        return jax.device_put(tree, sharding)

    def place(array: Any) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Places a copy of every array on each device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which each device has a copy."""
    return NamedSharding(mesh, PartitionSpec())
