"""SIGTERM: how a cluster takes a machine back (Slurm, a spot or preemptible TPU VM, Kubernetes), some 30 s ahead."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

from ctrl_jax.runtime import hosts

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again."""

_calls = itertools.count(1)


class Preempted(BaseException):
    """SIGTERM came. Like KeyboardInterrupt no Exception: no handler of errors shall take it for one and go on."""


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within, SIGTERM raises Preempted in the main thread: files here are whole or not there at any moment."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("Stopped by SIGTERM.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM waits for a step to end. Gives a function to call after each: whether to save it and stop."""
    if hosts.several():
        yield agreed
        return
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
