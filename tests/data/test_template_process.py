import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctrl_jax.data import template_environment, template_process
from ctrl_jax.data.chat_templates import ChatTemplate
from ctrl_jax.data.conversations import Turn
from ctrl_jax.data.template_process import ExceededError, FailedError, Limits, render
from ctrl_jax.errors import InputError
from tests.data import hostile

SMALL = Limits(cpu_seconds=0.2, wall_seconds=30.0, memory_bytes=96 * 2**20, characters=100_000)
WORDS = "{% for m in messages %}{{ m.content }};{% endfor %}"
ONE = (Turn("user", "Hi"),)
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def chat_template(source, limits=SMALL):
    return ChatTemplate(source, file=Path("given/chat_template.jinja"), controls=["<s>"], variables={}, limits=limits)


@pytest.mark.parametrize("name", hostile.EXCESSIVE)
def test_a_template_that_takes_too_much_is_refused(name):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"given/chat_template\.jinja (takes|writes|ended|fails)"):
        chat_template(WORDS + hostile.EXCESSIVE[name])
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", hostile.ODD)
def test_a_template_that_fails_in_its_own_way_is_refused_or_rendered_right(name):
    source = WORDS + hostile.ODD[name]
    try:
        pieces = chat_template(source).pieces(ONE)
    except InputError as error:
        assert "given/chat_template.jinja" in str(error)
    else:
        messages = [{"role": "user", "content": "Hi"}]
        plain = template_environment.environment().from_string(source)
        assert "".join(pieces) == plain.render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "limits", "message"),
    [
        (FOR_EVER, Limits(cpu_seconds=0.1), r"takes more than 0\.1 s of computing time on a conversation of user"),
        (FOR_EVER, Limits(wall_seconds=0.1), r"takes more than 0\.1 s on a conversation of user"),
        ("{{ 'x' * 10**6 }}", Limits(characters=1000), "writes more than 1000 characters on a conversation of user"),
        pytest.param(
            "{{ 'x' * 10**9 }}",
            Limits(memory_bytes=128 * 2**20),
            "takes more than 128 MiB of memory on a conversation of user",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit address space"),
        ),
    ],
)
def test_the_limit_is_named_with_file_and_fix(source, limits, message):
    with pytest.raises(
        InputError, match=rf"chat template of given/chat_template\.jinja {message}.* Take the template of"
    ):
        chat_template(WORDS + source, limits)


def test_what_only_some_conversations_set_off_is_refused_when_they_come():
    found = chat_template(WORDS + "{% if messages|length > 2 %}" + FOR_EVER + "{% endif %}")
    assert found.pieces(ONE) == ["Hi;"]
    with pytest.raises(InputError, match="takes more than"):
        found.pieces((*ONE, Turn("assistant", "Ho"), *ONE))
    assert found.pieces(ONE) == ["Hi;"]


def test_a_template_that_hangs_on_system_turns_is_not_taken_for_one_that_refuses_them():
    found = chat_template(WORDS + "{% if messages[0].role == 'system' %}" + FOR_EVER + "{% endif %}")
    with pytest.raises(InputError, match="takes more than"):
        found.pieces((Turn("system", "Be brief."), *ONE))


def test_the_default_limits_are_far_from_what_conversations_need():
    """A conversation of a million characters, of which no context holds a tenth, in the time of ten thousand short."""
    text = "Hello there, 漢字 🙂 " * 60_000
    found = chat_template(WORDS, Limits())
    assert found.pieces((Turn("user", text),)) == [f"{text};"]


def worker():
    (found,) = template_process._idle
    return found._process


def test_a_worker_lives_on_and_is_replaced_when_it_exceeds_a_limit_or_is_killed():
    render("a", {}, SMALL)
    first = worker()
    assert [render("{{ x }}", {"x": i}, SMALL) for i in range(3)] == ["0", "1", "2"]
    with pytest.raises(FailedError):
        render("{{ 1 // 0 }}", {}, SMALL)
    assert worker() is first
    with pytest.raises(ExceededError):
        render(FOR_EVER, {}, SMALL)
    assert first.returncode is not None, "it is reaped"
    assert render("{{ x }}", {"x": "a"}, SMALL) == "a"
    second = worker()
    assert second is not first
    second.kill()
    second.wait()
    assert render("{{ x }}", {"x": "b"}, SMALL) == "b"


def test_what_passes_through_the_pipe_is_what_was_given():
    text = "\0 \ud800 \r\n 漢字 🙂 \U0010ffff" + "x" * 300_000
    assert render("{{ x }}{{ y[0].z }}", {"x": text, "y": [{"z": None}]}, Limits()) == f"{text}None"


def test_threads_do_not_take_each_others_answers():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: render("{{ x }}" * (1 + i % 3), {"x": i}, Limits()), range(200)))
    assert found == [str(i) * (1 + i % 3) for i in range(200)]
    while len(template_process._idle) > 1:
        template_process._idle.pop().end()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="only a main thread gets signals")
def test_an_answer_that_a_signal_kept_from_being_read_is_nobody_elses(monkeypatch):
    class StoppedError(BaseException):
        pass

    def stop(*_):
        raise StoppedError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(StoppedError):
            render(FOR_EVER + "late", {}, Limits(cpu_seconds=0.5))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render("early", {}, SMALL) == "early"


def test_the_worker_imports_neither_jax_nor_numpy():
    program = (
        "import sys, json\nfrom ctrl_jax.data import template_process\n"
        "print(json.dumps([name for name in ('jax', 'numpy', 'sentencepiece') if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def parent(source):
    """A process, in a group of its own, that says its worker's id, and then renders what it is given."""
    program = (
        "import sys, threading, time\nfrom ctrl_jax.data import template_process as t\n"
        "t.render('', {}, t.DEFAULT); print(t._idle[0]._process.pid, flush=True)\n"
        "t.render(sys.argv[1], {}, t.Limits(cpu_seconds=1))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(pid):
    """Whether a process ends within ten seconds; one that nobody reaps any more has ended too."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
            if state.startswith("Z"):
                return True
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_both_processes_and_only_the_parent_says_so():
    process = parent(FOR_EVER)
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert error.count("Traceback") == 1 and "jinja2" not in error
    assert gone(pid)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_does_not_outlive_its_parent(ending):
    process = parent(FOR_EVER)
    pid = int(process.stdout.readline())
    process.send_signal(ending)
    process.communicate(timeout=20)
    assert gone(pid)
