"""The examples in docstrings of theory/ and steps/ say what comes out."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"ctrl_jax.{room}.{path.stem}"
    for room in ("theory", "steps")
    for path in (ROOT / "ctrl_jax" / room).glob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_come_out(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


def test_what_a_user_meets_first_has_an_example():
    assert {f"ctrl_jax.theory.{name}" for name in ("ideal", "optimal", "procedures", "transforms")} < set(MODULES)
    assert {f"ctrl_jax.steps.{name}" for name in ("calibration", "kl", "preference", "win_rate")} < set(MODULES)
