"""What an experiment would cost on devices that need not be here: work, memory and time by phase, and what limits it.

Everything follows from shapes. Parameters, gradients and moments are replicated, and batches are split over the devices
(the axis `data` of the mesh), as the steps do it. A phase takes the longer of what its products take at a share of the
device's matrix rate and what its bytes take at a share of the memory's bandwidth; phases follow one another.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ctrl_jax.config import VOCABULARY, Experiment, Lora, Supervised
from ctrl_jax.devices import accelerators
from ctrl_jax.devices.accelerators import Accelerator
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs, huggingface
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.costs import Batch, Work
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.directories import pretrained_architecture
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.pipeline.rollouts import prompts_at_a_time
from ctrl_jax.runtime.console import say, table
from ctrl_jax.steps import sampling

USABLE = 0.9
"""Of a device's memory: the rest is the runtime's, and lost between arrays."""

SUPERVISED_MOMENTS, POLICY_MOMENTS = 2, 1
"""Copies of what is trained that the optimisers keep: AdamW's two, and RMSProp's one."""

Memory = dict[str, float]
"""Bytes of one device, by what they hold."""


@dataclass(frozen=True)
class Efficiency:
    """What share of a data sheet's rates programs reach."""

    matmul: float = 0.5
    bandwidth: float = 0.8

    def __post_init__(self) -> None:
        for option, value in (("matmul", self.matmul), ("bandwidth", self.bandwidth)):
            if not 0 < value <= 1:
                raise InputError(f"--efficiency.{option} is {value}; it is a share of the peak, above 0 and at most 1.")


@dataclass(frozen=True)
class Options:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    devices: int = 1
    """How many; they need not be here."""
    device_kind: str = "cpu"
    """v4, v5e, v5p, v6e, A100, H100, H200; or cpu, which is this machine, measured now."""
    efficiency: Efficiency = Efficiency()
    json: bool = False
    """Print JSON for programs, and nothing else."""

    @property
    def on_cpu(self) -> bool:
        return self.device_kind.lower() == "cpu"


class Phase(NamedTuple):
    """A part of a step, on one device."""

    name: str
    parts: tuple[Work, ...]
    """Each is limited by one thing."""
    sent: float = 0.0
    """Bytes sent to other devices."""
    repeats: bool = False
    """Whether it computes again what was not kept, which is not counted in the model's FLOPs."""

    @property
    def work(self) -> Work:
        return sum(self.parts, Work())


class Stage(NamedTuple):
    name: str
    times: int
    """Steps, or batches of responses."""
    phases: tuple[Phase, ...]
    programs: dict[str, Memory]
    """What is held while each of its programs runs; sampling's in its two halves."""


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


@dataclass(frozen=True)
class Sizes:
    """The networks of an experiment."""

    policy: Architecture
    lora: Lora
    reward: Architecture | None
    """None where a function of the host scores."""
    reward_lora: Lora
    reward_bytes: float
    """What it adds to a device; a trunk that is the reference itself adds nothing."""
    device_memory: float | None
    """`Accelerator.own_memory`, which slices and chunks are sized by."""

    @property
    def trained(self) -> int:
        """Parameters that are trained in the policy."""
        return costs.adapter_parameters(self.policy, self.lora) or costs.parameters(self.policy)


def sizes(experiment: Experiment, device_memory: float | None = accelerators.SMALLEST) -> Sizes:
    """What an experiment's networks compute, by its configuration and a directory's config.json.

    A model from scratch is taken to have as many pieces as its tokenizer is asked for.
    """
    model, reward = experiment.model, experiment.reward_model
    if model.path is None:
        policy = model.architecture(experiment.data.vocabulary_size or VOCABULARY)
    else:
        policy = pretrained_architecture(experiment)
    if reward.function is not None:
        return Sizes(policy, model.lora, None, Lora(), 0, device_memory)
    if reward.path is not None:
        classifier = huggingface.architecture(Path(reward.path), dtype=model.dtype)
        held = costs.itemsize(classifier) * costs.parameters(classifier)
        return Sizes(policy, model.lora, classifier, Lora(), held, device_memory)
    trained = costs.adapter_parameters(policy, model.lora) or costs.parameters(policy)
    return Sizes(policy, model.lora, policy, model.lora, costs.FLOAT32 * trained, device_memory)


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


