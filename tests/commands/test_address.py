"""A run by its folder: its options come from config.json, whatever that holds."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands import address, sample
from ctrl_jax.commands.experiments import find, load_experiment
from ctrl_jax.config import Data, Experiment, Lora, Model, Policy
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline.stages import VERSIONS, versions
from ctrl_jax.pipeline.workspace import Workspace, claimed
from ctrl_jax.runtime import platform
from ctrl_jax.runtime.stages import fingerprint, plain, write_json
from tests.test_command_line import refused  # noqa: F401

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted([*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("rivals/*.py")])


def write_config(folder: Path, experiment: Experiment, **others: object) -> Path:
    write_json(folder / "config.json", {**claimed(experiment, contents={}), **others})
    return folder


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_reads_back(tmp_path, path):
    module = load_experiment(str(path))
    for experiment in [module.experiment(), *getattr(module, "sweep", list)()]:
        found = address.read_experiment(write_config(tmp_path, experiment))
        assert found == experiment and fingerprint(found) == fingerprint(experiment)


def test_values_of_every_kind_read_back(tmp_path):
    # A whole number where a float may stand stays one: keys tell 1 from 1.0.
    policy = Policy(kl_limit=float("inf"), kl_budget=1, beta=0.1, micro_batches=2)
    model = Model(path="/a", lora=Lora(rank=2, alpha=16, targets=("q_proj",)))
    experiment = Experiment("any", model=model, policy=policy, data=Data(long_prompts="truncate"))
    found = address.read_experiment(write_config(tmp_path, experiment))
    assert found == experiment and fingerprint(found) == fingerprint(experiment)


def test_what_an_older_version_did_not_write_has_its_default(tmp_path):
    tree = plain(Experiment("any", seed=3))
    del tree["policy"]["kl_limit"], tree["evaluation"], tree["data"]["long_prompts"]
    write_json(tmp_path / "config.json", tree)
    assert address.read_experiment(tmp_path) == Experiment("any", seed=3)


BAD = [None, [], {}, "x", -1, True, 10**400, 1e300, "\ud800", [[]], ["best_of_0"], "inf", "~"]


def leaves(tree, above=()):
    for name, value in tree.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from leaves(value, (*above, name))


@pytest.mark.parametrize("path", [*leaves(plain(Experiment("any")))], ids=".".join)
def test_a_changed_field_is_read_or_refused_with_its_place(tmp_path, path):
    for value in BAD:
        tree = plain(Experiment("any"))
        above = tree
        for name in path[:-1]:
            above = above[name]
        above[path[-1]] = value
        (tmp_path / "config.json").write_text(json.dumps(tree))
        try:
            address.read_experiment(tmp_path)
        except InputError as error:
            assert str(tmp_path / "config.json") in str(error)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 200_000, "cannot be read"),
        ("[]", "a list where an experiment must stand"),
        ("{}", "is not of a run"),
        ('{"model_type": "llama", "vocab_size": 32000}', "is not of a run"),
        ('{"policy": {}}', "it has no name"),
        ('{"name": "x", "policy": {"clip": 0.2}, "extra": 1}', "no extra: another one wrote it"),
        ('{"name": "x", "policy": {"clip": 0.2}}', "no policy.clip: another one wrote it"),
        ('{"name": "x", "policy": {"kl_budget": "much"}}', 'policy.kl_budget is "much", where float must stand'),
        ('{"name": "x", "policy": {"kl_budget": -1}}', "Policy.kl_budget is -1"),
        ('{"name": "x", "model": {"dtype": "int8"}}', "one of 'float32', 'bfloat16' must stand"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, told):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json") as error:
        address.read_experiment(tmp_path)
    assert told in str(error.value)
    assert f"elete {tmp_path}," not in str(error.value)


def test_stages_are_beside_the_run_or_above_the_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert address.runs_dir(Path("runs/smoke")) == Path("runs")
    assert address.runs_dir(Path("runs/a.sweep/identity_kl0.6")) == Path("runs")
    assert address.runs_dir(tmp_path / "runs" / "smoke") == Path("runs")
    assert address.runs_dir(Path("../elsewhere/smoke")) == tmp_path.parent / "elsewhere"
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.chdir(tmp_path)
    assert address.runs_dir(Path(".")) == tmp_path.parent


def test_stages_are_where_the_run_says(tmp_path, mesh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("here", "far/away"):  # beside are another run's
        (tmp_path / place / "stages").mkdir(parents=True)
    work_dir = Path("far/away/smoke")
    Workspace(Experiment("smoke"), work_dir, Path("here/stages"), mesh).claim()
    assert address.runs_dir(work_dir) == Path("here")
    # Moved alone it is no longer known, moved with its stages it is.
    (tmp_path / "here").rename(tmp_path / "there")
    assert address.runs_dir(work_dir) == Path("far/away")
    (tmp_path / "moved").mkdir()
    for place in ("there", "far"):
        (tmp_path / place).rename(tmp_path / "moved" / place.replace("there", "here"))
    assert address.runs_dir(Path("moved") / work_dir) == Path("moved/here")
    for damage in ("", "[]", '{"stages": 3}', '{"stages": "\\u0000"}', "[" * 100_000):
        (tmp_path / "moved" / work_dir / "environment.json").write_text(damage)
        assert address.runs_dir(Path("moved") / work_dir) == Path("moved/far/away")


@pytest.fixture
def run(tmp_path, refused):  # noqa: F811
    """The folder of a run of smoke, with stages beside it."""
    (tmp_path / "runs" / "stages").mkdir(parents=True)
    smoke = load_experiment("smoke").experiment()
    return write_config(tmp_path / "runs" / "my [x] run", smoke)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy.kl-budget", "0.5"], "--policy.kl-budget is 0.75 there, not 0.5. Leave them out"),
        (["--seed", "1", "--policy.transform", "exp5"],
         '--seed is 0 there, not 1, --policy.transform is "exponential(10)" there, not "exponential(5)"'),
        (["--evaluation.prompts", "8"], "--evaluation.prompts is 16 there, not 8"),
        (["--work-dir", "elsewhere"], "--work-dir is elsewhere, but"),
        (["--runs-dir", "elsewhere"], "elsewhere has no stages/. Give --runs-dir"),
        (["--policy.kl-budgt", "0.5"], "Perhaps you meant: --policy.kl-budget"),
    ],
)  # fmt: skip
def test_options_of_the_training_are_refused(refused, run, options, told):  # noqa: F811
    for job in ("sample", "evaluate", "train"):
        assert told in refused(job, str(run), *options, places=False)
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_what_is_no_run_is_refused(refused, run):  # noqa: F811
    assert "`sweep` needs the name of an experiment" in refused("sweep", str(run), places=False)
    folder = run.parent
    told = refused("sample", str(folder), places=False)
    assert f"{str(folder)!r} is a folder without config.json" in told and f"It has the runs {run}; name one" in told
    write_config(run, Experiment("smoke"), versions={**versions(Experiment("smoke")), "policy": 0})
    told = refused("sample", str(run), places=False)
    assert f"made by another version of ctrl_jax: policy 0, now {VERSIONS['policy']}" in told
    assert "this run" in refused("sample", str(write_config(run, Experiment("x"), extra=1)), places=False)


def test_an_experiment_goes_before_a_folder_of_its_name(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "smoke", Experiment("other"))
    assert find("smoke").experiment.name == "other"
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    assert find("smoke").experiment.name == "smoke"
    monkeypatch.setenv("HOME", str(run.parent))
    assert find(f"~/{run.name}").work_dir == run


def test_options_that_do_not_change_the_training_are_taken(run, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "answer", lambda run, options: seen.append((run, options)))
    monkeypatch.setattr(platform, "setup_compilation_cache", lambda directory: directory)
    arguments = ["--terminal", "--temperature", "0.5", "--devices", "1", "--prompt", "costs $5", "--data.path", "moved"]
    write_config(run, replace(find(str(run)).experiment, data=Data(source="jsonl", path="there")))
    assert command_line.main(["sample", str(run), *arguments]) == 0
    ((made, options),) = seen
    assert options.decoding.temperature == 0.5 and options.prompt == "costs $5"
    assert made.experiment.data.path == "moved" and made.experiment.policy.steps == 10
    assert made.work_dir == run and made.stages_dir == run.parent / "stages"


def test_a_plan_of_a_run_may_ask_for_other_options(run, capsys):
    arguments = ["--device-kind", "v5e", "--json", "--policy.prompts-per-step", "16"]
    assert command_line.main(["plan", str(run), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)
    assert [path.name for path in run.iterdir()] == ["config.json"]


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "200", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "ctrl_jax", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_a_finished_run_is_sampled_by_its_folder_alone(smoke):
    before = sorted(path.name for path in smoke.stages_dir.iterdir())
    files = {path: path.read_bytes() for path in smoke.work_dir.rglob("*.json*")}
    name = str(smoke.work_dir.relative_to(smoke.work_dir.parents[1]))
    cache = ["--cache-dir", str(smoke.command_line.cache_dir)]
    done = call("sample", name, "--terminal", "--devices", "1", *cache, cwd=smoke.work_dir.parents[1])
    assert done.returncode == 0, done.stderr
    assert "calibrated" in done.stdout and "▸" in done.stdout
    assert f"make sample EXP={shlex.quote(name)}" in done.stdout
    # Nothing was trained again, nor written.
    assert "reference policy" not in done.stdout and "smoke 10/10" not in done.stdout
    assert sorted(path.name for path in smoke.stages_dir.iterdir()) == before
    assert {path: path.read_bytes() for path in smoke.work_dir.rglob("*.json*")} == files
    assert "make sample EXP=" in smoke.printed
