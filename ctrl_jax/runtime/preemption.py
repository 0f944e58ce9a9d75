"""The signals to stop. SIGTERM is how a cluster takes a machine back (Slurm, a spot or preemptible TPU VM, Kubernetes),
some 30 s ahead; SIGINT is Ctrl-C."""

import atexit
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from jax.experimental import multihost_utils

from ctrl_jax.errors import causes
from ctrl_jax.runtime import hosts

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as of a shell."""

AGAIN_SECONDS = 1.0
"""How soon a signal that something swallowed stops the run again, and how often."""
CLEANUP_SECONDS = 20.0
"""How long `finally` and `with` blocks may take on the way out before they are interrupted too."""

_calls = itertools.count(1)
_came: list[int] = []
"""The signals that have come within `raising`, in order. Only its handlers write it."""
_patience_ends = 0.0


class Preempted(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no Exception: a handler of errors must not take it for one."""


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within, SIGTERM raises Preempted and Ctrl-C KeyboardInterrupt, in the main thread. Files are whole at any moment.

    One raise is not enough. Python drops an exception that a finalizer or a callback of the garbage collector raises;
    a library may swallow it, or wrap it in an error of its own. So the signal is noted as well, and

    - it raises again each second until the block ends, unless the exception is on its way up;
    - `check` raises it where a result must not be kept;
    - whatever error ends the block after a signal, the block ends with that signal's exception.

    A block that returns has done its work, even if a signal came. A second Ctrl-C ends the process at once.
    """
    handlers = {signal.SIGTERM: _stop, signal.SIGINT: _stop, signal.SIGALRM: _again}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # nohup, or a script's background
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except BaseException as error:
        if _came and not isinstance(error, Preempted | KeyboardInterrupt):
            raise _stopped() from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _came.clear()


def _stop(number: int, frame: FrameType | None) -> None:
    global _patience_ends
    if number == signal.SIGINT and number in _came:
        os.write(2, b"\nInterrupted twice: ended at once.\n")
        os._exit(INTERRUPTED)
    first = not _came
    _came.append(number)
    if first:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        _patience_ends = time.monotonic() + CLEANUP_SECONDS
        raise _stopped()
    _again(number, frame)  # Slurm sends SIGTERM twice


def _again(number: int, frame: FrameType | None) -> None:
    if not _came:  # another's alarm
        return
    on_its_way = any(isinstance(error, Preempted | KeyboardInterrupt) for error in causes(sys.exception()))
    if on_its_way and time.monotonic() < _patience_ends:
        return
    handler = signal.getsignal(_came[0])
    if handler is not _stop and callable(handler):  # a sweep has taken over, and notes what comes
        signal.setitimer(signal.ITIMER_REAL, 0)
        handler(_came[0], frame)
        return
    raise _stopped()


def _stopped() -> BaseException:
    return KeyboardInterrupt() if _came[0] == signal.SIGINT else Preempted("Stopped by SIGTERM.")


def came() -> bool:
    """Whether a signal to stop has come, though its exception may have been lost."""
    return bool(_came)


def check() -> None:
    """Stops a run whose signal was swallowed, before it keeps a result that the signal may have changed.

    A user's reward function that catches everything returns something, but not what it would have.

    Raises:
      Preempted: after SIGTERM.
      KeyboardInterrupt: after Ctrl-C.
    """
    if _came:
        raise _stopped()


def answered() -> None:
    """Forgets the signals: the caller has caught one, and ends its work as it was asked to."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    _came.clear()


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code that `main` returns.

    Signals count from here on. Before `main` handles them, nothing was begun, and the code is that of the signal; once
    `main` has returned, its code stands: a signal only cuts the interpreter's own end short.
    """
    code: int | None = None
    codes = {signal.SIGTERM: EXIT_CODE, signal.SIGINT: INTERRUPTED}

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(codes[signal.Signals(number)] if code is None else code)

    for number in codes:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    # Python's last act but a few is to take its handlers away.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    try:
        code = main()
    except Exception:
        code = 1
        raise
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
    sys.exit(code)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM waits for a step to end. Gives a function to call after each: whether to save it and stop.

    Raises:
      Preempted: if SIGTERM came before and was swallowed; or if it came after the last step was asked for.
    """
    if hosts.several():
        yield agreed
        return
    check()
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:  # after the last step was asked for
        os.kill(os.getpid(), signal.SIGTERM)


def agreed() -> bool:
    """Whether SIGTERM came to one of several processes: all learn of it in the same call, and have to make the same.

    jax.distributed catches SIGTERM there. It then takes the highest number that a process has passed, adds one, waits
    for that very number, and chooses no other: so calls are counted through all trainings and stages, which number
    their own steps from where each of them starts.
    """
    return hosts.several() and multihost_utils.reached_preemption_sync_point(next(_calls))


def stop_together() -> None:
    """To be called by every process between pieces of work that are kept, where `raising` cannot reach several.

    Raises:
      Preempted: on all of them, if SIGTERM came to one.
    """
    if agreed():
        raise Preempted("Stopped by SIGTERM.")
