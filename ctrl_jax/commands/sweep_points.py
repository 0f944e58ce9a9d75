"""The points of a sweep: the state of each, and the index of all.

A point keeps its record, `point.json`, in its work directory, and holds `point.lock` while it runs. The index follows
from these alone, so that it is right after any kill, and for batch jobs on several machines.
"""

import dataclasses
import fcntl
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctrl_jax.commands import report, sweep_comparisons, train
from ctrl_jax.commands.point import Point
from ctrl_jax.commands.sweep_comparisons import IDENTITY, Beside
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.pipeline import assembly, results
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.pipeline.stages import as_tree
from ctrl_jax.pipeline.workspace import Workspace, check_claim, claimed, contents
from ctrl_jax.report.statistics import highest_mean
from ctrl_jax.report.status import Cost, Status
from ctrl_jax.runtime import hosts, preemption
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.metrics import RECENT, read_metrics
from ctrl_jax.runtime.stages import locked, read_json, write_bytes, write_json
from ctrl_jax.theory import procedures

UNSAID = "Its process ended without a word: it was killed, perhaps for want of memory."


def find(points: Sequence[Point], name: str) -> Point:
    """The point of that name.

    Raises:
      InputError: if there is none, with the names that there are.
    """
    for point in points:
        if point.name == name:
            return point
    raise InputError(f"The sweep has no point {name!r}; it has {', '.join(point.name for point in points)}.")


def check(points: Sequence[Point], *, devices: int = 1) -> None:
    """Refuses a sweep whose points cannot all run, before any of them does.

    Raises:
      InputError: if two points share a name or are the same, if a work directory belongs to another experiment, or if
        a batch does not divide by the devices of a point.
    """
    if not points:
        raise InputError("The sweep has no points; let sweep() return at least one experiment.")
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Two points of the sweep are called {twice!r}, and would share a work directory; rename one.")
    settings = [{**as_tree(point.experiment), "name": None} for point in points]
    for index in range(len(points)):
        if settings[index] in settings[:index]:
            same = names[settings.index(settings[index])]
            raise InputError(
                f"The points {same!r} and {names[index]!r} of the sweep are the same experiment. If an option "
                "made them so, leave it out: a sweep sets what its points differ in."
            )
    for point in points:
        check_batches_divide(point.experiment, devices)
        check_claim(point.experiment, point.work_dir)


def run_point(run: Workspace, sweep_dir: Path, points: Sequence[Point], *, baseline: str = IDENTITY) -> None:
    """Trains, evaluates and reports one of `points` in this process, after any other process that runs it has ended.

    Of several hosts the first keeps the record and the index, and decides whether there is anything to do: a host that
    ran a point alone would wait for the others for ever.
    """
    if not hosts.first():
        if not hosts.agree(None):
            train.align(run)
        return
    point = Point(run.experiment, run.work_dir)
    try:
        with locked(run.work_dir / "point.lock"):
            if not hosts.agree(is_done(point)):
                _run_noted(run, point)
    finally:
        publish(sweep_dir, points, baseline=baseline, compare=all(map(_has_ended, points)))


def _run_noted(run: Workspace, point: Point) -> None:
    attempt = read_record(point).attempts + 1
    note(point, attempt, UNSAID)
    try:
        train.align(run)
    except BaseException as error:
        if preemption.came() or not isinstance(error, Exception):  # asked to stop: it resumes later, and has not failed
            note(point, attempt, None)
        else:
            note(point, attempt, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        raise
    note(point, attempt, None)


def publish(
    sweep_dir: Path,
    points: Sequence[Point],
    running: Collection[str] = (),
    *,
    baseline: str = IDENTITY,
    compare: bool = True,
) -> tuple[Path, Beside]:
    """Writes `sweep.json`, `differences.json`, `sweep.html` and the figures.

    The index has the state of each point (missing, running, done or failed), its attempts, and why the last one failed.

    Args:
      running: names of points that count as running, though they may not have their lock yet.
      baseline: the transform or the point that others are compared with.
      compare: whether to; it takes a second a point, too much to do again whenever one of many ends.

    Returns:
      The page's path, and the points beside the baseline.
    """
    # Read and written under one lock: if two batch jobs end together, the last to write has seen both.
    with locked(sweep_dir / "sweep.lock"):
        found = [_status(point, sweep_dir, point.name in running) for point in points]
        write_json(sweep_dir / "sweep.json", {"points": [status.as_json() for status in found]})
        done = [point for point, status in zip(points, found, strict=True) if status.evaluation is not None]
        beside = sweep_comparisons.compared(done if compare else [], baseline)
        tree = {
            "baseline": baseline,
            "comparisons": [one.as_json() for one in beside.comparisons],
            "methods": [one.as_json() for one in beside.at_equal_kl],
            "overoptimization": [one.as_json() for one in beside.laws],
        }
        write_json(sweep_dir / "differences.json", tree)
        page = report.write_sweep_report(
            sweep_dir, found, beside.runs, beside.comparisons, beside.notes, beside.at_equal_kl, beside.laws
        )
        return page, beside


def write_jobs(
    sweep_dir: Path,
    points: Sequence[Point],
    command: Callable[[Point], list[str]],
    directory: Path,
    *,
    baseline: str = IDENTITY,
) -> None:
    """Writes `<name>.sh` for each point that is not done: a batch job that runs or resumes it."""
    missing = [point for point in points if not is_done(point)]
    for point in missing:
        script = directory / f"{point.name}.sh"
        lines = [
            "#!/bin/sh",
            "# One point of a sweep. Started again, it goes on where it stopped.",
            f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command(point))}",
        ]
        write_bytes(script, ("\n".join(lines) + "\n").encode())
        readable = script.stat().st_mode
        script.chmod(readable | (readable & 0o444) >> 2)  # whoever may read it, by the umask, may run it
    page, _ = publish(sweep_dir, points, baseline=baseline)
    say(f"{len(missing)} scripts in {directory}, each a batch job. On Slurm:")
    say(f'  for job in {shlex.quote(str(directory))}/*.sh; do sbatch experiments/launch/slurm.sh "$job"; done')
    say(f"As they end, they write {page} and sweep.json beside it.")


