"""The processes of a sweep's points: one for each share of the machine's devices at a time."""

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ctrl_jax.commands import sweep_comparisons
from ctrl_jax.commands.point import Point
from ctrl_jax.commands.sweep_comparisons import IDENTITY, Beside
from ctrl_jax.commands.sweep_points import evaluation, is_done, note, publish, read_record
from ctrl_jax.runtime.console import latest_lines, say, table
from ctrl_jax.runtime.preemption import Preempted
from ctrl_jax.runtime.shares import Share
from ctrl_jax.theory import procedures

ATTEMPTS = 2
"""Processes that a sweep starts for a point before it reports the point as failed."""
GRACE = 60.0
"""Seconds that a point has to save its progress once it is asked to stop."""

_POLL = 0.2


class Child(NamedTuple):
    point: Point
    attempt: int
    """Of this point, counted from 1 over all sweeps."""
    process: subprocess.Popen[bytes]
    share: Share


def run(
    sweep_dir: Path,
    points: Sequence[Point],
    command: Callable[[Point], list[str]],
    shares: Sequence[Share],
    *,
    baseline: str = IDENTITY,
) -> int:
    """Runs the points that are not done, one in each share of the devices at a time; returns 1 if one failed, else 0.

    A point that fails goes to the end of the line for one more attempt; the others go on. `sweep.json`, `sweep.html`
    and the Pareto figures follow every change; what compares points is there at the end. Each point writes to `log.txt`
    in its work directory.

    SIGINT, SIGTERM and SIGHUP stop the points that run, which save their progress. The same command resumes.

    Args:
      sweep_dir: where the index, the page and the figures go.
      points: of the sweep.
      command: the command line that runs a point alone (`run_point`).
      shares: of this machine's devices.
      baseline: the transform or the point that others are compared with.

    Raises:
      KeyboardInterrupt: after SIGINT, when the points have ended.
      Preempted: likewise after SIGTERM or SIGHUP.
    """
    waiting = deque(point for point in points if not is_done(point))
    started = Counter[str]()
    running: list[Child] = []
    free = list(shares)

    def publish_all(*, compare: bool) -> tuple[Path, Beside]:
        names = {child.point.name for child in running}
        return publish(sweep_dir, points, names, baseline=baseline, compare=compare)

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
                    say(f"{child.point.name}: running{attempt}, log in {child.point.log}")
                if ended or begun:
                    publish_all(compare=False)
                show({child.point.name: _last_line(child.point.log) for child in running})
                time.sleep(_POLL)
        finally:
            _end(running, received)
    page, beside = publish_all(compare=True)
    if received:
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        raise Preempted("The points were stopped, and saved what they did.")
    _print(points)
    sweep_comparisons.show(beside)
    say(f"Pareto figure and table: {page}")
    return 0 if all(map(is_done, points)) else 1


def _start(point: Point, command: Callable[[Point], list[str]], share: Share) -> Child:
    log = point.log
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
    return Child(point, read_record(point).attempts + 1, process, share)


def _close(child: Child) -> str | None:
    """Completes the record of a point whose process ended; returns why it failed, which that process may not know."""
    record, code = read_record(child.point), child.process.returncode
    reason: str | None
    if is_done(child.point):
        reason = None
    elif code < 0:
        reason = f"It was killed by {signal.Signals(-code).name}."
    elif record.attempts == child.attempt and record.reason is not None:
        reason = record.reason
    else:
        reason = _last_line(child.point.log) or f"It ended with exit code {code}."
    note(child.point, child.attempt, reason)
    return reason


def _end(running: list[Child], received: list[int]) -> None:
    """Asks points to stop and waits for them; a second signal kills them."""
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
        if read_record(child.point).reason is not None:
            note(child.point, child.attempt, None)  # it was stopped, and has not failed
    running.clear()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals to stop, which interrupt nothing meanwhile."""
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


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _print(points: Sequence[Point]) -> None:
    rows = []
    for point in points:
        if is_done(point):
            procedure = procedures.parse(point.experiment.policy.procedure).name
            found = evaluation(point)
            cells = [found.kl, found.win_rates[procedure], found.win_rates["sampling"]]
            rows.append([point.name, *map(str, cells)])
        else:
            rows.append([point.name, "failed", "", ""])
    table("sweep", ["point", "KL, nats per response", "win rate, procedure", "win rate, sampling"], rows)
