"""The policy along its training: which steps, what is kept and measured of them, and that nothing else changes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ctrl_jax.commands import report
from ctrl_jax.config import Evaluation, Experiment, Policy
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import along
from ctrl_jax.pipeline.workspace import claimed
from ctrl_jax.runtime.loop import Update
from ctrl_jax.runtime.stages import read_arrays, write_arrays
from tests.trained import CommandLine


def experiment(**options: Any) -> Experiment:
    return Experiment("a", policy=Policy(steps=40), evaluation=Evaluation(**options))


@pytest.mark.parametrize(("points", "steps"), [(0, []), (1, [20]), (3, [10, 20, 30]), (39, list(range(1, 40)))])
def test_the_steps_are_even_and_before_the_last(points, steps):
    assert along.steps(experiment(along=points)) == steps


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match=r"Evaluation\.along is -1") as caught:
        experiment(along=-1)
    assert (caught.value.field, caught.value.value) == ("evaluation.along", -1)
    with pytest.raises(InputError, match=r"Evaluation\.along is 40, but Policy\.steps is 40; .*lower the first"):
        experiment(along=40)
    with pytest.raises(InputError, match=r"Evaluation\.along_responses is 8, but .* needs 16 responses"):
        experiment(along_responses=8)
    with pytest.raises(InputError, match=r"along_responses is 2, but Policy\.procedure is 'best_of_4'; it needs 4"):
        experiment(along_responses=2, procedures=("sampling",))


def test_without_it_every_configuration_is_what_it_was():
    assert "along" not in json.dumps(claimed(experiment(), {}))
    tree = claimed(experiment(along=2, along_responses=16), {})["evaluation"]
    assert (tree["along"], tree["along_responses"]) == (2, 16)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return SimpleNamespace(experiment=experiment(along=3), work_dir=tmp_path)


POLICY = {"params": {"w": jnp.zeros(2)}, "lora": {"a": jnp.zeros((2, 1))}}


def trained(step: int) -> dict[str, Any]:
    return {"lora": {"a": jnp.full((2, 1), float(step))}}


def measure(calls: list[tuple[str, float]]) -> Any:
    def measured(label: str, params: Any) -> tuple[np.ndarray, np.ndarray]:
        assert params["params"]["w"].shape == (2,)
        calls.append((label, float(params["lora"]["a"][0, 0])))
        return np.full((4, 5), calls[-1][1]), np.full(4, calls[-1][1] / 100)

    return measured


REFERENCE = np.ones((4, 6), np.float32)


def keep_all(run: Any) -> None:
    for step in range(1, 41):
        along.keep(run, Update(step, {}, None, at_rest=True), trained(step))
    along.keep(run, Update(20, {}, None), trained(99))  # a later step is under way: the state is no longer that one


def test_the_policies_of_the_steps_are_kept_and_measured(run):
    keep_all(run)
    assert sorted(path.name for path in (run.work_dir / "kept_along").iterdir()) == [
        "step-10.npz", "step-20.npz", "step-30.npz",
    ]  # fmt: skip
    calls: list[tuple[str, float]] = []
    found = along.measured(run, POLICY, measure(calls), beside=REFERENCE)
    assert calls == [(f"policy responses after step {step}", step) for step in (10, 20, 30)]
    np.testing.assert_array_equal(found["along_steps"], [10, 20, 30])
    np.testing.assert_array_equal(found["along_rewards"], np.array([10, 20, 30])[:, None, None] * np.ones((3, 4, 5)))
    np.testing.assert_allclose(found["along_kl"], np.array([0.1, 0.2, 0.3])[:, None] * np.ones((3, 4)))
    assert along.measured(
        SimpleNamespace(experiment=experiment(), work_dir=run.work_dir), POLICY, measure([]), beside=REFERENCE
    ) == {}  # fmt: skip


def test_a_killed_evaluation_goes_on_behind_what_it_measured(run):
    keep_all(run)
    calls: list[tuple[str, float]] = []

    def killed(label: str, params: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(calls)(label, params)

    with pytest.raises(KeyboardInterrupt):
        along.measured(run, POLICY, killed, beside=REFERENCE)
    again: list[tuple[str, float]] = []
    found = along.measured(run, POLICY, measure(again), beside=REFERENCE)
    assert [step for _, step in again] == [30] and len(found["along_steps"]) == 3
    # Beside other rewards of the reference the reward is another.
    along.measured(run, POLICY, measure(again), beside=2 * REFERENCE)
    assert [step for _, step in again] == [30, 10, 20, 30]


def test_a_damaged_one_is_left_out_and_it_says_so(run, capsys):
    keep_all(run)
    (run.work_dir / "kept_along" / "step-20.npz").write_bytes(b"PK")
    found = along.measured(run, POLICY, measure([]), beside=REFERENCE)
    np.testing.assert_array_equal(found["along_steps"], [10, 30])
    assert "The policy after step 20 is left out of the curve" in " ".join(capsys.readouterr().out.split())


def test_a_run_measures_its_way_and_is_otherwise_the_same(smoke, tmp_path):
    """Beside `train smoke`, on the same devices compiled in the same way: one rounding more and the two draw other
    responses. One policy, and what is kept is what a checkpoint has."""
    shutil.copytree(smoke.stages_dir, tmp_path / "runs" / "stages")
    command_line = CommandLine(tmp_path / "runs", smoke.command_line.cache_dir)
    options = ["--evaluation.along", "4", "--evaluation.along-responses", "8"]
    code, _, errors = command_line.run("train", *options)
    assert code == 0, errors
    work_dir = tmp_path / "runs" / "smoke,evaluation.along=4,evaluation.along_responses=8"
    ours, theirs = (read_arrays(folder / "evaluation.npz") for folder in (work_dir, smoke.work_dir))
    assert ours.keys() - theirs.keys() == {"along_steps", "along_rewards", "along_kl"}
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    mine, other = (json.loads((folder / "evaluation.json").read_text()) for folder in (work_dir, smoke.work_dir))
    points = mine.pop("along")
    assert mine.keys() == other.keys() and mine["win_rates"] == other["win_rates"]

    np.testing.assert_array_equal(ours["along_steps"], [2, 4, 6, 8])
    assert ours["along_rewards"].shape == (4, 16, 8) and ours["along_kl"].shape == (4, 16)
    reference = ours["reference_rewards"][:, None, :]
    for index, point in enumerate(points):
        rewards = ours["along_rewards"][index][:, :, None]
        won = (rewards > reference) + 0.5 * (rewards == reference)
        assert point["step"] == ours["along_steps"][index]
        assert point["win_rates"]["sampling"]["mean"] == pytest.approx(won.mean(), abs=1e-5)
        assert point["kl"]["mean"] == pytest.approx(ours["along_kl"][index].mean(), rel=1e-5)
    means = [*ours["along_kl"].mean(axis=1), ours["kl"].mean()]
    assert means[0] < 0.5 * min(means[1:]), f"it moves away from the reference: {means}"
    assert [point["step"] for point in points] == [2, 4, 6, 8]

    kept = read_arrays(work_dir / "kept_along" / "step-8.npz")
    state = ocp.StandardCheckpointer().restore((smoke.work_dir / "checkpoints" / "8" / "state").absolute())
    of_params = {name.removeprefix("params."): value for name, value in state.items() if name.startswith("params.")}
    assert kept.keys() == of_params.keys()
    for name, value in of_params.items():
        np.testing.assert_allclose(kept[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    page = report.write(work_dir).read_text()
    assert "pale dots are the policy after some steps of its training" in page
    write_arrays(work_dir / "evaluation.npz", **{**ours, "along_kl": ours["along_kl"][:, :3]})
    with pytest.raises(InputError, match=r"evaluation\.npz is missing or not what was written"):
        report.write(work_dir)
