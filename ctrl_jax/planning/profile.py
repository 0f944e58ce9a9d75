"""Where the time of a policy training step goes: by the clock for its programs, by a trace for what is in them.

Random weights, random prompts of the full length, and no end-of-sequence token, so that every response has its full
length and no earlier stage is needed. Shapes, programs and devices are those of `train`.
"""

import gzip
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctrl_jax.config import Experiment, Policy
from ctrl_jax.devices import accelerators, parameters, programs
from ctrl_jax.devices.mesh import batch_parts, shard
from ctrl_jax.errors import InputError
from ctrl_jax.models import attention, lora, networks
from ctrl_jax.pipeline import assembly, optimizers, randomness
from ctrl_jax.planning import phases
from ctrl_jax.planning.expectation import Efficiency, expect
from ctrl_jax.planning.sizes import Sizes
from ctrl_jax.planning.sizes import sizes as sizes_of
from ctrl_jax.planning.tables import not_counted, quantity
from ctrl_jax.rewards.reward import scorer
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.stages import write_json
from ctrl_jax.types import Params, PolicyBatch, Prompts, Responses, Score

NO_EOS = -1
HEAVIEST = 10
# Ops that hold others: their time is that of what is in them.
NESTING = re.compile(r"(while|call|conditional)([.\d]|$)")


@dataclass
class Step:
    """A policy step in the making, and all that it is called with."""

    step: assembly.PolicyStep
    state: programs.TrainState
    reference: Params
    batch: PolicyBatch
    scorer: Callable[[Prompts, Responses], str] | None
    """The text of the compiled reward model; None where a function of the host scores."""

    def whole(self) -> Any:
        self.state, metrics = self.step(self.state, self.reference, self.batch)
        return self.state, metrics


class Op(NamedTuple):
    """A program's instruction, in one of its executions."""

    program: str
    name: str
    start: float
    """Microseconds."""
    duration: float


def run(experiment: Experiment, mesh: Mesh, work_dir: Path, *, steps: int) -> dict[str, Any]:
    """Runs `steps` steps in three ways, writes `profile/` in the work directory, and prints what is in profile.json.

    Whole steps, as the training does them; the three programs of a step, each waited for; and whole steps under jax's
    profiler, whose trace says what share of a program's time its parts have.

    Raises:
      InputError: if `steps` is not positive, or the algorithm samples nothing.
    """
    if steps < 1:
        raise InputError(f"`steps` is {steps}", field="steps", value=steps, remedy="profile at least 1.")
    assembly.check_it_samples(experiment.policy, "profile")
    found = _prepare(experiment, mesh)
    compiling = _compile(found)
    whole, programs = _clock(found, steps)
    folder = work_dir / "profile"
    ops, traced = _trace(found, folder, steps)
    result = _result(experiment, mesh, steps, compiling, whole, programs, ops, traced, _texts(found))
    write_json(folder / "profile.json", result)
    _print(result, folder)
    for sentence in not_counted(experiment):
        say(sentence)
    return result


def _prepare(experiment: Experiment, mesh: Mesh) -> Step:
    sizes, model, data, policy = sizes_of(experiment), experiment.model, experiment.data, experiment.policy
    parts = networks.create(
        sizes.policy, model.lora, rematerialize=model.rematerialize, fused_attention=attention.has_kernel(mesh)
    )
    key = randomness.stage_key(experiment.seed, "profile")
    reference = jax.tree.map(lambda x: x.astype(model.dtype), parameters.init_decoder(parts, mesh, key))
    count, references = policy.prompts_per_step, experiment.calibration.rewards_per_prompt
    algorithm = assembly.algorithm(
        parts, mesh, policy, beta=policy.beta or 0.3, num_references=references, eos_ids=(NO_EOS,)
    )
    state = programs.init_state(
        parameters.adapt_decoder(parts, mesh, key, reference),
        optimizers.policy(policy),
        mesh,
        algorithm.start(),
    )
    tokens = jax.random.randint(key, (count, data.prompt_length), 0, sizes.policy.vocabulary_size)
    prompts = Prompts(tokens, jnp.full(count, data.prompt_length), jnp.arange(count, dtype=jnp.uint32))
    rewards = jnp.sort(jax.random.normal(key, (count, references)), axis=-1)
    score, scorer = _score(sizes, mesh, key, reference)
    step = assembly.policy_step(
        parts,
        mesh,
        policy,
        algorithm,
        optimizers.policy(policy),
        score,
        key=key,
        max_length=data.response_length,
        eos_ids=(NO_EOS,),
        rank=_rank(policy, mesh, key) if policy.floors else None,
    )
    return Step(step, state, reference, shard(mesh, PolicyBatch(prompts, rewards)), scorer)


