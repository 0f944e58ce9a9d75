"""What to change about an experiment whose stage does not fit in the memory."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ctrl_jax.config import Experiment
from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.planning.phases import peak, stages


class Remedy(NamedTuple):
    """What to change, and the bytes that are then held at most."""

    options: str
    held: float


Change = Callable[[Experiment, int], tuple[Experiment, int]]
"""Of an experiment and a number of devices."""


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
        tried = (Remedy(options, held(*change(experiment, devices))) for options, change in knob)
        alone += list(itertools.islice((remedy for remedy in tried if remedy.held <= capacity), 1))
    if alone:
        return alone
    chosen: list[str] = []
    for knob in knobs:
        before = experiment, devices
        for options, change in knob:
            changed = change(*before)
            if held(*changed) <= capacity:
                return [Remedy(" ".join([*chosen, options]), held(*changed))]
            if _divides(*changed):
                (experiment, devices), last = changed, options
        if (experiment, devices) != before:
            chosen.append(last)
    return []


def _knobs(experiment: Experiment, devices: int, sized_by: tuple[str, str] | None) -> list[list[tuple[str, Change]]]:
    """What could be changed: a list of options each, the mildest first."""

    def model(**changes: Any) -> Change:
        return lambda experiment, devices: (replace(experiment, model=replace(experiment.model, **changes)), devices)

    def batch(part: str, field: str, size: int) -> Change:
        def change(experiment: Experiment, devices: int) -> tuple[Experiment, int]:
            config = replace(getattr(experiment, part), **{field: size})
            return replace(experiment, **{part: config}), devices

        return change

    def more(devices: int) -> Change:
        return lambda experiment, _: (experiment, devices)

    sizes = experiment.model
    knobs: list[list[tuple[str, Change]]] = []
    if not sizes.rematerialize:
        knobs.append([("--model.rematerialize", model(rematerialize=True))])
    if sizes.dtype == "float32":
        knobs.append([("--model.dtype bfloat16", model(dtype="bfloat16"))])
    if sizes.lora.rank == 0 and sizes.path is not None:
        knobs.append([("--model.lora.rank 16", model(lora=replace(sizes.lora, rank=16)))])
    if sized_by is not None:
        part, field = sized_by
        size = getattr(getattr(experiment, part), field)
        option = f"--{part}.{field}".replace("_", "-")
        smaller = [size // 2**power for power in range(1, 16) if size % (devices * 2**power) == 0]
        if smaller:
            knobs.append([(f"{option} {size}", batch(part, field, size)) for size in smaller])
        knobs.append([(f"--devices {devices * 2**power}", more(devices * 2**power)) for power in range(1, 11)])
    return knobs


def _batch_of(experiment: Experiment, devices: int, stage: str, device_memory: float | None) -> tuple[str, str] | None:
    return next(one.batch for one in stages(experiment, devices, device_memory=device_memory) if one.name == stage)


def _divides(experiment: Experiment, devices: int) -> bool:
    try:
        check_batches_divide(experiment, devices)
    except InputError:
        return False
    return True
