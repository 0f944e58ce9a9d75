"""What to change about an experiment whose stage does not fit in the memory."""

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

from ctrl_jax.config import Experiment
from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.planning.phases import peak, stages


class Remedy(NamedTuple):
    """What to change, and the bytes that are then held at most."""

    options: dict[str, Any]
    """A value for each field of the experiment, or for `devices`."""
    held: float


Option = tuple[str, Any]
"""A field of the experiment, or `devices`, and a value for it."""


def remedies(
    experiment: Experiment,
    devices: int,
    capacity: float,
    stage: str,
    *,
    device_memory: float | None = accelerators.SMALLEST,
) -> list[Remedy]:
    """Changes of which each makes a stage fit in the memory; where none does, the mildest of all together, if any."""

    def held(experiment: Experiment, devices: int) -> float:
        if not _divides(experiment, devices):
            return math.inf
        made = stages(experiment, devices, device_memory=device_memory)
        return next(peak(one) for one in made if one.name == stage)

    knobs = _knobs(experiment, devices, _batch_of(experiment, devices, stage, device_memory))
    alone = []
    for knob in knobs:
        tried = (Remedy(dict([option]), held(*_changed(experiment, devices, option))) for option in knob)
        alone += list(itertools.islice((remedy for remedy in tried if remedy.held <= capacity), 1))
    if alone:
        return alone
    chosen: list[Option] = []
    for knob in knobs:
        before = experiment, devices
        for option in knob:
            changed = _changed(*before, option)
            if held(*changed) <= capacity:
                return [Remedy(dict([*chosen, option]), held(*changed))]
            if _divides(*changed):
                (experiment, devices), last = changed, option
        if (experiment, devices) != before:
            chosen.append(last)
    return []


def _knobs(experiment: Experiment, devices: int, sized_by: tuple[str, str] | None) -> list[list[Option]]:
    """What could be changed: a list of options each, the mildest first."""
    model = experiment.model
    knobs: list[list[Option]] = []
    if not model.rematerialize:
        knobs.append([("model.rematerialize", True)])
    if model.dtype == "float32":
        knobs.append([("model.dtype", "bfloat16")])
    if model.lora.rank == 0 and model.path is not None:
        knobs.append([("model.lora.rank", 16)])
    if sized_by is not None:
        section, field = sized_by
        size = getattr(getattr(experiment, section), field)
        parts = devices * (assembly.updates(experiment.policy)[1] if section == "policy" else 1)
        smaller = [size // 2**power for power in range(1, 16) if size % (parts * 2**power) == 0]
        if smaller:
            knobs.append([(f"{section}.{field}", size) for size in smaller])
        knobs.append([("devices", devices * 2**power) for power in range(1, 11)])
    return knobs


def _changed(experiment: Experiment, devices: int, option: Option) -> tuple[Experiment, int]:
    """The experiment and the devices with another value of an option."""
    name, value = option
    return (experiment, value) if name == "devices" else (_with(experiment, name.split("."), value), devices)


def _with(config: Any, path: list[str], value: Any) -> Any:
    """A configuration with another value of one field, named by its path."""
    first, *rest = path
    return replace(config, **{first: _with(getattr(config, first), rest, value) if rest else value})


def _batch_of(experiment: Experiment, devices: int, stage: str, device_memory: float | None) -> tuple[str, str] | None:
    return next(one.batch for one in stages(experiment, devices, device_memory=device_memory) if one.name == stage)


def _divides(experiment: Experiment, devices: int) -> bool:
    try:
        check_batches_divide(experiment, devices)
    except InputError:
        return False
    return True