def _score(
    sizes: Sizes, mesh: Mesh, key: jax.Array, reference: Params
) -> tuple[Score, Callable[[Prompts, Responses], str] | None]:
    """(the reward, the text of its compiled program)"""
    if sizes.reward is None:
        # The user's function would be given what random weights write.
        rewards = {}

        def constant(prompts: Prompts, responses: Responses) -> Any:
            shape = responses.tokens.shape[:2]
            if shape not in rewards:
                rewards[shape] = shard(mesh, jax.random.normal(key, shape))
            return rewards[shape]

        return constant, None
    parts = networks.create(sizes.reward, sizes.reward_lora, fused_attention=attention.has_kernel(mesh))
    if sizes.reward == sizes.policy:
        trunk = reference
    else:
        trunk = jax.tree.map(lambda x: x.astype(parts.architecture.dtype), parameters.init_decoder(parts, mesh, key))
    frozen, trained = parameters.adapt_reward(parts, mesh, key, trunk)
    params = lora.overlay(frozen, trained)
    score = scorer(parts, mesh)
    return (
        lambda prompts, responses: score(params, prompts, responses),
        lambda prompts, responses: _text(score, params, prompts, responses),
    )


def _rank(policy: Policy, mesh: Mesh, key: jax.Array) -> Score:
    """In place of the rewards that are constrained, which would be given what random weights write."""
    shape = policy.prompts_per_step, policy.samples_per_prompt, len(policy.floors)
    ranks = shard(mesh, jax.random.uniform(key, shape))
    return lambda prompts, responses: ranks


def _sampling(found: Step) -> tuple[Any, ...]:
    params = lora.overlay(found.reference, found.state.params)
    return params, found.batch.prompts, found.step.key(found.state.step)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - started, result


def _by_program(found: Step) -> dict[str, float]:
    """Seconds of each program of one step, waited for."""
    arguments = jax.block_until_ready(_sampling(found))
    sampling, rollouts = _seconds(lambda: found.step.sample(*arguments))
    scoring, experience = _seconds(lambda: found.step.experience(found.batch, rollouts))
    updating, (found.state, _) = _seconds(lambda: found.step.update(found.state, found.reference, experience))
    return {"sample": sampling, "score": scoring, "update": updating}


def _compile(found: Step) -> dict[str, float]:
    """Seconds that the first call of each program takes above the second: compiling it, or reading it from a cache."""
    first, second = _by_program(found), _by_program(found)
    return {name: max(0.0, first[name] - second[name]) for name in first}


def _clock(found: Step, steps: int) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of whole steps and of their programs, in turn, so that a disturbance hits both."""
    whole, programs = [], []
    _seconds(found.whole)
    for _ in range(steps):
        whole.append(_seconds(found.whole)[0])
        programs.append(_by_program(found))
    return whole, {name: [step[name] for step in programs] for name in programs[0]}


def _trace(found: Step, folder: Path, steps: int) -> tuple[list[Op], float]:
    """The ops of all threads and streams, and the seconds that the steps took under the profiler."""

    def some() -> Any:
        results = None
        for _ in range(steps):
            results = found.whole()
        return results

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would be most of the trace, and slow it down
    with jax.profiler.trace(folder, profiler_options=options):
        seconds, _ = _seconds(some)
    newest = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    return read_trace(newest), seconds


def read_trace(path: Path) -> list[Op]:
    """The ops in a `*.trace.json.gz` of jax's profiler, without those that hold others."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ops = []
    for event in events:
        arguments = event.get("args", {})
        if event.get("ph") == "X" and "hlo_op" in arguments and not NESTING.match(arguments["hlo_op"]):
            ops.append(Op(arguments.get("hlo_module", ""), arguments["hlo_op"], event["ts"], event["dur"]))
    return ops


def busy(ops: Iterable[Op]) -> float:
    """Microseconds in which at least one op ran."""
    total, end = 0.0, -1.0
    for op in sorted(ops, key=lambda op: op.start):
        total += max(0.0, op.start + op.duration - max(end, op.start))
        end = max(end, op.start + op.duration)
    return total


def _texts(found: Step) -> dict[str, str]:
    """The compiled text of a step's programs."""
    arguments = _sampling(found)
    rollouts = found.step.sample(*arguments)
    experience = found.step.experience(found.batch, rollouts)
    texts = {
        "sample": _text(found.step.sample, *arguments),
        "update": _text(found.step.update, found.state, found.reference, experience),
    }
    if found.scorer is not None:
        texts["score"] = found.scorer(found.batch.prompts, rollouts.responses)
    return texts


