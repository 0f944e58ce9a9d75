"""A plan as tables for people, or as JSON for programs."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

from ctrl_jax.config import Experiment
from ctrl_jax.devices.accelerators import Accelerator
from ctrl_jax.models import costs
from ctrl_jax.models.costs import Work
from ctrl_jax.pipeline import assembly, stored
from ctrl_jax.planning import memory
from ctrl_jax.planning.expectation import Efficiency, expect
from ctrl_jax.planning.phases import (
    Phase,
    Stage,
    model_flops,
    peak,
    policy_batch,
    policy_training,
    stages,
    update_batch,
)
from ctrl_jax.planning.remedies import remedies
from ctrl_jax.planning.sizes import sizes
from ctrl_jax.runtime.console import say, table

USABLE = 0.9
"""Of a device's memory: the rest is the runtime's, and lost between arrays."""


def as_json(
    experiment: Experiment, devices: int, efficiency: Efficiency, made: list[Stage], device: Accelerator
) -> dict[str, Any]:
    """The whole plan: FLOPs, bytes and seconds are one device's, of one step or batch."""
    found, dtype = sizes(experiment), experiment.model.dtype
    capacity = USABLE * device.memory

    def phase(one: Phase) -> dict[str, Any]:
        expected = expect((one,), device, dtype, efficiency)
        work = {"flops": one.work.flops, "bytes": one.work.moved, "sent": one.sent}
        return {**work, "seconds": expected.seconds, "limit": expected.limit}

    def stage(one: Stage) -> dict[str, Any]:
        seconds = expect(one.phases, device, dtype, efficiency).seconds
        return {
            "times": one.times,
            "seconds": seconds,
            "phases": {part.name: phase(part) for part in one.phases},
            "memory": one.programs,
            "fits": peak(one) <= capacity,
        }

    return {
        "experiment": experiment.name,
        "device": dataclasses.asdict(device),
        "devices": devices,
        "efficiency": dataclasses.asdict(efficiency),
        "parameters": costs.parameters(found.policy),
        "trained": found.trained,
        "capacity": capacity,
        "stages": {one.name: stage(one) for one in made},
        "stored_responses": _stored_bytes(experiment),
        "not_counted": not_counted(experiment),
        "remedies": {
            one.name: [
                remedy._asdict()
                for remedy in remedies(experiment, devices, capacity, one.name, device_memory=device.own_memory)
            ]
            for one in made
            if peak(one) > capacity
        },
    }


def show(experiment: Experiment, devices: int, efficiency: Efficiency, made: list[Stage], device: Accelerator) -> None:
    """Prints the plan: a step of the policy's training, its memory, every stage, and whether all of it fits."""
    capacity = USABLE * device.memory
    _show_step(experiment, devices, efficiency, policy_training(made), device)
    _show_memory(policy_training(made), capacity)
    say(_activations(experiment, devices, device.own_memory))
    _show_stages(experiment, efficiency, made, device)
    _show_fit(experiment, devices, made, capacity, device.own_memory)
    if kept := _stored_bytes(experiment):
        each, every = (quantity(size, "B") for size in (kept["bytes_per_prompt"], kept["bytes"]))
        say(f"Calibration keeps its responses on disk: {each} a prompt, {every} in all.")
    say(
        f"Assumed: {efficiency.matmul:g} of the peak of products and {efficiency.bandwidth:g} of the bandwidths "
        "(`efficiency.matmul`, `efficiency.bandwidth`); every response at its full length and every prompt padded; "
        "attention scores written to memory; parameters, gradients and moments whole on every device, batches split "
        f"over them; {USABLE:.0%} of the memory usable. Compilation, the host's work and checkpoints come on top."
    )
    for sentence in not_counted(experiment):
        say(sentence)


def not_counted(experiment: Experiment) -> list[str]:
    """What a plan has not in it, in sentences."""
    found, combine, judge = sizes(experiment), experiment.combine, experiment.evaluation.judge
    sentences = []
    if found.reward is None:
        sentences.append(
            f"The reward {experiment.reward_model.function} is a function of the host, and not in these tables."
        )
    if combine.rewards:
        sentences.append(f"What {', '.join(combine.rewards)} take is not in these tables.")
    if judge is not None and found.judge is None:
        sentences.append(f"The judge {judge} is a function of the host, and not in these tables.")
    return sentences


def _stored_bytes(experiment: Experiment) -> dict[str, int]:
    """Of the reference's stored responses; empty where they are not kept."""
    if not experiment.calibration.keep_responses:
        return {}
    each = stored.bytes_per_prompt(experiment, sizes(experiment).policy.vocabulary_size)
    return {"bytes_per_prompt": each, "bytes": experiment.calibration.prompts * each}


