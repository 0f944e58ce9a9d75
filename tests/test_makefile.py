"""The Makefile: what reaches the command, and what is refused before anything runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A program with -c is run; anything else prints its arguments.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
exec {python} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
"""


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that prints the arguments that it gets."""
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "installed").touch()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["make", f"BIN={tmp_path}", f"STAMP={tmp_path}/installed", *arguments]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MAKE") and name not in ("MFLAGS", "EXP", "ARGS")
        }
        return subprocess.run(
            command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=60
        )

    return run


ARGUMENTS = [
    ("--policy.transform exponential(5)", ["--policy.transform", "exponential(5)"]),
    ('--prompt "costs $5"', ["--prompt", "costs $5"]),
    ("--prompt 'costs $$5 `id` $(id) ${HOME} $(HOME)'", ["--prompt", "costs $$5 `id` $(id) ${HOME} $(HOME)"]),
    ("--prompt \"it's; a & b | c > d\" *", ["--prompt", "it's; a & b | c > d", "*"]),
    ("--data.path ~/x --work-dir runs/a,policy.transform=exponential(5) # not a comment",
     ["--data.path", "~/x", "--work-dir", "runs/a,policy.transform=exponential(5)", "#", "not", "a", "comment"]),
    ("--prompt 'was kostet das? 5 €, Φ'", ["--prompt", "was kostet das? 5 €, Φ"]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ARGUMENTS)
@pytest.mark.parametrize("how", ["command line", "environment"])
def test_args_reach_the_command_as_they_stand(make, text, expected, how):
    done = make("sample", f"ARGS={text}") if how == "command line" else make("sample", ARGS=text)
    assert done.returncode == 0, done.stderr
    shown, printed = done.stdout.splitlines()
    command = ["-m", "ctrl_jax", "sample", "bon_helpful", *expected]
    assert json.loads(printed) == command
    # The line that is shown does the same in a shell.
    assert shlex.split(shown)[1:] == command


@pytest.mark.parametrize("experiment", ["runs/a,policy.transform=exponential(5)", "my dir/$5's.py", "smoke", ""])
def test_exp_reaches_the_command_as_it_stands(make, experiment):
    done = make("evaluate", f"EXP={experiment}", "ARGS=--seed 1")
    assert json.loads(done.stdout.splitlines()[-1]) == ["-m", "ctrl_jax", "evaluate", experiment, "--seed", "1"]


@pytest.mark.parametrize("target", ["test", "test-slow", "chaos", "ideal", "runs", "bench-kl"])
def test_args_of_the_other_targets(make, target):
    done = make(target, "ARGS=-x 'tests/a b' -k 'x and (y)'")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[-4:] == ["-x", "tests/a b", "-k", "x and (y)"]


def test_what_the_terminal_cannot_show_reaches_the_command(make):
    done = make("sample", "ARGS=--prompt Φ", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout.splitlines()[-1])[-2:] == ["--prompt", "Φ"]


def test_an_open_quote_is_one_line(make):
    done = make("train", "ARGS=--prompt \"it's")
    assert done.returncode == 2 and done.stdout == ""
    assert "error: ARGS cannot be read: No closing quotation." in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("goals", "told"),
    [
        (["train", "baseline_identity"], "make train EXP=baseline_identity"),
        (["baseline_identity", "sweep"], "make sweep EXP=baseline_identity"),
        (["sample", "runs/bon_helpful"], "make sample EXP=runs/bon_helpful"),
        (["experiments"], "experiments is no target"),
        (["trian"], "trian is no target"),
    ],
)
def test_a_goal_that_is_no_target_is_refused_before_anything_runs(make, goals, told):
    done = make(*goals)
    assert done.returncode == 2 and done.stdout == ""
    assert told in done.stderr and "nothing was run" in done.stderr


def test_the_exit_code_is_the_commands(make, tmp_path):
    (tmp_path / "job").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "job").chmod(0o755)
    assert "Error 75" in make("train", f"JOB={tmp_path}/job").stderr


def test_whatever_has_a_line_of_help_is_a_target(make):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^TARGETS := ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\\\n", " ").split()
    assert sorted(targets) == sorted(re.findall(r"^([a-z-]+):.* ## ", text, re.MULTILINE))


def test_help_lists_every_target(make):
    shown = make().stdout
    targets = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").split("\n") if "TARGETS :=" in line)
    assert all(f"  {target} " in shown for target in targets.split()[2:-1])
