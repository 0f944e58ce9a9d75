"""A sweep: every point in a process of its own, some of them at a time, and an index that says how far each one is.

A point keeps its record, `point.json`, in its work directory, and holds `point.lock` while it runs. What the index says
follows from these alone, so that it is right after any kill, and for batch jobs on several machines.
"""

import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctrl_jax.commands import report, summary
from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.pipeline import align, results
from ctrl_jax.pipeline.run import Run, check_batches_divide, check_claim, claimed, contents
from ctrl_jax.report.status import Status
from ctrl_jax.runtime import hosts, preemption
from ctrl_jax.runtime.console import latest_lines, say, table
from ctrl_jax.runtime.preemption import Preempted
from ctrl_jax.runtime.shares import Share
from ctrl_jax.runtime.stages import locked, plain, read_json, write_bytes, write_json
from ctrl_jax.theory import procedures

ATTEMPTS = 2
"""Processes that a sweep gives a point before it is reported as failed."""
GRACE = 60.0
"""Seconds that a point has to save what it did, once it is asked to stop."""

_POLL = 0.2
_UNSAID = "Its process ended without a word: it was killed, perhaps for want of memory."


class Point(NamedTuple):
    experiment: Experiment
    work_dir: Path

    @property
    def name(self) -> str:
        return self.experiment.name


class Child(NamedTuple):
    point: Point
    attempt: int
    """Which of the point, counted from 1 over all sweeps."""
    process: subprocess.Popen[bytes]
    share: Share


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
    """Refuses a sweep that cannot become one, before any of it runs.

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
    settings = [{**plain(point.experiment), "name": None} for point in points]
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


def run(
    sweep_dir: Path, points: Sequence[Point], command: Callable[[Point], list[str]], shares: Sequence[Share]
) -> int:
    """Runs the points that are not done, as many at a time as there are shares of the devices; 1 if one failed, else 0.

    A point that fails goes to the end of the line and has one more attempt; the others go on. `sweep.json`,
    `sweep.html` and the Pareto figures follow every change. Each point writes to `log.txt` in its work directory.

    SIGINT, SIGTERM and SIGHUP end the points that run, which save what they did. The same command resumes.

    Args:
      command: that runs a point alone (`run_point`).

    Raises:
      KeyboardInterrupt: after SIGINT, when the points have ended.
      Preempted: likewise after SIGTERM or SIGHUP.
    """
    waiting = deque(point for point in points if not _done(point))
    started = Counter[str]()
    running: list[Child] = []
    free = list(shares)

    def publish_all() -> Path:
        return publish(sweep_dir, points, {child.point.name for child in running})

    with _signals() as received, latest_lines() as show:
        try:
            while (waiting or running) and not received:
                ended = [child for child in running if child.process.poll() is not None]
                for child in ended:
                    running.remove(child)
                    free.append(child.share)
                    name, reason = child.point.name, _close(child)
                    if reason is None:
                        say(f"{name}: done", style="green")
                    else:
                        again = started[child.point.name] < ATTEMPTS
                        if again:
                            waiting.append(child.point)
                        say(f"{name} failed{' and will be tried again' if again else ''}: {reason}", style="red")
                begun = bool(waiting and free)
                while waiting and free:
                    child = _start(waiting.popleft(), command, free.pop(0))
                    running.append(child)
                    started[child.point.name] += 1
                    attempt = f", attempt {child.attempt}" if child.attempt > 1 else ""
                    say(f"{child.point.name}: running{attempt}, log in {_log(child.point)}")
                if ended or begun:
                    publish_all()
                show({child.point.name: _last_line(_log(child.point)) for child in running})
                time.sleep(_POLL)
        finally:
            _end(running, received)
    page = publish_all()
    if received:
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        raise Preempted("The points were stopped, and saved what they did.")
    _print(points)
    say(f"Pareto figure and table: {page}")
    return 0 if all(map(_done, points)) else 1


def run_point(run: Run, sweep_dir: Path, points: Sequence[Point]) -> None:
    """Trains, evaluates and reports one of `points` in this process; where another has it already, it is waited for.

    Of several hosts the first keeps the record and the index, and says whether there is anything to do: whoever ran a
    point that the first leaves alone would wait for it for ever.
    """
    if not hosts.first():
        if not hosts.agree(None):
            align.run(run)
        return
    point = Point(run.experiment, run.work_dir)
    try:
        with locked(run.work_dir / "point.lock"):
            if not hosts.agree(_done(point)):
                _run_noted(run, point)
    finally:
        publish(sweep_dir, points)


def _run_noted(run: Run, point: Point) -> None:
    attempt = _record(point)["attempts"] + 1
    _note(point, attempt, _UNSAID)
    try:
        align.run(run)
    except BaseException as error:
        if preemption.came() or not isinstance(error, Exception):  # asked to stop: it resumes, and has not failed
            _note(point, attempt, None)
        else:
            _note(point, attempt, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        raise
    _note(point, attempt, None)


def publish(sweep_dir: Path, points: Sequence[Point], running: Collection[str] = ()) -> Path:
    """Writes `sweep.json`, `sweep.html` and the Pareto figures; returns the page's path.

    The index has for each point its state (missing, running, done or failed), its attempts, and why the last failed.

    Args:
      running: points that count as running, though they may not have their lock yet.
    """
    # Read and written under one lock: of two batch jobs that end together, the last to write has seen both.
    with locked(sweep_dir / "sweep.lock"):
        found = [_status(point, sweep_dir, point.name in running) for point in points]
        write_json(sweep_dir / "sweep.json", {"points": [status.as_json() for status in found]})
        return report.write_sweep_report(sweep_dir, found)


def write_jobs(
    sweep_dir: Path, points: Sequence[Point], command: Callable[[Point], list[str]], directory: Path
) -> None:
    """Writes `<name>.sh` for each point that is not done: a batch job that runs it, or goes on with it."""
    missing = [point for point in points if not _done(point)]
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
    page = publish(sweep_dir, points)
    say(f"{len(missing)} scripts in {directory}, each a batch job. On Slurm:")
    say(f'  for job in {shlex.quote(str(directory))}/*.sh; do sbatch experiments/launch/slurm.sh "$job"; done')
    say(f"As they end, they write {page} and sweep.json beside it.")


def _start(point: Point, command: Callable[[Point], list[str]], share: Share) -> Child:
    log = _log(point)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(point),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **share.environment},
            # Ctrl-C reaches this process alone, which then asks the points to stop.
            start_new_session=True,
        )
    if share.cores is not None:
        # Before the interpreter is up, so that all its threads inherit it, and XLA makes as many as there are cores.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, share.cores)
    return Child(point, _record(point)["attempts"] + 1, process, share)


def _close(child: Child) -> str | None:
    """Completes the record of a point whose process ended, and returns why it failed: its process may not know."""
    record, code = _record(child.point), child.process.returncode
    reason: str | None
    if _done(child.point):
        reason = None
    elif code < 0:
        reason = f"It was killed by {signal.Signals(-code).name}."
    elif record["attempts"] == child.attempt and record["reason"] is not None:
        reason = record["reason"]
    else:
        reason = _last_line(_log(child.point)) or f"It ended with exit code {code}."
    _note(child.point, child.attempt, reason)
    return reason


def _end(running: list[Child], received: list[int]) -> None:
    """Asks points to stop and waits for them; a second signal ends the patience."""
    if running:
        say(f"Stopping {len(running)} points; they save what they did.")
    for child in running:
        child.process.terminate()
    until = time.monotonic() + GRACE
    while any(child.process.poll() is None for child in running):
        if time.monotonic() > until or len(received) > 1:
            for child in running:
                child.process.kill()
        time.sleep(_POLL)
    for child in running:
        if _record(child.point)["reason"] is not None:
            _note(child.point, child.attempt, None)  # it was stopped, and has not failed
    running.clear()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop, as they arrive; they interrupt nothing while it lasts."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda got, _: received.append(got))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _record(point: Point) -> dict[str, Any]:
    """Attempts and the reason of the last failure; where its file is missing or damaged, as before the first."""
    found = _read(point.work_dir / "point.json") or {}
    attempts, reason = found.get("attempts"), found.get("reason")
    return {
        "attempts": attempts if isinstance(attempts, int) else 0,
        "reason": reason if reason is None else str(reason),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file, or None: a file that is missing or damaged is yet to be made."""
    try:
        found = read_json(path) if path.exists() else None
    except InputError:
        found = None
    return found if isinstance(found, dict) else None