def _show_step(
    experiment: Experiment, devices: int, efficiency: Efficiency, training: Stage, device: Accelerator
) -> None:
    config, data, found, dtype = experiment.policy, experiment.data, sizes(experiment), experiment.model.dtype
    say(
        f"{experiment.name}: {quantity(costs.parameters(found.policy))} parameters, {quantity(found.trained)} trained, "
        f"{dtype}; {devices} × {device.kind}, each {quantity(device.flops(dtype), 'FLOP/s')}, "
        f"{quantity(device.bandwidth, 'B/s')} and {quantity(device.memory, 'B')}"
        f"{', measured just now' if device.kind == 'cpu' else ' by its data sheet'}."
    )
    epochs, minibatches = assembly.updates(config)
    samples, count = policy_batch(experiment, 1).samples, epochs * minibatches
    several = f", for {count} updates by {config.prompts_per_step // minibatches} prompts each" if count > 1 else ""
    say(
        f"A step reads {config.prompts_per_step} prompts of {data.prompt_length} tokens, with {samples} responses of "
        f"{data.response_length} each, split over the devices{several}. What follows is one device's."
    )

    def row(name: str, phases: tuple[Phase, ...]) -> list[object]:
        expected, work = expect(phases, device, dtype, efficiency), sum((phase.work for phase in phases), Work())
        return [name, quantity(work.flops), quantity(work.moved, "B"), _seconds(expected.seconds), expected.limit]

    table(
        "A step of the policy's training",
        ["phase", "FLOPs", "moved", "expected", "limited by"],
        [*(row(phase.name, (phase,)) for phase in training.phases), row("the whole step", training.phases)],
    )
    seconds = expect(training.phases, device, dtype, efficiency).seconds
    tokens = config.prompts_per_step * samples * data.response_length
    used = model_flops(training) / (seconds * device.flops(dtype))
    which = "new tokens" if assembly.is_on_policy(config) else "tokens of responses"
    say(f"{quantity(tokens / seconds)} {which}/s on all devices; model-FLOPs utilisation {used:.0%}.")


def _show_memory(training: Stage, capacity: float) -> None:
    parts = list(dict.fromkeys(part for held in training.programs.values() for part in held))
    rows = [[part, *(_bytes(held.get(part)) for held in training.programs.values())] for part in parts]
    sums = [sum(held.values()) for held in training.programs.values()]
    rows.append(["all", *(_bytes(size) for size in sums)])
    rows.append([f"of {quantity(capacity, 'B')}", *(f"{size / capacity:.0%}" for size in sums)])
    table("Memory in that step, by program", ["what it holds", *training.programs], rows)


def _show_stages(experiment: Experiment, efficiency: Efficiency, made: list[Stage], device: Accelerator) -> None:
    rows: list[list[object]] = []
    for stage in made:
        expected = expect(stage.phases, device, experiment.model.dtype, efficiency)
        flops = stage.times * sum(phase.work.flops for phase in stage.phases)
        limit = expected.limit if peak(stage) <= USABLE * device.memory else "does not fit"
        seconds = _seconds(stage.times * expected.seconds)
        rows.append([stage.name, stage.times, quantity(flops), quantity(peak(stage), "B"), seconds, limit])
    table("Every stage", ["stage", "steps or batches", "FLOPs", "most memory", "expected", "limited by"], rows)


def _activations(experiment: Experiment, devices: int, device_memory: float | None) -> str:
    found, batch = sizes(experiment, device_memory), update_batch(experiment, devices)

    def kept(rematerialize: bool) -> str:
        changed = replace(experiment, model=replace(experiment.model, rematerialize=rematerialize))
        update = policy_training(stages(changed, devices, device_memory=device_memory)).programs["update"]
        slices = memory.micro_batches(experiment.policy.micro_batches, found, batch, rematerialize)
        return f"{quantity(update['activations'], 'B')} in {slices} micro-batch{'' if slices == 1 else 'es'}"

    now = "on" if experiment.model.rematerialize else "off"
    return f"Activations of the update: {kept(True)} with `model.rematerialize`, {kept(False)} without; it is {now}."


def _show_fit(
    experiment: Experiment, devices: int, made: list[Stage], capacity: float, device_memory: float | None
) -> None:
    too_large = [stage for stage in made if peak(stage) > capacity]
    if not too_large:
        fullest = max(made, key=peak)
        say(f"It fits: {quantity(peak(fullest), 'B')} of {quantity(capacity, 'B')} at most, in {fullest.name}.")
    for stage in too_large:
        say(f"{stage.name} does not fit: {quantity(peak(stage), 'B')} of {quantity(capacity, 'B')}.", style="red")
        found = remedies(experiment, devices, capacity, stage.name, device_memory=device_memory)
        for remedy in found:
            options = " ".join(f"`{field}={value}`" for field, value in remedy.options.items())
            say(f"    {options} brings it to {quantity(remedy.held, 'B')}")
        if not found:
            say(
                "    No option that is counted here brings it in. Split the parameters over the devices, `fsdp` and "
                "`model_parallel` (docs/devices.md), or take a smaller model."
            )


def quantity(value: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix."""
    power = 0 if value < 1 else min(6, int(math.log10(value)) // 3)
    scaled = value / 1000**power
    # 999.9 rounds to 1000, which has the next prefix.
    if float(f"{scaled:.3g}") >= 1000 and power < 6:
        power, scaled = power + 1, scaled / 1000
    digits = f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"
    prefix = ("", "k", "M", "G", "T", "P", "E")[power]
    return f"{digits} {prefix}{unit}".rstrip() if prefix or unit else digits


def _bytes(size: float | None) -> str:
    return "" if size is None else quantity(size, "B")


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"
