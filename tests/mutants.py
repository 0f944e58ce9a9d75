"""`make mutants`: one-line faults in the package, each of which must fail a test.

tests/mutants.toml lists the faults. Each has a `name`, the snippet `old` that it replaces by `new`, and the names of
the `tests` that should notice. Both are found by their text alone: a snippet must occur exactly once in ctrl_jax/ (or
in the `file` that is named), and a test function once in tests/. So moving code between files changes nothing here, and
editing the line is an error until the list follows.

Each fault is made in a copy of the tree, in which its tests run. A fault is killed when they fail, and survives when
they pass. Everything else is an error: tests that fail without the fault, that cannot be collected, or that hang.

The list is written by hand because the faults that matter are those of the field (a baseline that includes the response
itself, a KL of swapped arguments). mutmut and cosmic-ray exchange operators and constants: thousands of faults, few of
them these, and hours of compilation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "mutants.toml"
COPIED = (
    "ctrl_jax",
    "tests",
    "experiments",
    "benchmarks",
    "docs",
    "README.md",
    "Makefile",
    "setup.cfg",
    "pyproject.toml",
)
SECONDS = 300
"""Tests of one fault that take longer hang."""

PASSED, FAILED = 0, 1
"""Exit codes of pytest; the others are errors of collection or usage."""


class MutantError(Exception):
    """A fault that cannot be judged, or tests that fail without it."""


@dataclass(frozen=True)
class Mutant:
    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Names of test functions, perhaps with the parameters of one case and the name of the file: `test_sum[2-3]`,
    `test_sums.py::test_padding`."""
    file: str = ""
    """The name of the file, where a snippet of its kind occurs in several: ctrl.py."""


def read(path: Path) -> list[Mutant]:
    with path.open("rb") as file:
        mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.load(file)["mutant"]]
    names = [mutant.name for mutant in mutants]
    if len(set(names)) < len(names):
        raise MutantError(f"{path} has two faults of one name: {sorted({n for n in names if names.count(n) > 1})}")
    return mutants


def copy(root: Path, to: Path) -> None:
    """The parts of the tree that tests read, without compiled files."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, to / name)


def apply(mutant: Mutant, tree: Path) -> Path:
    """Makes the fault in the tree's ctrl_jax; returns the file.

    Raises:
      MutantError: unless its snippet occurs exactly once.
    """
    paths = sorted((tree / "ctrl_jax").rglob(mutant.file or "*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    places = [path for path, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(places) != 1:
        where = ", ".join(str(path.relative_to(tree)) for path in places) or "no file"
        raise MutantError(f"its snippet must occur once in ctrl_jax/, and is in {where}: {mutant.old!r}")
    [path] = places
    path.write_text(texts[path].replace(mutant.old, mutant.new), encoding="utf-8")
    return path


def places(tests: Iterable[str], tree: Path) -> list[str]:
    """The ids of tests, for pytest.

    Raises:
      MutantError: unless each is defined exactly once.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((tree / "tests").rglob("test_*.py"))}
    ids = []
    for test in tests:
        file, _, name = test.rpartition("::")
        definition = f"\ndef {name.partition('[')[0]}("
        found = [path.relative_to(tree) for path, text in texts.items() for _ in range(text.count(definition))]
        found = [path for path in found if not file or path.name == file]
        if len(found) != 1:
            where = ", ".join(map(str, found)) or "no file"
            raise MutantError(f"{test} must be defined once in tests/, and is in {where}")
        ids.append(f"{found[0]}::{name}")
    return ids


def environment(tree: Path) -> dict[str, str]:
    """The environment in which `import ctrl_jax` finds the tree's, and programs are compiled once for all faults."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # No .pyc: one of a file that is changed within the same second, to the same size, would be taken for its own.
    return {**cache, **os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def check_import(tree: Path) -> None:
    """Raises MutantError unless the tree's own package is imported: faults in another would never be seen."""
    program = "import ctrl_jax; print(ctrl_jax.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env=environment(tree), capture_output=True, text=True, check=True
    ).stdout.strip()
    if Path(found).resolve() != (tree / "ctrl_jax" / "__init__.py").resolve():
        raise MutantError(f"tests in {tree} import {found}, and not the copy there")


def pytest(tree: Path, arguments: Iterable[str], *options: str, seconds: float = SECONDS) -> tuple[int, str]:
    """(exit code, the end of what it printed) of pytest in a tree.

    Raises:
      MutantError: if it takes longer than `seconds`.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *arguments]
    try:
        run = subprocess.run(
            command, cwd=tree, env=environment(tree), timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MutantError(f"its tests ran for more than {seconds:.0f} s") from None
    return run.returncode, run.stdout[-3000:]


def check_tests(root: Path, tests: Sequence[str], jobs: int) -> None:
    """Raises MutantError unless the tests pass in a copy without any fault."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(root, tree)
        check_import(tree)
        code, printed = pytest(tree, places(tests, tree), "-n", str(jobs), "--dist", "loadfile", seconds=5 * SECONDS)
        if code != PASSED:
            raise MutantError(f"without any fault, pytest ends with {code}:\n{printed}")


def survives(root: Path, mutant: Mutant) -> bool:
    """Whether the tests of a fault pass in spite of it.

    Raises:
      MutantError: if the fault cannot be made, or its tests cannot be run with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(root, tree)
        apply(mutant, tree)
        code, printed = pytest(tree, places(mutant.tests, tree), "-x")
    if code not in (PASSED, FAILED):
        raise MutantError(f"pytest ends with {code}:\n{printed}")
    return code == PASSED


def run(root: Path, mutants: Sequence[Mutant], *, jobs: int = 2) -> tuple[list[Mutant], dict[Mutant, str]]:
    """(survivors, errors) of the faults, `jobs` at a time; prints one line for each as it is judged."""
    survivors: list[Mutant] = []
    errors: dict[Mutant, str] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(survives, root, mutant): mutant for mutant in mutants}
        for done, future in enumerate(as_completed(pending), start=1):
            mutant, verdict = pending[future], "killed"
            try:
                if future.result():
                    verdict = "SURVIVES"
                    survivors.append(mutant)
            except MutantError as error:
                verdict = "ERROR"
                errors[mutant] = str(error)
            left = (time.monotonic() - started) / done * (len(mutants) - done)
            print(f"[{done:3}/{len(mutants)}] {verdict:8}  {mutant.name}  (about {left / 60:.0f} min left)", flush=True)
    return survivors, errors


def report(survivors: Sequence[Mutant], errors: dict[Mutant, str], count: int) -> int:
    """Prints what is wrong; returns the exit code."""
    for mutant in survivors:
        print(f"\nSURVIVES: {mutant.name}\n  - {mutant.old}\n  + {mutant.new}\n  pytest {' '.join(mutant.tests)}")
    for mutant, error in errors.items():
        print(f"\nERROR: {mutant.name}: {error}")
    print(f"\n{count - len(survivors) - len(errors)} of {count} faults killed.")
    return 1 if survivors or errors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="faults whose names contain one of these; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="faults judged at a time")
    options = parser.parse_args()
    try:
        mutants = [
            mutant for mutant in read(LIST) if not options.names or any(name in mutant.name for name in options.names)
        ]
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(mutants)} faults. First their {len(tests)} tests without any fault ...", flush=True)
        check_tests(ROOT, tests, options.jobs)
    except MutantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(*run(ROOT, mutants, jobs=options.jobs), len(mutants))


if __name__ == "__main__":
    sys.exit(main())