def _is_running(point: Point) -> bool:
    """Whether a process has its lock."""
    path = point.work_dir / "point.lock"
    if not path.exists():
        return False
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Record(NamedTuple):
    attempts: int
    reason: str | None
    """Why the last attempt failed."""


def read_record(point: Point) -> Record:
    """What point.json says; where it is missing or damaged, as before the first attempt."""
    found = _read(point.work_dir / "point.json") or {}
    attempts, reason = found.get("attempts"), found.get("reason")
    return Record(attempts if isinstance(attempts, int) else 0, reason if reason is None else str(reason))


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or damaged, so that it will be made."""
    try:
        found = read_json(path) if path.exists() else None
    except InputError:
        found = None
    return found if isinstance(found, dict) else None


def note(point: Point, attempts: int, reason: str | None) -> None:
    write_json(point.work_dir / "point.json", {"attempts": attempts, "reason": reason})


def _status(point: Point, sweep_dir: Path, started: bool) -> Status:
    done, page, record, policy = is_done(point), point.page, read_record(point), point.experiment.policy
    running = not done and (started or _is_running(point))
    failed = not done and not running and record.reason is not None
    status = Status(
        name=point.name,
        transform=policy.transform,
        method=policy.method,
        aims=policy.aims,
        procedure=procedures.parse(policy.procedure).name,
        kl_budget=policy.kl_budget,
        state="done" if done else "running" if running else "failed" if failed else "missing",
        attempts=record.attempts,
        reason=record.reason if failed else None,
        report=str(page.relative_to(sweep_dir)) if page.exists() and page.is_relative_to(sweep_dir) else None,
    )
    if not done:
        return status
    try:
        found = evaluation(point)
        highest = _highest_kl(point)
        return dataclasses.replace(status, evaluation=found, cost=_cost(point, found), highest_kl=highest)
    except InputError as error:  # it was written, with a number that no evaluation can have
        return dataclasses.replace(status, state="failed", reason=str(error))


def _highest_kl(point: Point) -> float | None:
    """The highest mean of five steps' KL; None where it is an estimate from stored responses, which a few outweigh."""
    if not assembly.is_on_policy(point.experiment.policy):
        return None
    return highest_mean(read_metrics(point.work_dir / "metrics.jsonl").get("kl", np.array([])), RECENT)


def _has_ended(point: Point) -> bool:
    """Whether it is done or has failed, so that nothing more of it is to come by itself."""
    return is_done(point) or (not _is_running(point) and read_record(point).reason is not None)


def _cost(point: Point, found: Evaluation) -> Cost:
    policy = point.experiment.policy
    epochs, _ = assembly.updates(policy)
    pairs = not (assembly.is_on_policy(policy) or assembly.learns_from_stored(policy))
    batch = policy.steps * policy.prompts_per_step * (2 if pairs else policy.samples_per_prompt)
    return Cost(batch if assembly.is_on_policy(policy) else 0, epochs * batch, found.timings.get("train"))


def evaluation(point: Point) -> Evaluation:
    """The evaluation of a point that is done.

    Raises:
      InputError: if it has an entry that is missing or out of range.
    """
    return Evaluation.from_json(
        read_json(point.work_dir / "evaluation.json"),
        source=f"evaluation.json of {point.name}",
        remedy="evaluate that run again.",
    )


def is_done(point: Point) -> bool:
    # The page comes last: a kill between evaluation and report leaves the point without one.
    evaluation, judge = _read(point.work_dir / "evaluation.json"), point.experiment.evaluation.judge
    if evaluation is None or not point.page.exists() or not (point.work_dir / results.RESULTS).exists():
        return False
    # A judge that was given later has not judged yet. The point's process checks that one of the same name is the same.
    if judge is not None and (evaluation.get("judge") or {}).get("name") != judge:
        return False
    return results.is_of(point.work_dir, claimed(point.experiment, contents(point.experiment)))