def stages(experiment: Experiment, devices: int, *, device_memory: float | None = accelerators.SMALLEST) -> list[Stage]:
    """Everything that `train` does with networks, the policy's steps among it (`policy training`), for one device.

    Raises:
      InputError: if a batch does not divide by the devices.
    """
    if devices < 1:
        raise InputError(f"--devices is {devices}; ask for at least 1.")
    check_batches_divide(experiment, devices)
    found = sizes(experiment, device_memory)
    made = [_policy(experiment, found, devices)]
    if experiment.reward_model.trained:
        made.insert(0, _supervised("reward model", experiment, found, experiment.reward_model, devices))
    if experiment.sft.steps:
        made.insert(0, _supervised("reference policy (sft)", experiment, found, experiment.sft, devices))
    calibration, evaluation = experiment.calibration, experiment.evaluation
    made.insert(
        -1, _responses("calibration", experiment, found, calibration.prompts, calibration.samples_per_prompt, devices)
    )
    for name in ("reference evaluation", "policy evaluation"):
        made.append(_responses(name, experiment, found, evaluation.prompts, evaluation.responses_per_prompt, devices))
    return made


def policy_training(made: list[Stage]) -> Stage:
    return next(stage for stage in made if stage.name == "policy training")


def _held(found: Sizes) -> Memory:
    """What lives on each device from the start of the policy's training to its end."""
    held = {
        "reference": float(costs.itemsize(found.policy) * costs.parameters(found.policy)),
        "policy, float32": float(costs.FLOAT32 * found.trained),
        "moments": float(POLICY_MOMENTS * costs.FLOAT32 * found.trained),
    }
    return held if found.reward is None else {**held, "reward model": float(found.reward_bytes)}


def _cast(found: Sizes) -> Memory:
    """Weights that are trained are float32, and computed with in the model's own type."""
    if found.lora.rank or costs.itemsize(found.policy) == costs.FLOAT32:
        return {}
    return {"weights as bfloat16": float(costs.itemsize(found.policy) * costs.parameters(found.policy))}


def _chunk(found: Sizes, tokens: int) -> int:
    return min(tokens, costs.chunk_size(found.policy.vocabulary_size, found.device_memory))


def _sampling(found: Sizes, batch: Batch) -> tuple[tuple[Phase, ...], dict[str, Memory]]:
    policy, lora = found.policy, found.lora
    phases = (
        Phase("sampling: prompts", (costs.prefill(policy, lora, batch),)),
        Phase("sampling: responses", (costs.decode(policy, lora, batch),)),
    )
    caches = costs.prompt_cache(policy, batch) + costs.response_cache(policy, batch)
    rows = sampling.rows_left(batch.prompts, batch.samples, batch.prompt_length, batch.response_length)
    tail = replace(batch, prompts=rows, samples=1)
    copied = costs.prompt_cache(policy, tail) + costs.response_cache(policy, tail)
    # Each sixteenth of the rows that goes on alone again adds its copies: 1 + 1/4 + 1/16 + ... of the first ones.
    decoding = {
        "caches": caches + 4 / 3 * copied,
        "logits": float(costs.logits(policy, batch.responses, copies=costs.DRAWN_COPIES)),
        **_cast(found),
    }
    reading = {
        "caches": float(costs.response_cache(policy, batch)),
        "activations": costs.working_set(policy, batch, length=0),
        **_cast(found),
    }
    return phases, {"prefill": reading, "decoding": decoding}


def _scoring(found: Sizes, batch: Batch) -> tuple[tuple[Phase, ...], Memory]:
    if found.reward is None:
        return (), {}
    length = batch.response_length
    work = costs.forward(found.reward, found.reward_lora, batch, length=length)
    return (Phase("reward scores", (work,)),), {"activations": costs.working_set(found.reward, batch, length=length)}