def _note(point: Point, attempts: int, reason: str | None) -> None:
    write_json(point.work_dir / "point.json", {"attempts": attempts, "reason": reason})


def _status(point: Point, sweep_dir: Path, started: bool) -> Status:
    done, page, record, policy = _done(point), _page(point), _record(point), point.experiment.policy
    running = not done and (started or _is_locked(point.work_dir / "point.lock"))
    failed = not done and not running and record["reason"] is not None
    status = Status(
        name=point.name,
        transform=policy.transform,
        procedure=procedures.parse(policy.procedure).name,
        kl_budget=policy.kl_budget,
        state="done" if done else "running" if running else "failed" if failed else "missing",
        attempts=record["attempts"],
        reason=record["reason"] if failed else None,
        report=str(page.relative_to(sweep_dir)) if page.exists() and page.is_relative_to(sweep_dir) else None,
    )
    if not done:
        return status
    try:
        return dataclasses.replace(status, evaluation=_evaluation(point))
    except InputError as error:  # it was written, and has a number that no evaluation can have
        return dataclasses.replace(status, state="failed", reason=str(error))


def _evaluation(point: Point) -> Evaluation:
    return Evaluation.from_json(
        _read(point.work_dir / "evaluation.json"),
        source=f"evaluation.json of {point.name}",
        remedy="evaluate that run again.",
    )


def _done(point: Point) -> bool:
    # The page comes last: a kill between evaluation and report leaves the point without one.
    evaluation, judge = _read(point.work_dir / "evaluation.json"), point.experiment.evaluation.judge
    if evaluation is None or not _page(point).exists() or not (point.work_dir / results.RESULTS).exists():
        return False
    # A judge that is given later has yet to judge: the point's process finds out whether it is the same.
    if judge is not None and (evaluation.get("judge") or {}).get("name") != judge:
        return False
    return results.is_of(point.work_dir, claimed(point.experiment, contents(point.experiment)))


def _page(point: Point) -> Path:
    return point.work_dir / "report" / "index.html"


def _log(point: Point) -> Path:
    return point.work_dir / "log.txt"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _print(points: Sequence[Point]) -> None:
    rows = []
    for point in points:
        if _done(point):
            procedure = procedures.parse(point.experiment.policy.procedure).name
            evaluation = _evaluation(point)
            cells = [evaluation.kl, evaluation.win_rates[procedure], evaluation.win_rates["sampling"]]
            rows.append([point.name, *map(summary.estimate, cells)])
        else:
            rows.append([point.name, "failed", "", ""])
    table("sweep", ["point", "KL, nats per response", "win rate, procedure", "win rate, sampling"], rows)
