"""Speed and memory beside the libraries that a user would take instead: `make bench`.

    make bench ARGS="--only sampling"        or        python -m benchmarks.bench --help

One run on one machine, in turns: every contender is a process of its own that keeps its model loaded, and only one
computes at a time. All read the same weights, in float32, with as many threads as the machine has cores, or in bfloat16
on a GPU (`--device gpu`); prompts and responses have the same lengths, and nothing ends a response early. The first
repetition of each, which compiles, is not counted. A repetition during which other processes had more than
`--tolerance` cores is dropped and made again.

Prints tables, and writes results.json and results.svg: medians, tokens/s, how many times as fast ctrl_jax is (ratio),
the share of the speed that this machine's measured limits allow (floor.py), the share of its FLOP/s that the model's
products took (MFU), peak memory of the process or of its GPU, and how many of the repetitions were undisturbed (kept).
"""

import dataclasses
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import figure, floor, machine, quiet
from benchmarks.cases import CASES, CONTENDERS, GPU_CASES, Case, Contender, Device, Sizes, prepare, read_sizes
from benchmarks.floor import Machine
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.platform import environment

ROOT = Path(__file__).parents[1]
OURS = "ctrl_jax"
SAME_MODEL = {"float32": 1e-3, "bfloat16": 1e-2}
"""Nats a token that the log-prob of a prompt may differ by."""
TRIES = 3
"""Repetitions made for each that is wanted, before a contender on a busy machine is given up."""

SETTINGS = {
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "TOKENIZERS_PARALLELISM": "false",
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
}
ON_DEVICE: dict[Device, dict[str, str]] = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    # The contenders are on the GPU together: none may take all of its memory.
    "gpu": {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}
"""Environment of every process that is timed, and of this one: `SETTINGS`, and these."""


class Failed(Exception):
    """A contender cannot go on; says why."""


