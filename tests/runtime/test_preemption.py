import os
import signal

import pytest

from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.preemption import Preempted


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
            assert not came(1)
            terminate()
            assert came(2)
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
