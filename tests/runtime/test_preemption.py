import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.preemption import Preempted
from tests.processes import Job

ROOT = Path(__file__).parents[2]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_raises_what_no_handler_of_errors_takes():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    with pytest.raises(Preempted), preemption.raising():
        try:
            terminate()
        except Exception:
            pytest.fail("taken for an error")
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


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


# Each raises the signal where its exception is lost, or turned into another, and would then go on for long.
LOST = {
    "a callback of the garbage collector": """
        import gc
        gc.callbacks.append(lambda phase, info: gc.callbacks.clear() or kill())
        gc.collect()
        """,
    "a finalizer": """
        class Dying:
            def __del__(self):
                kill()
        Dying()
        """,
    "a callback of a weak reference": """
        import weakref
        class Dying: pass
        dying = Dying()
        reference = weakref.ref(dying, lambda _: kill())
        del dying
        """,
    "a callback of ctypes": """
        import ctypes
        ctypes.CFUNCTYPE(None)(kill)()
        """,
    "a library that swallows everything": """
        try:
            kill()
        except:
            pass
        """,
    "a library that swallows it again and again": """
        def swallowing():
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    if time.monotonic() - started > 1.5:
                        raise
        started = time.monotonic()
        try:
            kill()
        except BaseException:
            pass
        swallowing()
        """,
    "a library that has an error of its own": """
        try:
            kill()
        except BaseException:
            raise ValueError("could not be read") from None
        """,
    "a group of errors": """
        try:
            kill()
        except BaseException as error:
            raise BaseExceptionGroup("tasks", [ValueError("a task"), error])
        """,
    "a callback of a compiled program": """
        import jax, numpy
        def host(x):
            kill()
            return x
        jax.jit(lambda x: jax.pure_callback(host, x, x))(numpy.float32(1)).block_until_ready()
        """,
    "an effect of a compiled program": """
        import jax, numpy
        from jax.experimental import io_callback
        def host(x):
            kill()
            return x
        jax.jit(lambda x: io_callback(host, x, x))(numpy.float32(1)).block_until_ready()
        """,
}

PROGRAM = """
import os, signal, sys, time
from ctrl_jax import __main__ as command_line
from ctrl_jax.runtime import preemption
number = getattr(signal, sys.argv[1])

def kill():
    os.kill(os.getpid(), number)

def job(arguments):
{body}
    time.sleep(60)
    return 0

command_line._run = job
preemption.run(lambda: command_line.main([]))
"""


def ended(body: str, name: str = "SIGTERM") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-c", program, name], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("place", LOST)
def test_sigterm_stops_the_run_wherever_it_arrives(place):
    run = ended(LOST[place])
    assert run.returncode == 75, run.stderr
    assert run.stderr.splitlines()[-1].startswith("Stopped by SIGTERM. The same command"), run.stderr


@pytest.mark.parametrize("place", ["a callback of the garbage collector", "a library that has an error of its own"])
def test_ctrl_c_does_so_too(place):
    run = ended(LOST[place], "SIGINT")
    assert run.returncode == 130, run.stderr
    assert run.stderr.splitlines()[-1].startswith("Interrupted. The same command"), run.stderr


def test_a_second_ctrl_c_ends_at_once_what_does_not_end():
    run = ended(
        """
        try:
            kill()
        finally:
            kill()
            time.sleep(60)
        """,
        "SIGINT",
    )
    assert run.returncode == 130
    assert "Interrupted twice" in run.stderr


def test_a_signal_leaves_a_finally_its_time_and_a_second_sigterm_too():
    run = ended(
        """
        try:
            kill()
        finally:
            kill()
            time.sleep(1.5)
            print("closed", flush=True)
        """
    )
    assert run.returncode == 75
    assert run.stdout == "closed\n"


def test_a_finally_that_does_not_end_is_interrupted():
    run = ended(
        """
        preemption.CLEANUP_SECONDS = 1.5
        try:
            kill()
        finally:
            time.sleep(60)
        """
    )
    assert run.returncode == 75


def test_a_job_that_is_done_ends_with_its_own_code():
    """In the last moment the exception is lost, as in a finalizer; and at the interpreter's own end."""
    run = ended(
        """
        import atexit
        atexit.register(kill)
        try:
            kill()
        except BaseException:
            return 0
        """
    )
    assert run.returncode == 0, run.stderr
    run = ended("import atexit\natexit.register(kill)\nraise preemption.Preempted('Stopped.')")
    assert run.returncode == 75, run.stderr


EARLY = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "ctrl_jax.config":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
runpy.run_module("ctrl_jax", run_name="__main__")
"""


def test_a_signal_before_the_job_has_its_code():
    """While the command line imports its libraries, which takes a second: nothing is begun."""
    run = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 75, run.stderr


def test_what_a_swallowed_signal_may_have_changed_is_not_kept():
    with pytest.raises(Preempted), preemption.raising():
        preemption.check()
        try:
            terminate()
        except BaseException:
            reward = 0.0
        assert preemption.came()
        preemption.check()
        pytest.fail(f"{reward} was kept")
    assert not preemption.came()
    preemption.check()


def test_a_signal_that_was_answered_is_over():
    with preemption.raising():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        preemption.answered()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        preemption.check()


def test_no_step_is_begun_after_a_swallowed_sigterm():
    with pytest.raises(Preempted), preemption.raising():
        with contextlib.suppress(BaseException):
            terminate()
        with preemption.deferred():
            pytest.fail("a step was begun")


def test_who_takes_the_signals_over_gets_a_swallowed_one_once(monkeypatch):
    """As a sweep does, for which a second one ends the patience."""
    monkeypatch.setattr(preemption, "AGAIN_SECONDS", 0.05)
    received = []
    with preemption.raising():
        with contextlib.suppress(BaseException):
            terminate()
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            time.sleep(0.01)
    assert received == [signal.SIGTERM]


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