class Worker:
    """A contender's process (worker.py), from here."""

    def __init__(self, contender: Contender, case: Case, folder: Path, log: Path):
        given = {"case": dataclasses.asdict(case), "folder": str(folder), "options": contender.options}
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contender.module, json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
                cwd=ROOT,
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self) -> dict[str, Any]:
        """The next answer.

        Raises:
          Failed: if there is none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = "killed, out of memory perhaps" if code == -signal.SIGKILL else f"ended with {code}"
            raise Failed(f"{how}; see {self._log.relative_to(ROOT)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def repeat(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.wait()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Outcome:
    name: str
    label: str
    version: str
    seconds: list[float] = field(default_factory=list)
    """Of the undisturbed repetitions."""
    peak_bytes: int = 0
    dropped: int = 0
    warm_up_seconds: float = 0.0
    log_prob: float | None = None
    """Of a prompt under the loaded model, nats a token."""
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compare(
    case: Case, names: Sequence[str], folder: Path, logs: Path, *, repeats: int, tolerance: float
) -> list[Outcome]:
    """Times the contenders in turns. Those that fail are in the result too, with their reason."""
    outcomes: dict[str, Outcome] = {}
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            contender = CONTENDERS[case.task][name]
            outcome = outcomes[name] = Outcome(name, contender.label, version(contender.package))
            worker = workers[name] = Worker(contender, case, folder, logs / f"{case.task}-{case.shape}-{name}.log")
            say(f"  {contender.label} {outcome.version}: loading")
            try:
                ready = worker.wait()
                outcome.warm_up_seconds, outcome.log_prob = ready["warm_up_seconds"], ready["log_prob"]
            except Failed as error:
                _fail(outcome, workers, str(error))
        for name in others_than_ours(outcomes, SAME_MODEL[case.dtype]):
            _fail(outcomes[name], workers, f"not the same model: log-prob {outcomes[name].log_prob} nats a token")
        for turn in range(TRIES * repeats):
            # Another one is first each time.
            waiting = [name for name in workers if len(outcomes[name].seconds) < repeats]
            for name in waiting[turn % len(waiting) :] + waiting[: turn % len(waiting)] if waiting else []:
                outcome = outcomes[name]
                try:
                    foreign, answer = _watched(workers[name])
                except Failed as error:
                    _fail(outcome, workers, str(error))
                    continue
                outcome.peak_bytes = answer["peak_bytes"]
                busy = foreign is not None and foreign > tolerance
                if busy:
                    outcome.dropped += 1
                else:
                    outcome.seconds.append(answer["seconds"])
                note = "" if foreign is None else f"  others had {foreign:.2f} cores" + ("; dropped" if busy else "")
                say(f"  {outcome.label}: {answer['seconds']:.3f} s{note}")
        for outcome in outcomes.values():
            if not outcome.seconds and outcome.failure is None:
                outcome.failure = f"all of its {outcome.dropped} repetitions were disturbed by other processes"
    finally:
        for worker in workers.values():
            worker.stop()
    return list(outcomes.values())


def others_than_ours(outcomes: Mapping[str, Outcome], tolerance: float) -> list[str]:
    """Those that run, but whose model gives a prompt another log-prob than ours does: they would be timed on other
    work. A model that tells none may be any."""
    if OURS not in outcomes or outcomes[OURS].failure:
        return []
    ours = outcomes[OURS].log_prob
    assert ours is not None, "ctrl_jax tells no log-prob"
    running = {name: outcome.log_prob for name, outcome in outcomes.items() if outcome.failure is None}
    return [name for name, found in running.items() if found is None or abs(found - ours) > tolerance]


def _fail(outcome: Outcome, workers: dict[str, Worker], reason: str) -> None:
    outcome.failure = reason
    say(f"  {outcome.label} leaves: {reason}")
    workers.pop(outcome.name).stop()


def _watched(worker: Worker) -> tuple[float | None, dict[str, Any]]:
    """One repetition, and how many cores others had meanwhile (None where the system does not tell)."""
    before, started = quiet.read([worker.pid]), time.perf_counter()
    answer = worker.repeat()
    after, seconds = quiet.read([worker.pid]), time.perf_counter() - started
    return _foreign(before, after, seconds), answer


def _foreign(before: quiet.Busy | None, after: quiet.Busy | None, seconds: float) -> float | None:
    return None if before is None or after is None else quiet.foreign_cores(before, after, seconds)


def measure_machine(
    decode: Sequence[tuple[int, floor.Product]], device: Device, tolerance: float
) -> tuple[dict[str, Machine], dict[str, Any]]:
    """The machine's limits as each installed library reaches them, and as the best does; and a record for results.json.

    The libraries differ: XLA's products on CPU are slower than MKL's, which no program of XLA can mend from outside.
    """
    products, large = [product for _, product in decode], machine.LARGE[device]
    in_a_row = [product for count, product in decode for _ in range(count)]
    # A GPU would be timed at starting products as small as a decode step's: there they have the large one's rate.
    wanted = [large, *products] if device == "cpu" else [large]
    limits: dict[str, Machine] = {}
    for library in ("jax", "torch"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.machine",
            library,
            device,
            json.dumps(wanted),
            json.dumps(in_a_row),
        ]
        for _ in range(TRIES):
            before, started = quiet.read([]), time.perf_counter()
            run = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
            if run.returncode != 0:
                say(f"  {library}: not measured, {(run.stderr.splitlines() or ['no reason given'])[-1]}")
                break
            foreign = _foreign(before, quiet.read([]), time.perf_counter() - started)
            found = json.loads(run.stdout)
            seconds = dict(zip(wanted, found["seconds"], strict=True))
            rate = flops(large) / seconds[large]
            by_rate = {product: flops(product) / rate for product in products}
            limits[library] = Machine(rate, found["bandwidth"], by_rate | seconds, found["pass_seconds"])
            if foreign is None or foreign <= tolerance:
                break
            say(f"  {library}: others had {foreign:.2f} cores")
    limits["best"] = Machine(
        max(found.rate for found in limits.values()),
        max(found.bandwidth for found in limits.values()),
        {product: min(found.product_seconds[product] for found in limits.values()) for product in [large, *products]},
        min(found.pass_seconds for found in limits.values()),
    )
    for library, found in limits.items():
        speed = f"{found.rate / 1e9:,.0f} GFLOP/s in products of {large[0]}, {found.bandwidth / 1e9:.1f} GB/s read"
        say(f"  this machine, {library}: {speed}")
    record = {
        library: {
            f"gflops_at_{large[0]}": found.rate / 1e9,
            "read_gb_per_second": found.bandwidth / 1e9,
            "decode_products_seconds": found.pass_seconds,
            "gflops": {
                "×".join(map(str, product)): flops(product) / seconds / 1e9
                for product, seconds in found.product_seconds.items()
                if product in wanted
            },
        }
        for library, found in limits.items()
    }
    return limits, record


def flops(product: floor.Product) -> int:
    """Of [m, k] times [k, n]: a multiplication and an addition each."""
    return 2 * product[0] * product[1] * product[2]


def record(case: Case, sizes: Sizes, outcomes: Sequence[Outcome], limits: dict[str, Machine]) -> dict[str, Any]:
    """What results.json says of a case; ratios are of medians, above 1 where this project is faster."""
    parts = floor.parts(sizes, case, limits["best"])
    least, work = sum(parts.values()), floor.model_flops(sizes, case)
    # Memory is what it is; only the products are those of XLA.
    with_jax = dataclasses.replace(limits["jax"], bandwidth=limits["best"].bandwidth)
    ours = next((outcome.median for outcome in outcomes if outcome.name == OURS), None)
    return {
        "task": case.task,
        "shape": case.shape,
        **{name: getattr(case, name) for name in ("prompts", "samples", "prompt_length", "new_tokens")},
        "parameters": sizes.parameters,
        "device": case.device,
        "dtype": case.dtype,
        "model_flops": work,
        "floor_seconds": {
            **parts,
            "total": least,
            "total_with_jax": sum(floor.parts(sizes, case, with_jax).values()),
            "total_with_whole_passes": floor.with_whole_passes(parts, case, limits["best"]),
        },
        "contenders": [
            {
                **{name: getattr(outcome, name) for name in ("name", "label", "version", "failure")},
                "seconds": outcome.seconds,
                "median_seconds": outcome.median,
                "tokens_per_second": outcome.median and case.tokens / outcome.median,
                "ctrl_jax_is_faster_by": outcome.median and ours and outcome.median / ours,
                "fraction_of_floor": outcome.median and least / outcome.median,
                "model_flops_utilisation": outcome.median and work / outcome.median / limits["best"].rate,
                "peak_gib": outcome.peak_bytes / 2**30 if outcome.seconds else None,
                "warm_up_seconds": outcome.warm_up_seconds,
                "log_prob_of_a_prompt": outcome.log_prob,
                "dropped": outcome.dropped,
            }
            for outcome in outcomes
        ],
    }


def show(result: dict[str, Any]) -> None:
    least = result["floor_seconds"]
    tokens = result["prompts"] * result["samples"] * result["new_tokens"]
    what = {"sampling": "Sampling", "step": "A whole RL step"}[result["task"]]
    rows: list[list[object]] = []
    for each in result["contenders"]:
        made = len(each["seconds"]) + each["dropped"]
        if each["median_seconds"] is None:
            continue
        ratio = each["ctrl_jax_is_faster_by"]
        rows.append([
            each["label"], f"{each['median_seconds']:.3f}", f"{each['tokens_per_second']:,.0f}",
            "" if ratio is None else f"{ratio:.2f}", f"{100 * each['fraction_of_floor']:.0f} %",
            f"{100 * each['model_flops_utilisation']:.1f} %", f"{each['peak_gib']:.2f}",
            f"{len(each['seconds'])} of {made}",
        ])  # fmt: skip
    lines = {
        "floor": least["total"],
        "floor, XLA's products": least["total_with_jax"],
        "floor, products in a row": least["total_with_whole_passes"],
    }
    for name, seconds in lines.items():
        share = f"{100 * least['total'] / seconds:.0f} %"
        rows.append([name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", "", share, "", "", ""])
    table(
        f"{what}: {result['shape']}, prompts of {result['prompt_length']} tokens, {result['new_tokens']} new",
        ["", "median s", "tokens/s", "ratio", "floor", "MFU", "GiB", "kept"],
        rows,
    )
    for each in result["contenders"]:
        if each["failure"]:
            say(f"{each['label']} {each['version']} did not finish: {each['failure']}")


def conditions() -> dict[str, Any]:
    """The environment, without the command: it names paths of this machine, which tell a reader nothing."""
    found = {name: value for name, value in environment().items() if name != "command"}
    found["packages"] |= {name: version(name) for name in ("torch", "transformers", "trl", "google-tunix")}
    found["threads"] = os.cpu_count()
    return found


def chosen(
    only: str | None, shapes: Sequence[str], contenders: Sequence[str], cases: Sequence[Case] = CASES
) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases that were asked for, each with its contenders.

    Raises:
      InputError: on a name that there is not.
    """
    known = {case.shape for case in cases}, {name for names in CONTENDERS.values() for name in names}
    for option, asked, names in zip(("--shapes", "--contenders"), (shapes, contenders), known, strict=True):
        for name in asked:
            if name not in names:
                raise InputError(f"{option} has {name!r}; choose from {', '.join(sorted(names))}.")
    found = []
    for case in cases:
        if (only and case.task != only) or (shapes and case.shape not in shapes):
            continue
        names = tuple(name for name in CONTENDERS[case.task] if name in (contenders or case.contenders))
        if names:
            found.append((case, names))
    if not found:
        raise InputError("No case is left: --only, --shapes and --contenders exclude each other. Leave one out.")
    return found


