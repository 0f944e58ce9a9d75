"""Speed and memory beside the libraries that a user would take instead: `make bench`.

    make bench ARGS="--only sampling"        or        python -m benchmarks.bench --help

One run on one machine, in turns: every contender is a process of its own that keeps its model loaded, and only one
computes at a time. All read the same weights, in float32, with as many threads as the machine has cores; prompts and
responses have the same lengths, and nothing ends a response early. The first repetition of each, which compiles, is not
counted. A repetition during which other processes had more than `--tolerance` cores is dropped and made again.

Prints tables, and writes results.json and results.svg: medians, tokens/s, peak resident memory of the process, and the
share of the floor that this machine's measured limits set (floor.py).
"""

import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import figure, floor, machine, quiet
from benchmarks.cases import CASES, CONTENDERS, Case, Contender, Sizes, prepare, read_sizes
from benchmarks.floor import Machine
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.platform import environment

ROOT = Path(__file__).parents[1]
OURS = "ctrl_jax"
TRIES = 3
"""Repetitions made for each that is wanted, before a contender on a busy machine is given up."""


class Failed(Exception):
    """A contender cannot go on; says why."""


class Worker:
    """A contender's process (worker.py), from here."""

    def __init__(self, contender: Contender, case: Case, folder: Path, log: Path):
        given = {"case": dataclasses.asdict(case), "folder": str(folder), "options": contender.options}
        threads = str(os.cpu_count())
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        environ = os.environ | offline | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contender.module, json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environ,
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
            raise Failed(
                "killed, out of memory perhaps" if code == -9 else f"ended with {code}; see {self._log.relative_to(ROOT)}"
            )
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
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compare(case: Case, names: Sequence[str], folder: Path, logs: Path, repeats: int, tolerance: float) -> list[Outcome]:
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
                outcome.warm_up_seconds = worker.wait()["warm_up_seconds"]
            except Failed as error:
                _fail(outcome, workers, str(error))
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


def _fail(outcome: Outcome, workers: dict[str, Worker], reason: str) -> None:
    outcome.failure = reason
    say(f"  {outcome.label} leaves: {reason}")
    workers.pop(outcome.name).stop()


def _watched(worker: Worker) -> tuple[float | None, dict[str, Any]]:
    """One repetition, and how many cores others had meanwhile (None where the system does not tell)."""
    before, started = quiet.read([worker.pid]), time.perf_counter()
    answer = worker.repeat()
    after, seconds = quiet.read([worker.pid]), time.perf_counter() - started
    foreign = None if before is None or after is None else quiet.foreign_cores(before, after, seconds)
    return foreign, answer


