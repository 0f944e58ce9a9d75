import json

import pytest

from ctrl_jax.config import Experiment, Policy
from ctrl_jax.errors import InputError
from ctrl_jax.jobs import run as run_module
from ctrl_jax.jobs.run import Run


def test_what_older_code_left_is_not_taken_for_its_own(tmp_path, mesh, monkeypatch):
    run = Run(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh)
    run.claim()
    run.claim()
    stage = run.stage("sft", corpus="c")
    monkeypatch.setitem(run_module.VERSIONS, "sft", 99)
    assert run.stage("sft", corpus="c").directory != stage.directory
    with pytest.raises(InputError, match=r"versions\.sft: 1 → 99"):
        run.claim()


def test_the_environment_is_that_of_the_first_claim(tmp_path, mesh):
    run = Run(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh)
    run.claim()
    path = tmp_path / "work" / "environment.json"
    first = json.loads(path.read_text())
    path.write_text(json.dumps(first | {"command": ["another"]}))
    run.claim()
    assert json.loads(path.read_text())["command"] == ["another"]


def test_wandb_that_is_not_installed_is_told_at_once(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make setup EXTRA=wandb"):
        Run(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh, wandb=True)


def test_a_batch_that_does_not_divide_is_told_at_once(tmp_path, mesh):
    experiment = Experiment("example", policy=Policy(prompts_per_step=12))
    with pytest.raises(InputError, match=r"--policy.prompts-per-step is 12.*8 devices. Make it 8 or 16"):
        Run(experiment, tmp_path / "work", tmp_path / "stages", mesh)