def main(
    only: Literal["sampling", "step"] | None = None,
    device: Device = "cpu",
    shapes: tuple[str, ...] = (),
    contenders: tuple[str, ...] = (),
    repeats: int | None = None,
    model: Path | None = None,
    tolerance: float = 0.1,
    output: Path = ROOT / "benchmarks",
) -> None:
    """Times ctrl_jax beside other libraries.

    Args:
      only: `sampling`, or `step`: a whole RL step.
      device: `gpu` times in bfloat16, with shapes of its own.
      shapes: of tiny-64x4, smollm2-1x16, smollm2-8x8, smollm2-8x4; with a gpu llama1b-32x16; by default all.
      contenders: names such as ctrl_jax, transformers_static, tunix, trl_rloo, trl_grpo_micro; by default each case's.
      repeats: undisturbed repetitions of each; by default each case's.
      model: a Hugging Face directory of a Llama, in the place of SmolLM2's shape with random weights.
      tolerance: cores that other processes may have had during a repetition that counts.
      output: folder of results.json and results.svg; with a gpu they are called gpu.json and gpu.svg.
    """
    os.environ.update(SETTINGS | ON_DEVICE[device])
    cases = chosen(only, shapes, contenders, GPU_CASES if device == "gpu" else CASES)
    if model is not None:
        read_sizes(model)
    cache = ROOT / ".cache" / "bench"
    logs = cache / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    folders = {
        name: prepare(name, model if name == "smollm2" else None, cache) for name in {case.model for case, _ in cases}
    }
    sizes = {name: read_sizes(folder) for name, folder in folders.items()}
    if quiet.read([]) is None:
        say("This system has no /proc/stat: whether others compute meanwhile is not checked.")

    output.mkdir(parents=True, exist_ok=True)
    numbers = output / ("gpu.json" if device == "gpu" else "results.json")
    results = []
    for case, names in cases:
        say(f"{case.task} {case.shape}")
        # Anew for each case: a machine's speed drifts.
        decode = list(floor.decode_products(sizes[case.model], case.rows))
        limits, measured = measure_machine(decode, device, tolerance)
        outcomes = compare(case, names, folders[case.model], logs, repeats=repeats or case.repeats, tolerance=tolerance)
        results.append(record(case, sizes[case.model], outcomes, limits) | {"machine": measured})
        show(results[-1])
        written = {
            "model": {name: "random weights" if name == "tiny" or model is None else model.name for name in folders},
            "tolerance_cores": tolerance,
            "results": results,
            "environment": conditions(),
        }
        # After every case: what comes later may fail.
        numbers.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figure.draw(results, numbers.with_suffix(".svg"))
    say(f"Written: {numbers}, {numbers.with_suffix('.svg')}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(str(error))