def _log_probs(found: Sizes, batch: Batch) -> tuple[Work, Work]:
    """(layers, vocabulary) of one network on the responses: their first token is predicted by the prompt."""
    tokens = batch.responses * batch.response_length
    chunks = -(-tokens // _chunk(found, tokens))
    layers = costs.forward(found.policy, found.lora, batch, length=batch.response_length - 1)
    return layers, costs.unembed(found.policy, tokens, chunks=chunks)


def _update(found: Sizes, batch: Batch, rematerialize: bool, devices: int) -> tuple[Phase, ...]:
    """Reference and policy on the responses, the gradient, and the optimiser."""
    policy, length = found.policy, batch.response_length - 1
    layers, vocabulary = _log_probs(found, batch)
    reference = (costs.forward(policy, Lora(), batch, length=length), vocabulary)
    return (
        Phase("reference log-probs", reference),
        Phase("policy log-probs", (layers, vocabulary)),
        # Both networks' logits are made again a chunk at a time.
        Phase("recomputation", (vocabulary, vocabulary, *((layers,) if rematerialize else ())), repeats=True),
        *_backward(found, batch, vocabulary, length, devices, POLICY_MOMENTS),
    )


def _backward(
    found: Sizes, batch: Batch, vocabulary: Work, length: int, devices: int, moments: int
) -> tuple[Phase, Phase]:
    lora = found.lora
    layers = costs.backward(found.policy, lora, batch, length=length)
    # A ring: every device sends each byte of the gradient twice, but for its own share.
    sent = 2 * (devices - 1) / devices * costs.FLOAT32 * found.trained
    return (
        Phase("backward", (layers, vocabulary * (1 if lora.rank else 2))),
        Phase("optimiser", (costs.optimizer(found.trained, moments=moments),), sent),
    )


def _slices(given: int | None, found: Sizes, batch: Batch, rematerialize: bool) -> int:
    """The micro-batches of a device's prompts."""
    memory = found.device_memory
    return given or costs.default_micro_batches(found.policy, batch, rematerialize=rematerialize, memory=memory)


def _update_memory(
    found: Sizes, batch: Batch, slices: int, rematerialize: bool, *, length: int, networks: int
) -> Memory:
    """`networks` of which there are logits: policy and reference, or one, or none."""
    part = replace(batch, prompts=batch.prompts // slices)
    policy, tokens = found.policy, part.responses * part.response_length
    kept = costs.kept_activations(policy, part, length=length, rematerialize=rematerialize)
    # Of several slices the sum of their gradients is held too.
    copies = 2 if slices == 1 else 3
    memory = {
        "gradients and updates": float(copies * costs.FLOAT32 * found.trained),
        "activations": kept + networks * costs.itemsize(policy) * policy.width * tokens,
        **_cast(found),
    }
    if networks:
        memory["logits"] = float(costs.logits(policy, _chunk(found, tokens), copies=costs.LOSS_COPIES))
    return memory


def _policy_batch(experiment: Experiment, devices: int) -> Batch:
    policy, data = experiment.policy, experiment.data
    prompts = policy.prompts_per_step // devices
    return Batch(prompts, policy.samples_per_prompt, data.prompt_length, data.response_length)


def _policy(experiment: Experiment, found: Sizes, devices: int) -> Stage:
    config, batch = experiment.policy, _policy_batch(experiment, devices)
    drawing, caches = _sampling(found, batch)
    scoring, read = _scoring(found, batch)
    rematerialize = experiment.model.rematerialize
    update = _update(found, batch, rematerialize, devices)
    slices = _slices(config.micro_batches, found, batch, rematerialize)
    activations = _update_memory(found, batch, slices, rematerialize, length=batch.response_length - 1, networks=2)
    held = _held(found)
    needed = {**caches, "scoring": read, "update": activations}
    programs = {name: {**held, **memory} for name, memory in needed.items()}
    return Stage("policy training", config.steps, (*drawing, *scoring, *update), programs)


def _supervised(name: str, experiment: Experiment, found: Sizes, config: Supervised, devices: int) -> Stage:
    """Fine-tuning on demonstrations, or on pairs of responses: those have no logits."""
    data, lora = experiment.data, found.lora
    pairs = name == "reward model"
    prompts = config.batch_size // devices
    batch = Batch(prompts, 2 if pairs else 1, data.prompt_length, data.response_length)
    length = batch.response_length if pairs else batch.response_length - 1
    layers = costs.forward(found.policy, lora, batch, length=length)
    vocabulary = Work() if pairs else _log_probs(found, batch)[1]
    repeated = (*(() if pairs else (vocabulary,)), *((layers,) if experiment.model.rematerialize else ()))
    phases = (
        Phase("forward", (layers, vocabulary)),
        *((Phase("recomputation", repeated, repeats=True),) if repeated else ()),
        *_backward(found, batch, vocabulary, length, devices, SUPERVISED_MOMENTS),
    )
    # What the training starts from lives on beside what is trained.
    held = {what: size for what, size in _held(found).items() if what != "reward model"}
    held["trained, float32"] = held.pop("policy, float32")
    held["moments"] *= SUPERVISED_MOMENTS / POLICY_MOMENTS
    rematerialize = experiment.model.rematerialize
    slices = _slices(config.micro_batches, found, batch, rematerialize)
    memory = _update_memory(found, batch, slices, rematerialize, length=length, networks=0 if pairs else 1)
    return Stage(name, config.steps, phases, {"update": {**held, **memory}})


def _responses(name: str, experiment: Experiment, found: Sizes, prompts: int, samples: int, devices: int) -> Stage:
    """Responses and their scores, in the batches of `rollouts.in_batches`; a policy's with their KL too."""
    data, policy = experiment.data, found.policy
    share = -(-prompts // devices)
    size = min(prompts_at_a_time(policy, data, samples), share)
    batch = Batch(size, samples, data.prompt_length, data.response_length)
    drawing, caches = _sampling(found, batch)
    scoring, read = _scoring(found, batch)
    held = _held(found)
    if name != "policy evaluation":
        held = {what: held[what] for what in ("reference", "reward model") if what in held}
    phases = (*drawing, *scoring)
    programs = {name: {**held, **memory} for name, memory in {**caches, "scoring": read}.items()}
    if name == "policy evaluation":
        layers, vocabulary = _log_probs(found, batch)
        phases = (*phases, Phase("exact KL", (layers, vocabulary, layers, vocabulary)))
    return Stage(name, -(-share // size), phases, programs)


def peak(stage: Stage) -> float:
    """Bytes: the most that one of its programs holds."""
    return max(sum(memory.values()) for memory in stage.programs.values())


def model_flops(stage: Stage) -> float:
    """FLOPs of one step on one device, without what is computed twice to save memory."""
    return sum(phase.work.flops for phase in stage.phases if not phase.repeats)


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

    knobs = _knobs(experiment, devices, stage)
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


def _knobs(experiment: Experiment, devices: int, stage: str) -> list[list[tuple[str, Change]]]:
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
    batches = {
        "policy training": ("policy", "prompts_per_step"),
        "reference policy (sft)": ("sft", "batch_size"),
        "reward model": ("reward_model", "batch_size"),
    }
    if stage in batches:
        part, field = batches[stage]
        size = getattr(getattr(experiment, part), field)
        option = f"--{part}.{field}".replace("_", "-")
        smaller = [size // 2**power for power in range(1, 16) if size % (devices * 2**power) == 0]
        if smaller:
            knobs.append([(f"{option} {size}", batch(part, field, size)) for size in smaller])
        knobs.append([(f"--devices {devices * 2**power}", more(devices * 2**power)) for power in range(1, 11)])
    return knobs


def _divides(experiment: Experiment, devices: int) -> bool:
    try:
        check_batches_divide(experiment, devices)
    except InputError:
        return False
    return True


def main(name: str, experiment: Experiment, arguments: list[str]) -> int:
    program = f"python -m ctrl_jax plan {name}"
    return run(tyro.cli(Options, default=Options(experiment), args=arguments, prog=program, description=__doc__))


def run(options: Options) -> int:
    """Prints the tables, or JSON.

    Raises:
      InputError: on a kind of device without a row, and on batches that do not divide by the devices.
    """
    assembly.check_it_samples(options.experiment.policy, "plan")
    experiment, devices = options.experiment, options.devices
    if options.on_cpu and devices != 1:
        raise InputError(
            f"--devices is {devices} and --device-kind cpu, but the rates of cpu are measured of this whole machine: "
            "leave out --devices, or name the kind of device."
        )
    device = accelerators.named(options.device_kind)
    made = stages(experiment, devices, device_memory=device.own_memory)
    if options.json:
        print(json.dumps(as_json(options, made, device), indent=2))
        return 0
    _print(options, made, device)
    return 0


def as_json(options: Options, made: list[Stage], device: Accelerator) -> dict[str, Any]:
    """The whole plan: FLOPs, bytes and seconds are one device's, of one step or batch."""
    experiment, found = options.experiment, sizes(options.experiment)
    dtype, efficiency = experiment.model.dtype, options.efficiency
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
        "devices": options.devices,
        "efficiency": dataclasses.asdict(efficiency),
        "parameters": costs.parameters(found.policy),
        "trained": found.trained,
        "capacity": capacity,
        "stages": {one.name: stage(one) for one in made},
        "remedies": {
            one.name: [
                remedy._asdict()
                for remedy in remedies(experiment, options.devices, capacity, one.name, device_memory=device.own_memory)
            ]
            for one in made
            if peak(one) > capacity
        },
    }


def _print(options: Options, made: list[Stage], device: Accelerator) -> None:
    experiment, devices = options.experiment, options.devices
    dtype, efficiency = experiment.model.dtype, options.efficiency
    config, data, found = experiment.policy, experiment.data, sizes(experiment)
    capacity = USABLE * device.memory
    training = policy_training(made)
    say(
        f"{experiment.name}: {quantity(costs.parameters(found.policy))} parameters, {quantity(found.trained)} trained, "
        f"{dtype}; {devices} × {device.kind}, each {quantity(device.flops(dtype), 'FLOP/s')}, "
        f"{quantity(device.bandwidth, 'B/s')} and {quantity(device.memory, 'B')}"
        f"{', measured just now' if device.kind == 'cpu' else ' by its data sheet'}."
    )
    rows: list[list[object]] = []
    for phase in training.phases:
        expected = expect((phase,), device, dtype, efficiency)
        work = phase.work
        rows.append(
            [phase.name, quantity(work.flops), quantity(work.moved, "B"), _seconds(expected.seconds), expected.limit]
        )
    whole = expect(training.phases, device, dtype, efficiency)
    total = sum((phase.work for phase in training.phases), Work())
    rows.append(
        ["the whole step", quantity(total.flops), quantity(total.moved, "B"), _seconds(whole.seconds), whole.limit]
    )
    say(
        f"A step reads {config.prompts_per_step} prompts of {data.prompt_length} tokens, with "
        f"{config.samples_per_prompt} responses of {data.response_length} each, split over the devices. What follows "
        "is one device's."
    )
    table(
        "A step of the policy's training",
        ["phase", "FLOPs", "moved", "expected", "limited by"],
        rows,
    )
    tokens = config.prompts_per_step * config.samples_per_prompt * data.response_length
    used = model_flops(training) / (whole.seconds * device.flops(dtype))
    say(f"{quantity(tokens / whole.seconds)} new tokens/s on all devices; model-FLOPs utilisation {used:.0%}.")

    parts = list(dict.fromkeys(part for memory in training.programs.values() for part in memory))
    held = [[part, *(_bytes(memory.get(part)) for memory in training.programs.values())] for part in parts]
    sums = {name: sum(memory.values()) for name, memory in training.programs.items()}
    held.append(["all", *(_bytes(size) for size in sums.values())])
    held.append([f"of {quantity(capacity, 'B')}", *(f"{size / capacity:.0%}" for size in sums.values())])
    table("Memory in that step, by program", ["what it holds", *training.programs], held)
    say(_activations(experiment, devices, device.own_memory))

    all_stages: list[list[object]] = []
    for stage in made:
        expected = expect(stage.phases, device, dtype, efficiency)
        flops = stage.times * sum(phase.work.flops for phase in stage.phases)
        seconds = stage.times * expected.seconds
        limit = expected.limit if peak(stage) <= capacity else "does not fit"
        all_stages.append(
            [stage.name, stage.times, quantity(flops), quantity(peak(stage), "B"), _seconds(seconds), limit]
        )
    table(
        "Every stage",
        ["stage", "steps or batches", "FLOPs", "most memory", "expected", "limited by"],
        all_stages,
    )
    _print_fit(experiment, devices, made, capacity, device.own_memory)
    say(
        f"Assumed: {efficiency.matmul:g} of the peak of products and {efficiency.bandwidth:g} of the bandwidths "
        "(--efficiency.matmul, --efficiency.bandwidth); every response at its full length and every prompt padded; "
        "attention scores written to memory; parameters, gradients and moments whole on every device, batches split "
        f"over them; {USABLE:.0%} of the memory usable. Compilation, the host's work and checkpoints come on top."
    )
    if found.reward is None:
        say(f"The reward {experiment.reward_model.function} is a function of the host, and not in these tables.")


def _activations(experiment: Experiment, devices: int, device_memory: float | None) -> str:
    found, batch = sizes(experiment, device_memory), _policy_batch(experiment, devices)

    def kept(rematerialize: bool) -> str:
        changed = replace(experiment, model=replace(experiment.model, rematerialize=rematerialize))
        memory = policy_training(stages(changed, devices, device_memory=device_memory)).programs["update"]
        slices = _slices(experiment.policy.micro_batches, found, batch, rematerialize)
        return f"{quantity(memory['activations'], 'B')} in {slices} micro-batch{'' if slices == 1 else 'es'}"

    now = "on" if experiment.model.rematerialize else "off"
    return f"Activations of the update: {kept(True)} with --model.rematerialize, {kept(False)} without; it is {now}."


def _print_fit(
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
            say(f"    {remedy.options} brings it to {quantity(remedy.held, 'B')}")
        if not found:
            say(
                "    No option that is counted here brings it in. Split the parameters over the devices, --fsdp and "
                "--model-parallel (docs/devices.md), or take a smaller model."
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
