"""The package as it is built and installed: the command `ctrl-jax` in a folder that has nothing of the checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import names

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of this checkout unpacks to."""
    tree, built, folder = (tmp_path_factory.mktemp(name) for name in ("tree", "built", "installed"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("ctrl_jax", "experiments"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(built), str(tree)]
    found = subprocess.run(build, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ctrl-jax` with the package at `installed`, in a folder."""
    (script,) = re.findall(r"^ctrl-jax = (\S+)$", next(installed.glob("*/entry_points.txt")).read_text(), re.M)
    module, _, function = script.partition(":")
    # As the script of an installation: its own folder, and not the current one, comes first on the path.
    code = f"import sys; sys.path.remove(''); from {module} import {function}; {function}()"
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": "", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_every_package_of_the_checkout_is_listed():
    def packages(folder: str, below: str = "") -> set[str]:
        files = (ROOT / folder).rglob("*.py")
        return {below + str(file.parent.relative_to(ROOT)).replace(os.sep, ".") for file in files}

    listed = SETUP["options"]["packages"].split()
    assert set(listed) == packages("ctrl_jax") | packages("experiments", "ctrl_jax.shipped.")


def test_it_has_all_experiments_and_what_they_name(installed, tmp_path):
    version = run(installed, tmp_path, "--version")
    assert (version.returncode, version.stderr) == (0, "")
    wrong = run(installed, tmp_path, "train", "bon_helpfull")
    assert wrong.returncode == 2
    assert f"Did you mean bon_helpful or bon_helpful_hh? experiments/ has {', '.join(names())}." in wrong.stderr
    # An experiment that imports another, and a reward that was shipped with it.
    shown = run(installed, tmp_path, "train", "constrained_helpful", "--help")
    assert shown.returncode == 0 and "(default: experiments.rewards.brevity:words)" in " ".join(shown.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_of_ones_own_comes_first_and_may_import_those(installed, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "shared.py").write_text("BUDGET = 0.125\n")
    (tmp_path / "experiments" / "bon_helpful.py").write_text(
        '"""Mine."""\nfrom dataclasses import replace\nfrom experiments import shared, smoke\n\n'
        "def experiment():\n    small = smoke.experiment()\n"
        "    return replace(small, policy=replace(small.policy, transform='raw', kl_budget=shared.BUDGET))\n"
    )
    shown = run(installed, tmp_path, "train", "bon_helpful", "--help")
    assert shown.returncode == 0, shown.stderr
    assert all(text in shown.stdout for text in ("Mine.", "(default: raw)", "(default: 0.125)"))


@pytest.mark.slow
def test_it_trains_in_an_empty_folder(installed, tmp_path):
    found = run(installed, tmp_path, "train", "smoke", "--combine.rewards", "experiments.rewards.brevity:words")
    assert found.returncode == 0, found.stderr
    (report,) = tmp_path.glob("runs/smoke*/report/index.html")
    assert str(report.relative_to(tmp_path)) in found.stdout
    again = run(installed, tmp_path, "evaluate", str(report.parents[1].relative_to(tmp_path)))
    assert again.returncode == 0, again.stderr


def test_what_is_locked_is_allowed_and_whole():
    locked = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([\w.-]+)==(\S+)", line):
            locked.setdefault(found[1].lower().replace("_", "-"), set()).add(found[2])
    wanted = SETUP["options"]["install_requires"] + SETUP["options.extras_require"]["dev"]
    for line in wanted.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            versions = locked[requirement.name.lower().replace("_", "-")]
            assert all(requirement.specifier.contains(version) for version in versions), line


def test_bash_completes_jobs_experiments_and_options(installed, tmp_path):
    script = run(installed, tmp_path, "--completion").stdout
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "my_own.py").touch()
    for line, expected in {
        "ctrl-jax tr": "train",
        "ctrl-jax train bon_su": "bon_summarize",
        "ctrl-jax train bon_helpful --policy.kl-b": "--policy.kl-budget",
        "ctrl-jax train my_o": "my_own",
    }.items():
        words = line.split(" ")
        asked = (
            f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _ctrl_jax; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=tmp_path)
        assert found.stdout.split() == [expected], found.stderr


def test_help_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, "-m", "ctrl_jax", "train", "bon_helpful", "--help"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 128 + 13


def test_no_job_is_left_out_of_the_completion():
    from ctrl_jax.commands import completion

    found = completion.script(command_line.COMMANDS)
    assert f'"{" ".join(command_line.COMMANDS)}"' in found and f'"{" ".join(names())} $own"' in found
