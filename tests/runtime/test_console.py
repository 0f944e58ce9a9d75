import io

import pytest
import rich.markup
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
    console.say(rich.markup.escape(text))
    console.table("", ["response"], [[rich.markup.escape(text)]])
    printed = text_of.getvalue()
    assert printed.count(shown) == 2
    assert not any(mark in printed for mark in text if not mark.isprintable())


@pytest.mark.parametrize("text", HARMLESS)
def test_text_in_any_script_stays_as_it_is(text):
    assert console.printable(text) == text
    assert console.printable(text.replace("\n", "\r\n")) == text
