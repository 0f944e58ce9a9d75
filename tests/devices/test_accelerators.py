from types import SimpleNamespace

import jax
import pytest

from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError


@pytest.mark.parametrize("kind", accelerators.KINDS)
def test_a_kind_is_found_in_any_case(kind):
    assert accelerators.named(kind.upper()) is accelerators.named(kind.lower()) is accelerators.KINDS[kind]


def test_an_unknown_kind_is_told_those_there_are():
    with pytest.raises(InputError) as error:
        accelerators.named("v9")
    assert "'v9'" in str(error.value)
    assert all(kind in str(error.value) for kind in [*accelerators.KINDS, "cpu"])


@pytest.mark.parametrize(
    ("platform", "device_kind", "memory"),
    [("tpu", "TPU v5p", 95e9), ("gpu", "NVIDIA H200", 141e9), ("gpu", "another", 16e9), ("cpu", "cpu", None)],
)
def test_what_a_device_holds_by_itself(platform, device_kind, memory):
    assert accelerators.memory(SimpleNamespace(platform=platform, device_kind=device_kind)) == memory


def test_a_cpu_has_no_memory_of_its_own():
    assert accelerators.named("cpu").own_memory is None


@pytest.mark.parametrize(
    ("device_kind", "kind"),
    [("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", None)],
)
def test_a_device_is_known_by_jaxs_name(device_kind, kind):
    found = accelerators.of_device(SimpleNamespace(platform="gpu", device_kind=device_kind))
    assert found == (None if kind is None else accelerators.KINDS[kind])


@pytest.mark.parametrize("found", accelerators.KINDS.values(), ids=lambda found: found.kind)
def test_units(found):
    # A slip of a factor of a thousand, or of bits for bytes, would leave these bounds.
    assert 1e14 <= found.float32 <= found.bfloat16 <= 1e15
    assert 16e9 <= found.memory <= 141e9
    # Products that read their operands from memory once are compute-bound above some hundred FLOPs a byte.
    assert 100 <= found.bfloat16 / found.bandwidth <= 600
    assert found.bandwidth / 16 <= found.interconnect < found.bandwidth / 2
    assert (found.flops("bfloat16"), found.flops("float32")) == (found.bfloat16, found.float32)


def test_this_machine_is_measured():
    found = accelerators.of_device(jax.devices("cpu")[0])
    assert found.kind == "cpu"
    assert 1e8 < found.float32 == found.bfloat16 < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert found.memory > 2**30
    assert found.interconnect is None
