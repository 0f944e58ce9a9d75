"""The time and memory of an experiment on devices that need not be here."""

import json
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ctrl_jax.commands.options import read_name
from ctrl_jax.config import Experiment
from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError
from ctrl_jax.planning import tables
from ctrl_jax.planning.expectation import Efficiency
from ctrl_jax.planning.phases import stages


@dataclass(frozen=True)
class Options:
    experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    devices: int = 1
    """How many; they need not be here."""
    device_kind: str = "cpu"
    """v4, v5e, v5p, v6e, A100, H100, H200; or cpu, which is this machine, measured now."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    json: bool = False
    """Print JSON for programs, and nothing else."""

    @property
    def on_cpu(self) -> bool:
        return self.device_kind.lower() == "cpu"


def main(arguments: list[str]) -> int:
    named, rest = read_name("plan", arguments)
    program = f"python -m ctrl_jax plan {named.name}"
    return run(tyro.cli(Options, default=Options(named.experiment), args=list(rest), prog=program, description=__doc__))


def run(options: Options) -> int:
    """Prints the tables, or JSON.

    Raises:
      InputError: on a kind of device without a row, and on batches that do not divide by the devices.
    """
    experiment, devices = options.experiment, options.devices
    if options.on_cpu and devices != 1:
        raise InputError(
            f"--devices is {devices} and --device-kind cpu, but the rates of cpu are measured of this whole machine: "
            "leave out --devices, or name the kind of device."
        )
    device = accelerators.named(options.device_kind)
    made = stages(experiment, devices, device_memory=device.own_memory)
    if options.json:
        print(json.dumps(tables.as_json(experiment, devices, options.efficiency, made, device), indent=2))
        return 0
    tables.show(experiment, devices, options.efficiency, made, device)
    return 0
