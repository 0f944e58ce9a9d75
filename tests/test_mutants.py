"""`make mutants` sees what it should: a fault that no test notices, and a list that has lost its place."""

import sys

import pytest

from tests import mutants
from tests.mutants import Mutant, MutantError

SUMS = "def plus(x):\n    return x + 1\n\n\ndef twice(x):\n    return 2 * x\n"
SEEN = Mutant("seen", "return x + 1", "return x + 2", ("test_plus",))
UNSEEN = Mutant("unseen", "return 2 * x", "return 3 * x", ("test_plus",))


@pytest.fixture
def tree(tmp_path):
    """A package ctrl_jax of two functions, of which one has a test."""
    (tmp_path / "ctrl_jax").mkdir()
    (tmp_path / "ctrl_jax" / "__init__.py").touch()
    (tmp_path / "ctrl_jax" / "sums.py").write_text(
        "def plus(x):\n    return x + 1\n\n\ndef twice(x):\n    return 2 * x\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_sum.py").write_text(
        "from ctrl_jax import sums\n\n\ndef test_plus():\n    assert sums.plus(1) == 2\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    return tmp_path


def test_a_fault_that_no_test_notices_is_reported(tree, capsys):
    mutants.check_tests(tree, SEEN.tests, jobs=1)
    survivors, errors = mutants.run(tree, [SEEN, UNSEEN])
    assert (survivors, errors) == ([UNSEEN], {})
    assert mutants.report(survivors, errors, 2) == 1
    printed = capsys.readouterr().out
    assert "SURVIVES: unseen" in printed and "1 of 2 faults killed" in printed
    assert mutants.report([], {}, 1) == 0
    assert "x + 1" in (tree / "ctrl_jax" / "sums.py").read_text(), "faults are made in copies alone"


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (Mutant("gone", "return x + 7", "", SEEN.tests), "is in no file"),
        (Mutant("twice", "return", "", SEEN.tests), "is in ctrl_jax/sums.py, ctrl_jax/sums.py"),
        (Mutant("broken", "return x + 1", "return (", SEEN.tests), "pytest ends with 4"),
        (
            Mutant("untested", "return x + 1", "return x", ("test_nowhere",)),
            "test_nowhere must be defined once in tests/, and is in no file",
        ),
    ],
)
def test_what_cannot_be_judged_is_an_error(tree, mutant, message):
    survivors, errors = mutants.run(tree, [mutant])
    assert survivors == [] and message in errors[mutant]
    assert mutants.report(survivors, errors, 1) == 1


def test_tests_that_hang_are_an_error(tree):
    (tree / "tests" / "test_sum.py").write_text("import time\n\n\ndef test_sleep():\n    time.sleep(60)\n")
    with pytest.raises(MutantError, match="more than 1 s"):
        mutants.pytest(tree, ["tests/test_sum.py"], seconds=1)


def test_tests_that_fail_without_a_fault_are_an_error(tree):
    (tree / "tests" / "test_sum.py").write_text("\ndef test_plus():\n    assert False\n")
    with pytest.raises(MutantError, match="without any fault, pytest ends with 1"):
        mutants.check_tests(tree, SEEN.tests, jobs=1)


def test_the_copy_is_what_is_imported(tree, monkeypatch):
    mutants.check_import(tree)
    monkeypatch.setattr(mutants, "environment", lambda tree: {"PYTHONPATH": str(mutants.ROOT)})
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(MutantError, match="and not the copy there"):
        mutants.check_import(elsewhere)


def test_every_fault_of_the_list_has_its_place():
    listed = mutants.read(mutants.LIST)
    assert len(listed) >= 50
    mutants.places({test for mutant in listed for test in mutant.tests}, mutants.ROOT)
    lost = {}
    for mutant in listed:
        paths = (mutants.ROOT / "ctrl_jax").rglob(mutant.file or "*.py")
        texts = [text for path in paths if mutant.old in (text := path.read_text(encoding="utf-8"))]
        if sum(text.count(mutant.old) for text in texts) != 1:
            lost[mutant.name] = mutant.old
            continue
        try:
            compile(texts[0].replace(mutant.old, mutant.new), mutant.name, "exec")
        except SyntaxError as error:
            pytest.fail(f"{mutant.name}: {mutant.new!r} is no Python: {error}")
    assert lost == {}, "edit `old` in tests/mutants.toml with the line that it names"


def test_the_list_is_checked(tmp_path, monkeypatch, capsys):
    entry = '[[mutant]]\nname = "a"\nold = "x"\nnew = "y"\ntests = []\n'
    path = tmp_path / "mutants.toml"
    path.write_text(entry * 2)
    with pytest.raises(MutantError, match=r"two faults of one name: \['a'\]"):
        mutants.read(path)
    monkeypatch.setattr(mutants, "LIST", path)
    monkeypatch.setattr(sys, "argv", ["mutants"])
    assert mutants.main() == 1
    assert "two faults" in capsys.readouterr().err
