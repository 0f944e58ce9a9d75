"""How long phases take on a device, and what limits them.

A phase takes the longer of the time of its products, at a share of the device's matrix rate, and the time of its bytes,
at a share of the memory's bandwidth; phases follow one another.
"""

from dataclasses import dataclass

from ctrl_jax.devices.accelerators import Accelerator
from ctrl_jax.errors import InputError
from ctrl_jax.planning.phases import Phase


@dataclass(frozen=True)
class Efficiency:
    """What share of a data sheet's rates programs reach."""

    matmul: float = 0.5
    bandwidth: float = 0.8

    def __post_init__(self) -> None:
        for option, value in (("matmul", self.matmul), ("bandwidth", self.bandwidth)):
            if not 0 < value <= 1:
                raise InputError(
                    f"Efficiency.{option} is {value}",
                    field=f"efficiency.{option}",
                    value=value,
                    remedy="it is a share of the peak, above 0 and at most 1.",
                )


@dataclass(frozen=True)
class Expectation:
    """Seconds of some phases on a device, by what limits them."""

    compute: float
    bandwidth: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return self.compute + self.bandwidth + self.interconnect

    @property
    def limit(self) -> str:
        slowest = max(self.compute, self.bandwidth, self.interconnect)
        if slowest == self.compute:
            return "compute"
        return "memory bandwidth" if slowest == self.bandwidth else "interconnect"


def expect(phases: tuple[Phase, ...], device: Accelerator, dtype: str, efficiency: Efficiency) -> Expectation:
    """How long phases take, one after the other."""
    seconds = {"compute": 0.0, "bandwidth": 0.0, "interconnect": 0.0}
    for phase in phases:
        for part in phase.parts:
            computing = part.flops / (efficiency.matmul * device.flops(dtype))
            moving = part.moved / (efficiency.bandwidth * device.bandwidth)
            seconds["compute" if computing >= moving else "bandwidth"] += max(computing, moving)
        if phase.sent and device.interconnect is not None:
            seconds["interconnect"] += phase.sent / (efficiency.bandwidth * device.interconnect)
    return Expectation(**seconds)
