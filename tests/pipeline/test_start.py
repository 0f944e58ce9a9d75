"""A policy that learns from stored responses, or goes on from one that did: the whole path, with fake trainings."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctrl_jax.commands.address import read_experiment
from ctrl_jax.config import Policy, Regression
from ctrl_jax.pipeline import assembly, start
from ctrl_jax.runtime.stages import read_json
from tests.pipeline.fakes import EXPERIMENTS, train, value, write_inputs

ALONE = replace(
    EXPERIMENTS["start"],
    start=None,
    policy=Regression(steps=4, prompts_per_step=4, samples_per_prompt=4, warmup_steps=1, procedure="best_of_2"),
)


@pytest.fixture
def begun(fakes, tmp_path, monkeypatch):
    """By label, the parameters that trainings began with; in a folder of inputs."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    found, trained = {}, fakes.trained

    def recorded(label, state, *others):
        found[label] = state.params
        return trained(label, state, *others)

    fakes.trained = recorded
    return found


def test_the_policy_goes_on_from_its_start(fakes, begun):
    experiment = EXPERIMENTS["start"]
    train(fakes, experiment)
    assert fakes.made == ["start", "policy"]
    (folder,) = Path("runs/stages").glob("start-*")
    number = read_json(folder / "checkpoints" / "1" / "state.json")["value"]
    assert begun["run"] == {"w": np.array([number], np.uint32)}
    evaluation = read_json(Path("runs/work/evaluation.json"))
    assert evaluation["timings"]["start"] == 1.0
    assert list(evaluation["timings"])[:3] == ["sft", "reward_model", "calibrate"]
    assert read_experiment(Path("runs/work")) == experiment, "with the class of its start"

    train(fakes, replace(experiment, policy=replace(experiment.policy, steps=5)), "runs/other")
    assert fakes.made == ["policy"], "experiments share a start"
    again = begun[start.LABEL]
    train(fakes, replace(experiment, start=None), "runs/without")
    assert fakes.made == ["policy"] and value(begun["run"]) == value(again), "the reference, where a start begins too"


def test_a_whole_training_may_learn_from_stored_responses(fakes, begun):
    train(fakes, ALONE)
    assert fakes.made == ["policy"]
    assert (read_experiment(Path("runs/work")), type(ALONE.policy)) == (ALONE, Regression)
    train(fakes, ALONE)
    assert fakes.made == []


def test_responses_of_two_contents_are_two_inputs(fakes, begun, monkeypatch):
    """Log-probs alone differ: of these the table knows nothing."""
    train(fakes, ALONE)
    train(fakes, replace(ALONE, policy=Policy(steps=4, prompts_per_step=4, warmup_steps=1)), "runs/ctrl")
    for folder in [*Path("runs/stages").glob("calibration-*"), *Path("runs").glob("*/results.json")]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    other = assembly.log_probs()
    monkeypatch.setattr(assembly, "log_probs", lambda *_, **__: lambda *batch: 2 * other(*batch))
    train(fakes, ALONE)
    assert fakes.made == ["policy"]
    train(fakes, replace(ALONE, policy=Policy(steps=4, prompts_per_step=4, warmup_steps=1)), "runs/ctrl")
    assert fakes.made == [], "CTRL learns from the table"


def test_what_needs_no_responses_is_not_disturbed_by_them(fakes, begun):
    """The option may be turned on in a work directory, and off; the stage that has them serves both."""
    without = replace(ALONE, policy=Policy(steps=4, prompts_per_step=4, warmup_steps=1))
    plain = replace(without, calibration=replace(without.calibration, keep_responses=False))
    train(fakes, plain)
    for experiment in (without, plain):
        Path("runs/work/results.json").unlink()  # else nothing is looked at
        train(fakes, experiment)
        assert fakes.made == []
    (folder,) = Path("runs/stages").glob("calibration-*")
    assert (folder / "responses.npy").exists() and (folder / "superseded-1" / "rewards.npy").exists()
