"""Devices and where arrays live on them.

This is where a user of `jax.pmap` should look. Since jax 0.10 `pmap` *is* `jit(shard_map)`, and its documentation sends
new code to `jax.shard_map`: the steps are mapped over the axis `data` of this mesh by `shard_map` inside `jit`
(build.py), and arrays are placed by `shard` and `replicate`, where pmap had a leading device axis.
"""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctrl_jax.errors import InputError

Tree = TypeVar("Tree")


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of `num_devices` (by default all, of all processes) along the axis `data`.

    Raises:
      InputError: if there are fewer devices.
    """
    devices = jax.devices()
    num_devices = len(devices) if num_devices is None else num_devices
    if not 1 <= num_devices <= len(devices):
        raise InputError(
            f"{num_devices} devices asked for, but there are {len(devices)} ({devices[0].device_kind}). Ask for 1 to "
            f"{len(devices)}, or, on CPU, start with XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}."
        )
    # Auto: on jax's default, Explicit axes, gathers and reshapes raise.
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:num_devices])


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Places arrays with their leading axis split over `data`. Every process passes the same whole arrays.

    Raises:
      InputError: if a leading axis does not divide by the number of devices.
    """
    num_devices = mesh.shape["data"]
    for path, leaf in jax.tree.leaves_with_path(tree):
        name, shape = jax.tree_util.keystr(path) or "the array", jax.numpy.shape(leaf)
        if not shape:
            raise InputError(
                f"{name} is a scalar and cannot be split over {num_devices} devices; replicate it instead."
            )
        if shape[0] % num_devices:
            below = shape[0] - shape[0] % num_devices
            nearest = f"{below} or {below + num_devices}" if below else f"{num_devices}"
            raise InputError(
                f"{name} has a leading axis of {shape[0]}, which does not divide by the {num_devices} devices. Make it "
                f"{nearest}, or use a number of devices that divides {shape[0]}."
            )
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Places a copy of every array on each device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Where an array lies of which each device has a copy."""
    return NamedSharding(mesh, PartitionSpec())