def measure_machine(products: Iterable[floor.Product]) -> tuple[Machine, dict[str, Any]]:
    """The machine's limits by the best of the libraries that are installed, and what each of them reached."""
    wanted = [machine.LARGE, *products]
    found: dict[str, Any] = {}
    for library in ("jax", "torch"):
        command = [sys.executable, "-m", "benchmarks.machine", library, json.dumps(wanted)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if run.returncode == 0:
            found[library] = json.loads(run.stdout)
    best = {
        product: min(result["seconds"][index] for result in found.values()) for index, product in enumerate(wanted)
    }
    flops = {product: 2 * product[0] * product[1] * product[2] for product in wanted}
    limits = Machine(
        rate=flops[machine.LARGE] / best[machine.LARGE],
        bandwidth=max(result["bandwidth"] for result in found.values()),
        product_seconds=best,
    )
    record = {
        "gflops_at_2048": limits.rate / 1e9,
        "bandwidth_gb_per_second": limits.bandwidth / 1e9,
        "products": [
            {"shape": list(product), "gflops": {
                library: flops[product] / result["seconds"][index] / 1e9 for library, result in found.items()
            }}
            for index, product in enumerate(wanted)
        ],
    }  # fmt: skip
    return limits, record


def record(case: Case, sizes: Sizes, outcomes: Sequence[Outcome], limits: Machine) -> dict[str, Any]:
    """What results.json says of a case; ratios are of medians, above 1 where this project is faster."""
    parts = floor.parts(sizes, case, limits)
    least = sum(parts.values())
    ours = next((outcome.median for outcome in outcomes if outcome.name == OURS), None)
    return {
        "task": case.task,
        "shape": case.shape,
        **{name: getattr(case, name) for name in ("prompts", "samples", "prompt_length", "new_tokens")},
        "parameters": sizes.parameters,
        "floor_seconds": {**parts, "total": least},
        "contenders": [
            {
                **{name: getattr(outcome, name) for name in ("name", "label", "version", "failure")},
                "seconds": outcome.seconds,
                "median_seconds": outcome.median,
                "tokens_per_second": outcome.median and case.tokens / outcome.median,
                "ctrl_jax_is_faster_by": outcome.median and ours and outcome.median / ours,
                "fraction_of_floor": outcome.median and least / outcome.median,
                "peak_gib": outcome.peak_bytes / 2**30 if outcome.seconds else None,
                "warm_up_seconds": outcome.warm_up_seconds,
                "dropped": outcome.dropped,
            }
            for outcome in outcomes
        ],
    }


def show(result: dict[str, Any]) -> None:
    least = result["floor_seconds"]["total"]
    tokens = result["prompts"] * result["samples"] * result["new_tokens"]
    what = {"sampling": "Sampling", "step": "A whole RL step"}[result["task"]]
    columns = ["", "median s", "tokens/s", "ctrl_jax is faster by", "% of the floor", "peak GiB", "repeats", "dropped"]
    rows: list[list[object]] = []
    for each in result["contenders"]:
        if each["median_seconds"] is None:
            rows.append([f"{each['label']} {each['version']}: {each['failure']}", *[""] * 6, each["dropped"]])
            continue
        ratio = each["ctrl_jax_is_faster_by"]
        rows.append([
            f"{each['label']} {each['version']}", f"{each['median_seconds']:.3f}", f"{each['tokens_per_second']:,.0f}",
            "" if ratio is None or each["name"] == OURS else f"{ratio:.2f} ×", f"{100 * each['fraction_of_floor']:.0f}",
            f"{each['peak_gib']:.2f}", len(each["seconds"]), each["dropped"],
        ])  # fmt: skip
    rows.append(["floor", f"{least:.3f}", f"{tokens / least:,.0f}", "", "100", "", "", ""])
    table(
        f"{what}: {result['shape']}, prompts of {result['prompt_length']} tokens, {result['new_tokens']} new",
        columns,
        rows,
    )


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
      shapes: of tiny-64x4, smollm2-1x16, smollm2-8x8, smollm2-8x4; by default all.
      contenders: names such as ctrl_jax, transformers_static, tunix, trl_rloo, trl_grpo_micro; by default each case's.
      repeats: undisturbed repetitions of each; by default each case's.
      model: a Hugging Face directory of a Llama, in the place of SmolLM2's shape with random weights.
      tolerance: cores that other processes may have had during a repetition that counts.
      output: folder of results.json and results.svg.
    """
    cases = chosen(only, shapes, contenders)
    if model is not None:
        read_sizes(model)
    cache = ROOT / ".cache" / "bench"
    logs = cache / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    folders = {
        name: prepare(name, model if name == "smollm2" else None, cache) for name in {case.model for case, _ in cases}
    }
    sizes = {name: read_sizes(folder) for name, folder in folders.items()}
    say("Measuring this machine")
    products = {product for case, _ in cases for _, product in floor.decode_products(sizes[case.model], case.rows)}
    limits, measured = measure_machine(sorted(products))
    say(f"  products of 2048: {limits.rate / 1e9:.0f} GFLOP/s; memory: {limits.bandwidth / 1e9:.1f} GB/s")
    if quiet.read([]) is None:
        say("This system has no /proc/stat: whether others compute meanwhile is not checked.")

    results = []
    for case, names in cases:
        say(f"{case.task} {case.shape}")
        outcomes = compare(case, names, folders[case.model], logs, repeats or case.repeats, tolerance)
        results.append(record(case, sizes[case.model], outcomes, limits))
        show(results[-1])
    written = {
        "model": {name: "random weights" if name == "tiny" or model is None else model.name for name in folders},
        "tolerance_cores": tolerance,
        "machine": measured,
        "results": results,
        "environment": conditions(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    figure.draw(results, output / "results.svg")
    say(f"Written: {output / 'results.json'}, {output / 'results.svg'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(str(error))
