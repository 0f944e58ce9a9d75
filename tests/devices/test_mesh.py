import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ctrl_jax.devices import mesh
from ctrl_jax.errors import InputError


def test_the_mesh_has_three_auto_axes_over_the_devices_asked_for():
    two = mesh.make_mesh(2)
    assert dict(two.shape) == {"data": 2, "fsdp": 1, "model": 1} and two.axis_types == (AxisType.Auto,) * 3
    assert list(two.devices.flat) == jax.devices()[:2]
    assert mesh.make_mesh().size == jax.device_count()


def test_data_is_what_fsdp_and_model_leave_and_batches_are_split_over_data_and_fsdp():
    eight = mesh.make_mesh(8, fsdp=2, model=2)
    assert dict(eight.shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert mesh.batch_parts(eight) == 4
    rows = mesh.shard(eight, np.arange(4))
    # Devices that share the work on a part are neighbours.
    assert [int(shard.data[0]) for shard in rows.addressable_shards] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("fsdp", "model"), [(3, 1), (1, 16), (4, 4), (0, 1), (1, -1)])
def test_axes_that_do_not_divide_the_devices_are_refused(fsdp, model):
    with pytest.raises(InputError, match=rf"`fsdp` is {fsdp} and `model_parallel` {model}: the 8 devices") as error:
        mesh.make_mesh(8, fsdp=fsdp, model=model)
    assert "a divisor of 8" in str(error.value)


@pytest.mark.parametrize("number", [0, -1, 1000])
def test_a_number_of_devices_that_is_not_there_is_refused(number):
    with pytest.raises(InputError, match=rf"{number} devices asked for, but there are {jax.device_count()}"):
        mesh.make_mesh(number)


def test_devices_that_leave_a_process_without_one_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=i // 2) for i in range(8)])
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **options: options["devices"])
    assert len(mesh.make_mesh()) == 8 and len(mesh.make_mesh(7)) == 7
    with pytest.raises(
        InputError, match=r"^4 of the 8 devices.* 2 of the processes .*process 2 the first.*`devices` out"
    ):
        mesh.make_mesh(4)


def test_shard_splits_the_leading_axis_and_replicate_copies():
    four = mesh.make_mesh(4)
    value = {"a": np.arange(24).reshape(8, 3), "b": np.arange(4)}
    sharded, copied = mesh.shard(four, value), mesh.replicate(four, value)
    for index, shard in enumerate(sharded["a"].addressable_shards):
        np.testing.assert_array_equal(shard.data, value["a"][2 * index : 2 * index + 2])
    assert [shard.data.shape for shard in sharded["b"].addressable_shards] == [(1,)] * 4
    for shard in copied["a"].addressable_shards:
        np.testing.assert_array_equal(shard.data, value["a"])
    assert len(copied["a"].addressable_shards) == 4


def test_typed_keys_and_scalars_are_replicated():
    key = mesh.replicate(mesh.make_mesh(4), {"key": jax.random.key(3), "step": np.int32(7)})
    np.testing.assert_array_equal(jax.random.key_data(key["key"]), jax.random.key_data(jax.random.key(3)))
    assert key["step"] == 7


@pytest.mark.parametrize(("size", "nearest"), [(10, "8 or 12"), (3, "4")])
def test_an_axis_that_does_not_divide_is_refused_with_both_numbers_and_the_fix(size, nearest):
    with pytest.raises(InputError) as error:
        mesh.shard(mesh.make_mesh(4), {"tokens": np.zeros((size, 2))})
    message = str(error.value)
    assert "tokens" in message and f"axis of {size}" in message and "4 devices" in message
    assert f"Make it {nearest}," in message


def test_a_scalar_cannot_be_sharded():
    with pytest.raises(InputError, match="replicate"):
        mesh.shard(mesh.make_mesh(2), np.float32(1))


PRINT_DEVICES = """
import jax
from ctrl_jax.devices import mesh
mesh.divide_cpu(3)
print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, "3"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "2"),
        ({"JAX_NUM_CPU_DEVICES": "5"}, "5"),
    ],
)
def test_the_cpu_is_divided_unless_the_environment_says_how(environment, devices):
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", PRINT_DEVICES]
    ended = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [devices]