def _text(program: Any, *arguments: Any) -> str:
    return program.lower(*arguments).compile().as_text()


INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(|\{)")


def module_name(text: str) -> str:
    found = re.search(r"HloModule ([\w.-]+)", text)
    return found[1] if found else ""


def source_names(text: str) -> dict[tuple[str, str], str]:
    """(program, op) to jax's name of it, in the text of a compiled program.

    A fusion without a name is called as what it fuses. What the compiler put in by itself is called after where its
    operands come from, or else after what uses it: `copy after jit(f)/mul`.
    """
    program = module_name(text)
    names: dict[str, str] = {}
    inside: dict[str, str] = {}
    nameless: dict[str, list[str]] = {}
    computation = ""
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            opened = COMPUTATION.match(line)
            computation = opened[1] if opened else computation
            continue
        op = instruction[1]
        # Arguments of the program and bodies of reductions have names that say nothing.
        found = re.search(r'op_name="(jit\([^"]+)"', line)
        called = re.search(r"calls=%?([\w.-]+)", line)
        if found is not None:
            names[op] = inside[computation] = found[1]
        elif called is not None and called[1] in inside:
            names[op] = inside[called[1]]
        else:
            nameless[op] = re.findall(r"%([\w.-]+)", line.split("=", 1)[1])
    known = dict(names)
    for order, neighbours in ((list(nameless), nameless), (list(nameless)[::-1], _users(text))):
        for op in order:
            source = next((known[near] for near in neighbours.get(op, []) if near in known), None)
            if op not in known and source is not None:
                known[op] = source
                names[op] = f"{_kind(op)} after {source}"
    return {(program, op): name for op, name in names.items()}


def _users(text: str) -> dict[str, list[str]]:
    """The ops that read an op's result."""
    users: dict[str, list[str]] = {}
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is not None:
            for operand in re.findall(r"%([\w.-]+)", line.split("=", 1)[1]):
                users.setdefault(operand, []).append(instruction[1])
    return users


def _kind(op: str) -> str:
    """fusion.12 is a fusion."""
    return re.sub(r"[.\d]+$", "", op)


def part_of_sampling(name: str) -> str:
    """What an op of the sampler belongs to, by jax's name of it."""
    if "unembed" in name:
        return "output projection"
    if "Decoder." in name:
        return "decode: layers" if "while/body" in name else "prefill"
    return "drawing tokens"


def part_of_update(name: str) -> str:
    """What an op of the update belongs to; jax calls what is differentiated jvp, and its backward pass transpose."""
    if "transpose(" in name:
        return "backward"
    if "jvp(" in name:
        return "reference, policy, loss: forward"
    return "optimiser, metrics"


def _shares(ops: list[Op], names: dict[tuple[str, str], str], part: Callable[[str], str]) -> dict[str, float]:
    """Share of the time of some ops by part; those without a name are `unnamed`."""
    total: Counter[str] = Counter()
    for op in ops:
        name = names.get((op.program, op.name))
        total["unnamed" if name is None else part(name)] += op.duration  # type: ignore[assignment]
    everything = sum(total.values())
    return {name: value / everything for name, value in total.most_common()} if everything else {}


def _heaviest(ops: list[Op], names: dict[tuple[str, str], str], steps: int) -> list[dict[str, Any]]:
    """The ops with the most time, those with one name taken together: a loop's iterations, and all layers."""
    total: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for op in ops:
        source = names.get((op.program, op.name), _kind(op.name))
        key = op.program, re.sub(r"layers_\d+", "layers_*", source)
        total[key] += op.duration  # type: ignore[assignment]
        calls[key] += 1
    everything = sum(total.values())
    return [
        {
            "program": program,
            "op": source,
            "calls_per_step": calls[program, source] / steps,
            "seconds_per_step": duration / 1e6 / steps,
            "share": duration / everything,
        }
        for (program, source), duration in total.most_common(HEAVIEST)
    ]


def _result(
    experiment: Experiment,
    mesh: Mesh,
    steps: int,
    compiling: dict[str, float],
    whole: list[float],
    programs: dict[str, list[float]],
    ops: list[Op],
    traced: float,
    texts: dict[str, str],
) -> dict[str, Any]:
    devices, parts, device = mesh.size, batch_parts(mesh), mesh.devices.flat[0]
    policy, data, dtype = experiment.policy, experiment.data, experiment.model.dtype
    step = statistics.median(whole)
    tokens = policy.prompts_per_step * policy.samples_per_prompt * data.response_length
    training = phases.policy_training(phases.stages(experiment, parts, device_memory=accelerators.memory(device)))
    accelerator = accelerators.of_device(device)
    flops = phases.model_flops(training) * parts
    names = {key: name for text in texts.values() for key, name in source_names(text).items()}

    def shares(program: str, part: Callable[[str], str]) -> dict[str, float]:
        module = module_name(texts[program])
        return _shares([op for op in ops if op.program == module], names, part)

    result: dict[str, Any] = {
        "experiment": experiment.name,
        "devices": f"{devices} × {device.device_kind}",
        "steps": steps,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "sampled_tokens_per_second": tokens / statistics.median(programs["sample"]),
        "compile_seconds": compiling,
        "program_seconds": {name: statistics.median(values) for name, values in programs.items()},
        "shares": {
            "sample": shares("sample", part_of_sampling),
            "update": shares("update", part_of_update),
        },
        "idle_share": max(0.0, 1 - busy(ops) / 1e6 / traced),
        "traced_step_seconds": traced / steps,
        "model_flops": flops,
        "heaviest": _heaviest(ops, names, steps),
    }
    if accelerator is not None:
        # Virtual devices of a CPU share its rates.
        machines = 1 if device.platform == "cpu" else devices
        result["peak_flops"] = accelerator.flops(dtype) * machines
        result["model_flops_utilisation"] = flops / step / result["peak_flops"]
        shared = replace(
            accelerator,
            bandwidth=accelerator.bandwidth * machines / parts,
            float32=accelerator.float32 * machines / parts,
            bfloat16=accelerator.bfloat16 * machines / parts,
        )
        result["expected_seconds"] = _expected(training, shared, dtype)
    return result


def _expected(training: phases.Stage, device: accelerators.Accelerator, dtype: str) -> dict[str, float]:
    """The plan's seconds for the three programs of a step."""
    seconds = {"sample": 0.0, "score": 0.0, "update": 0.0}
    for phase in training.phases:
        expected = expect((phase,), device, dtype, Efficiency()).seconds
        seconds[phase.program] += expected
    return seconds


def _print(result: dict[str, Any], folder: Path) -> None:
    say(
        f"{result['experiment']} on {result['devices']}, with random weights, random prompts and no end of sequence: "
        f"medians of {result['steps']} steps."
    )
    whole = result["step_seconds"]
    expected = result.get("expected_seconds", {})
    rows: list[list[object]] = []
    for name, seconds in result["program_seconds"].items():
        rows.append([name, 1e3 * seconds, f"{seconds / whole:.0%}", 1e3 * expected[name] if expected else "", ""])
        rows[-1][-1] = f"{result['compile_seconds'][name]:.1f}"
        for part, share in result["shares"].get(name, {}).items():
            rows.append([f"    {part}", 1e3 * seconds * share, f"{seconds * share / whole:.0%}", "", ""])
    total = 1e3 * sum(expected.values()) if expected else ""
    rows.append(["whole step", 1e3 * whole, "100%", total, f"{sum(result['compile_seconds'].values()):.1f}"])
    rows.append(["    no op running", 1e3 * whole * result["idle_share"], f"{result['idle_share']:.0%}", "", ""])
    table("Where a step's time goes", ["phase", "ms", "share", "planned ms", "compile s"], rows)
    used = ""
    if "model_flops_utilisation" in result:
        share, peak = result["model_flops_utilisation"], quantity(result["peak_flops"], "FLOP/s")
        used = f"; model-FLOPs utilisation {share:.0%} of {peak}"
    say(
        f"{result['tokens_per_second']:,.0f} new tokens/s in the whole step, "
        f"{result['sampled_tokens_per_second']:,.0f} in sampling{used}."
    )
    table(
        "The heaviest ops",
        ["op", "in", "calls a step", "ms a step", "share"],
        [
            [
                _short(op["op"]),
                op["program"].removeprefix("jit_"),
                f"{op['calls_per_step']:.0f}",
                1e3 * op["seconds_per_step"],
                f"{op['share']:.0%}",
            ]
            for op in result["heaviest"]
        ],
    )
    say(
        f"Parts of a program have the shares that their ops have in the trace, threads added up. In {folder}: "
        f"profile.json, and the trace (`tensorboard --logdir {folder}`, or its *.trace.json.gz in ui.perfetto.dev)."
    )


def _short(source: str) -> str:
    """jax's name without what all names of a program begin with."""
    return re.sub(r"\bjit\(\w+\)/(shmap_body/)?", "", source, count=1)
