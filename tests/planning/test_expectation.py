from dataclasses import replace

import pytest

from ctrl_jax.commands import plan
from ctrl_jax.config import Model, Supervised
from ctrl_jax.devices.accelerators import Accelerator
from ctrl_jax.errors import InputError
from ctrl_jax.models.costs import Work
from ctrl_jax.planning import expectation, phases
from tests.planning.models import SMALL

# A round device: 1 FLOP and 1 byte a microsecond.
DEVICE = Accelerator("round", 1e6, 1e6, 1e6, 1e6, 1e3)
FULL = expectation.Efficiency(1.0, 1.0)


def test_a_part_takes_the_longer_of_its_two_times():
    made = (phases.Phase("a", (Work(3e6, 1e6), Work(1e6, 5e6))), phases.Phase("b", (Work(0, 0),), sent=2e3))
    expected = expectation.expect(made, DEVICE, "float32", FULL)
    assert (expected.compute, expected.bandwidth, expected.interconnect) == (3, 5, 2)
    assert (expected.seconds, expected.limit) == (10, "memory bandwidth")
    assert expectation.expect(made[:1], DEVICE, "float32", expectation.Efficiency(0.5, 1.0)).compute == 6
    assert expectation.expect(made[1:], DEVICE, "float32", FULL).limit == "interconnect"


def test_bad_efficiency_and_missing_model():
    with pytest.raises(InputError, match=r"Efficiency\.matmul is 2; it is") as refused:
        expectation.Efficiency(matmul=2)
    assert (refused.value.field, refused.value.value) == ("efficiency.matmul", 2)
    missing = replace(SMALL, model=Model(path="nowhere"), sft=Supervised(steps=0))
    with pytest.raises(InputError, match=r"nowhere.config\.json is missing"):
        plan.run(plan.Options(missing, device_kind="v5e"))
