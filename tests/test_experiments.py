"""Every file of experiments/ builds what its name and its docstring promise."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands import sweep_points
from ctrl_jax.commands.experiments import find, load_experiment
from ctrl_jax.commands.point import Point
from ctrl_jax.config import Experiment
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly
from tests import assembled

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("rivals/*.py")])
JOB = re.compile(r"make ([a-z-]+) EXP=([\w/]+)")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_experiments():
    assert {"bon_helpful", "won_harmless", "smoke"} <= {path.stem for path in FILES}


def test_it_builds_under_its_own_name(path):
    experiment = load_experiment(str(path)).experiment()
    assert isinstance(experiment, Experiment)
    assert experiment.name == name(path).rpartition("/")[2]


def name(path: Path) -> str:
    """As the command line calls the experiment."""
    whole = path.parent if path.stem == "__init__" else path.with_suffix("")
    return whole.relative_to(FOLDER).as_posix()


def test_it_is_found_by_its_name(path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    found = find(name(path))
    assert (found.name, found.experiment) == (name(path), load_experiment(str(path)).experiment())


def test_its_options_build_its_algorithm(path):
    """Every field of an algorithm has a value, from an option of its name or from the training."""
    experiment = load_experiment(str(path)).experiment()
    for options in experiment.trainings.values():
        algorithm = assembly.algorithm(
            assembled.models(), make_mesh(1), options, beta=0.3, num_references=8, eos_ids=(2,)
        )
        unconstrained = algorithm.algorithm if options.floors else algorithm
        assert isinstance(unconstrained, assembly.algorithm_class(options))


def test_making_one_touches_no_device():
    """A command chooses the devices, by the options of the experiment."""
    code = """
import sys
from jax._src import xla_bridge
from ctrl_jax.commands.experiments import load_experiment

for path in sys.argv[1:]:
    module = load_experiment(path)
    module.experiment(), getattr(module, "sweep", list)()
    assert not xla_bridge.backends_are_initialized(), path
"""
    subprocess.run([sys.executable, "-c", code, *map(str, FILES)], check=True, cwd=FOLDER.parent)


def test_those_in_a_folder_are_named_where_there_is_none(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    with pytest.raises(InputError, match=r"Did you mean rivals/ipo") as caught:
        load_experiment("rivals/ip")
    assert "rivals/ipo" in str(caught.value).split("experiments/ has ")[1] and "sentiment" not in str(caught.value)


def test_its_docstring_says_what_it_claims_and_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert "Claim " in docstring
    commands = JOB.findall(docstring)
    assert ("train", name(path)) in commands
    assert {named for _, named in commands} == {name(path)}
    assert {job for job, _ in commands} <= set(command_line.COMMANDS)


def test_its_sweep_has_valid_points_of_unique_names(path, tmp_path):
    module = load_experiment(str(path))
    promised = ("sweep", name(path)) in JOB.findall(module.__doc__)
    assert hasattr(module, "sweep") == promised
    if promised:
        points = module.sweep()
        assert len(points) >= 2
        assert all(isinstance(point, Experiment) for point in points)
        assert len({point.name for point in points}) == len(points)
        if points[0].model.path is None:  # else its directory is asked for
            sweep_points.check([Point(point, tmp_path / point.name) for point in points])
        # What sweeps are for: the stages that come before the policy are made once, or once for many points.
        stages = {(point.seed, point.data, point.model, point.sft, point.reward_model) for point in points}
        assert len(stages) == 1 or 10 * len(stages) <= len(points)
