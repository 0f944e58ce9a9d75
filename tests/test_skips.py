"""`--forbid-skips`, with which .ci/run tests: a test that is skipped for want of something fails the run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("reason", "options", "passes"),
    [
        ("no chromium on this machine", ("--forbid-skips",), False),
        ("no chromium on this machine", ("--forbid-skips", "-n", "2"), False),
        ("no chromium on this machine", (), True),
        ("could not import 'torch': No module named 'torch'", ("--forbid-skips",), True),
    ],
)
def test_a_skip_for_a_reason_that_is_not_listed_fails_the_run(tmp_path, reason, options, passes):
    shutil.copy(TESTS / "allowed_skips.txt", tmp_path)
    # The hooks alone: the fixtures that conftest.py imports at its end are not theirs.
    hooks = (TESTS / "conftest.py").read_text().partition("from tests.")[0]
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "test_some.py").write_text(
        f'import pytest\n\n\ndef test_pass():\n    pass\n\n\ndef test_skip():\n    pytest.skip("{reason}")\n'
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed, 1 skipped" in run.stdout
    assert run.returncode == (0 if passes else 1), run.stdout
    assert (f"1 tests skipped, which --forbid-skips forbids: {reason}" in run.stdout) != passes


def test_only_ci_forbids_skips():
    lines = (TESTS.parent / ".ci" / "run").read_text().splitlines()
    assert "make test ARGS=--forbid-skips" in lines and "make test-slow ARGS=--forbid-skips" in lines
    assert "forbid-skips" not in (TESTS.parent / "Makefile").read_text()
