import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from ctrl_jax.runtime import console


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(monkeypatch):
    """Replaces rich's console, with a terminal or without, and returns what was printed."""

    def replace(*, terminal):
        text = io.StringIO()
        fake = Console(file=text, force_terminal=terminal, width=120, color_system=None)
        monkeypatch.setattr(console, "get_console", lambda: fake)
        return text

    return replace


def test_a_log_gets_a_line_every_ten_seconds_and_the_last_one(screen, clock):
    text = screen(terminal=False)
    with console.progress("train", 40, start=4) as bar:
        for step in range(5, 41):
            bar.update(step, {"kl": step / 100, "win_rate": 0.812345})
            clock[0] += 2.0
    lines = text.getvalue().splitlines()
    assert lines[0] == "train 5/40  kl 0.05  win_rate 0.8123"
    # Two seconds a step: ten are five steps, and after step 10 there are thirty to go.
    assert lines[1] == "train 10/40  ETA 0:01:00  kl 0.1  win_rate 0.8123"
    assert lines[-1] == "train 40/40  ETA 0:00:00  kl 0.4  win_rate 0.8123"
    assert len(lines) == 8


def test_long_lines_of_a_log_are_not_wrapped(screen):
    text = screen(terminal=False)
    with console.progress("train", 1) as bar:
        bar.update(1, {f"metric_{index}": 0.125 for index in range(30)})
    console.say("word " * 60)
    assert len(text.getvalue().splitlines()) == 2


def test_a_terminal_gets_a_bar_with_metrics(screen, clock):
    text = screen(terminal=True)
    with console.progress("train", 10) as bar:
        bar.update(1)
        clock[0] += 3.0
        bar.update(4, {"kl": 0.25})
    assert "4/10" in text.getvalue() and "kl 0.25" in text.getvalue() and "ETA 0:00:06" in text.getvalue()


def test_a_failing_job_is_not_hidden_by_its_bar(screen):
    screen(terminal=True)
    with pytest.raises(KeyError, match="the job"), console.progress("train", 10) as bar:
        bar.update(1)
        raise KeyError("the job")


def test_tables_show_floats_with_four_digits(screen):
    text = screen(terminal=False)
    console.table("Win rates", ["procedure", "mean", "n"], [["best_of_4", 0.8123456, 256], ["sampling", 0.5, 3]])
    printed = text.getvalue()
    assert "Win rates" in printed and "0.8123 " in printed and "0.81234" not in printed and "256" in printed


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_nothing(screen, terminal):
    text = screen(terminal=terminal)
    console.be_quiet()
    console.say("hello")
    console.table("t", ["a"], [[1.0]])
    with console.progress("train", 2) as bar:
        bar.update(2, {"kl": 1.0})
    assert text.getvalue() == ""


HOSTILE = {
    "\x1b]0;title\x07\x1b[2J": r"\x1b]0;title\x07\x1b[2J",  # sets the title, clears the screen
    "\x9b31m": r"\x9b31m",  # C1: an escape sequence of one byte
    "100 €\r1": r"100 €\r1",  # overwrites the line
    "a\bb\x7f\x00": r"a\x08b\x7f\x00",
    "user\u202etxt.exe\u2066": r"user\u202etxt.exe\u2066",  # shown from right to left
    "half \ud83d of one": r"half \ud83d of one",
    "line\u2028\u2029": r"line\u2028\u2029",
}
HARMLESS = ["tab\tand\nline", "é ü 中文 עברית 👩‍👩‍👧 \u200c\u00a0", "C:\\x1b", "[bold]"]


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_what_a_terminal_would_obey_is_spelled_out(screen, text, shown):
    assert console.printable(text) == shown
    text_of = screen(terminal=True)
    console.say(text)
    console.table("", ["response"], [[text]])
    printed = text_of.getvalue()
    assert printed.count(shown) == 2
    assert not any(mark in printed for mark in text if not mark.isprintable())


@pytest.mark.parametrize("text", HARMLESS)
def test_text_in_any_script_stays_as_it_is(text):
    assert console.printable(text) == text
    assert console.printable(text.replace("\n", "\r\n")) == text


NAMES = ["runs/a[x]b", "a[/red]b", "[bold]", "a\\[b]", "x:warning:y", "[link=https://example.org]z[/link]"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_literal(screen, terminal, name):
    text = screen(terminal=terminal)
    console.say(name)
    console.say(name, style="yellow")
    console.table(name, [name], [[name]])
    with console.progress(name, 1) as bar:
        bar.update(1, {name: 1.0})
    # Without the codes that move a terminal's cursor.
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).count(name) >= 7


def test_a_style_colours_the_whole_line(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(
        console, "get_console", lambda: Console(file=text, force_terminal=True, color_system="standard")
    )
    console.say("7 points at [x]", style="yellow")
    assert text.getvalue() == "\x1b[33m7 points at [x]\x1b[0m\n"


PRINTED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ctrl_jax.config import Experiment
from ctrl_jax.commands import summary
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.runtime import console

interval = {"mean": 0.7, "low": 0.6, "high": 0.8}
names = ("sampling", "best_of_4")
evaluation = {
    "kl": interval, "kl_budget": 0.75, "ties": 0.0, "reward_model": {"accuracy": 0.9, "ece": 0.1},
    "win_rates": dict.fromkeys(names, interval), "gold_win_rates": dict.fromkeys(names, interval),
    "ideal": dict.fromkeys(names, {"transform": 0.75}),
}
console.print_anything()
run = SimpleNamespace(experiment=Experiment("Ελπίς"), work_dir=Path("runs/Ελπίς"))
evaluation = Evaluation.from_json(evaluation, source="", remedy="")
summary.print_run(run, evaluation, Path("runs/Ελπίς/report/index.html"))
console.say("Φ β → × ▸ … − ≥ 漢")
print("Φ is refused", file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_a_summary_prints_on_any_terminal(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PRINTED], env=environment, capture_output=True)
    printed, errors = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, errors
    if encoding == "utf-8":
        assert "Φ = exponential(10)" in printed and "Φ β → × ▸ … − ≥ 漢" in printed and "Φ is refused" in errors
    else:
        assert "Phi = exponential(10)" in printed and "Phi beta -> " in printed and "Phi is refused" in errors
        assert "\\u6f22" in printed and "Report: runs/\\u0395" in printed
