import os
import signal

import pytest

from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.preemption import Preempted
from tests.processes import Job


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_raises_what_no_handler_of_errors_takes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), preemption.raising():
        try:
            terminate()
        except Exception:
            pytest.fail("taken for an error")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_ends_before_sigterm_is_told():
    with preemption.raising(), pytest.raises(Preempted):
        with preemption.deferred() as came:
            assert not came()
            terminate()
            assert came()
            raise Preempted("saved")
        pytest.fail("it went on")


def test_sigterm_after_the_last_step_is_not_lost():
    done = []
    with pytest.raises(Preempted), preemption.raising():
        with preemption.deferred():
            terminate()
            done.append("the last save")
        pytest.fail("it went on")
    assert done


ALONE = """
import os, signal, sys, time
from ctrl_jax.runtime import hosts, preemption
try:
    with preemption.raising():
        hosts.start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
except preemption.Preempted:
    sys.exit(75)
"""


def test_a_process_that_joins_no_others_stops_at_once():
    """As the one host of a small TPU, with --distributed."""
    assert [ended.code for ended in Job(ALONE, 1).wait(60)] == [75]
