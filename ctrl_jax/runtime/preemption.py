"""SIGTERM: how a cluster takes a machine back (Slurm, a spot or preemptible TPU VM, Kubernetes), some 30 s ahead."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again."""


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
def deferred() -> Iterator[Callable[[int], bool]]:
    """Within, SIGTERM waits for a step to end. Gives a function to call after each: whether to save it and stop.

    Several processes agree on the step: jax.distributed, which catches SIGTERM itself then, lets all stop at the same.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: came
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:  # after the last step was asked for
        os.kill(os.getpid(), signal.SIGTERM)
