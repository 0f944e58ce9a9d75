"""A contender in a process of its own, which computes when it is asked to.

    python -m benchmarks.worker MODULE JSON

`bench.py` writes a line to its standard input for each repetition, and it answers on its standard output with a line of
JSON: {"warm_up_seconds": ..., "log_prob": ...} when it is loaded and warm, {"seconds": ..., "peak_bytes": ...} for a
repetition, {"error": ...} when it cannot go on. What libraries print goes to standard error.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

WARM_UP = 1
"""Repetitions that nobody sees: they compile, and fill caches."""


class Turn:
    """The boundary between two repetitions: called by a contender before its first, and after each.

    A library's own training loop calls it from a callback, which is why it is not a loop itself.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._loading = time.perf_counter()
        self._started = 0.0
        self._turns = 0
        self.peak_bytes: Callable[[], int] = peak_resident_bytes
        """The most memory that was held: of the process, or of its GPU."""
        self.log_prob: float | None = None
        """Nats a token of the first prompt's tokens after its first: tells whether the model is the same."""

    def __call__(self) -> None:
        """Ends the repetition that runs, and returns when the next is asked for."""
        ended = time.perf_counter()
        if self._turns == WARM_UP:
            self.answer(warm_up_seconds=ended - self._loading, log_prob=self.log_prob)
        if self._turns > WARM_UP:
            self.answer(seconds=ended - self._started, peak_bytes=self.peak_bytes())
        if self._turns >= WARM_UP:
            if memory_is_short():
                _return_memory()
            if not sys.stdin.readline():
                # From any thread and any depth of a library's loop.
                os._exit(0)
        self._turns += 1
        self._started = time.perf_counter()

    def answer(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def peak_resident_bytes() -> int:
    """The most resident memory of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage's on Linux: that starts at what the parent held when it started this process.
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def memory_is_short() -> bool:
    """Whether less than half of the machine's memory is free for the contenders that compute next."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return True
    found = {
        name: int(rest.split()[0])
        for name, rest in (line.split(":") for line in path.read_text(encoding="utf-8").splitlines())
    }
    return found["MemAvailable"] < found["MemTotal"] / 2


def _return_memory() -> None:
    """Gives freed memory back to the system, so that contenders fit beside each other while they wait.

    Only where they have to: getting it again is time that nobody would spend who runs one library alone.
    """
    # glibc alone has it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    turn = Turn()
    module, arguments = sys.argv[1:]
    given = json.loads(arguments)
    try:
        contender = importlib.import_module(f"benchmarks.contenders.{module}")
        contender.run(Case(**given["case"]), Path(given["folder"]), turn, **given["options"])
    except ImportError as error:
        turn.answer(error=f"not installed: {error}")
    except Exception as error:
        turn.answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise


if __name__ == "__main__":
    main()
