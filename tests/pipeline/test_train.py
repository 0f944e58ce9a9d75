"""The whole path of `train smoke`: what it leaves behind, and that it never does anything twice."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ctrl_jax.runtime.stages import read_arrays
from tests.chaos import assert_same_pipeline, assert_same_run, chaos
from tests.trained import CommandLine

PROCEDURES = {"sampling", "best_of_2", "best_of_4", "worst_of_4"}


def parsed(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file; not of the locks, which name who holds them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times(folder: Path) -> dict[str, int]:
    """When each file was last written; not the locks, which are held and let go."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_the_work_directory_has_every_promised_file(smoke):
    work_dir = smoke.work_dir
    assert parsed(work_dir / "config.json")["policy"]["kl_budget"] == 0.75
    assert parsed(work_dir / "environment.json")["packages"]["jax"] == jax.__version__
    assert list((work_dir / "tensorboard").glob("events.out.tfevents.*"))
    steps = {int(path.name) for path in (work_dir / "checkpoints").iterdir()}
    assert steps >= {8, 10} and len(steps) <= 3, "the last two and the best"
    page = (work_dir / "report" / "index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "<svg" in page
    assert not list(work_dir.rglob("*.tmp"))


def test_metrics_have_a_row_for_every_step(smoke):
    metrics = rows(smoke.work_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 11))
    names = {"loss", "kl", "kl_k1", "kl_k2", "kl_k3", "beta", "raw_reward", "calibrated_reward", "transformed_reward"}
    assert names | {"win_rate", "sampler_scorer_gap", "response_length", "unfinished", "seconds"} <= set(metrics[0])
    assert all(np.isfinite(list(row.values())).all() for row in metrics)
    # Before its first update the policy is the reference.
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["kl"] > 0.01
    assert max(row["sampler_scorer_gap"] for row in metrics) < 1e-4


def test_no_program_of_a_training_compiles_twice(smoke):
    """`fit` tells it; test_fit.py shows that it does."""
    assert "compiled" not in smoke.printed


def test_the_evaluation_keeps_its_contract(smoke):
    evaluation = parsed(smoke.work_dir / "evaluation.json")
    assert set(evaluation["win_rates"]) == set(evaluation["gold_win_rates"]) == set(evaluation["ideal"]) == PROCEDURES
    for interval in [evaluation["kl"], *evaluation["win_rates"].values(), *evaluation["gold_win_rates"].values()]:
        assert set(interval) == {"mean", "low", "high"}
        assert 0 <= interval["low"] <= interval["mean"] <= interval["high"]
    for ideal in evaluation["ideal"].values():
        assert set(ideal) <= {"identity", "transform", "optimal"}
        assert all(0 <= value <= 1 for value in ideal.values())
    quality = evaluation["reward_model"]
    assert set(quality) == {
        "pairs",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "ece",
        "brier",
        "margin_length_correlation",
    }
    assert 0 <= quality["accuracy_low"] < quality["accuracy"] < quality["accuracy_high"] <= 1 and quality["pairs"] > 1
    assert (evaluation["judge"], evaluation["judge_win_rates"]) == (None, {})
    assert evaluation["judged_by"] == "the reward model that the policy was trained on"
    for side in ("policy", "reference"):
        lengths = evaluation["response_length"][side]
        assert 1 <= lengths["p10"] <= lengths["median"] <= lengths["p90"] <= 24
        assert 0 <= evaluation["unfinished"][side] <= 1
    assert 0 <= evaluation["ties"] <= 1
    stages = {"sft", "reward_model", "calibrate", "reference_evaluation", "train", "evaluate"}
    assert set(evaluation["timings"]) == stages
    assert all(seconds > 0 for seconds in evaluation["timings"].values())


def test_the_evaluation_is_what_its_arrays_say(smoke):
    evaluation = parsed(smoke.work_dir / "evaluation.json")
    arrays = read_arrays(smoke.work_dir / "evaluation.npz")
    assert arrays["policy_rewards"].shape == arrays["reference_gold"].shape == (16, 32)
    for kind, name in (("rewards", "win_rates"), ("gold", "gold_win_rates")):
        policy, reference = arrays[f"policy_{kind}"][:, :, None], arrays[f"reference_{kind}"][:, None, :]
        won = (policy > reference) + 0.5 * (policy == reference)
        assert evaluation[name]["sampling"]["mean"] == pytest.approx(won.mean(), abs=1e-5)


def test_the_samples_are_the_picks_of_the_procedure(smoke):
    samples = rows(smoke.work_dir / "samples.jsonl")
    arrays = read_arrays(smoke.work_dir / "evaluation.npz")
    assert len({row["prompt"] for row in samples}) == len(samples) == 16
    for side in ("policy", "reference"):
        best = arrays[f"{side}_rewards"][:, :4].max(axis=1)
        np.testing.assert_allclose([row[side]["reward"] for row in samples], best, rtol=1e-6)
        assert all(0 <= row[side]["calibrated"] <= 1 for row in samples)


def test_it_ends_in_its_main_numbers_the_path_of_the_report_and_its_address(smoke):
    evaluation = parsed(smoke.work_dir / "evaluation.json")
    assert smoke.printed.splitlines()[-2:] == [
        f"Report: {smoke.work_dir / 'report' / 'index.html'}",
        f"Ask it something: make sample EXP={smoke.work_dir}",
    ]
    for interval in (evaluation["kl"], evaluation["win_rates"]["best_of_4"], evaluation["gold_win_rates"]["sampling"]):
        assert "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval) in smoke.printed


def test_the_same_command_again_changes_nothing(smoke):
    def of_the_run():
        # `report/` is written again, and must come out the same; `environment.json` says what git has since become.
        files = contents(smoke.work_dir)
        return {name: files[name] for name in files if name != "environment.json"}, times(smoke.stages_dir)

    before = of_the_run()
    code, printed, errors = smoke.command_line.run("train")
    assert code == 0, errors
    assert of_the_run() == before
    ending = smoke.printed.index("smoke, Φ")
    assert printed == smoke.printed[ending:], "nothing was trained, sampled or measured"


def test_another_budget_shares_every_stage(smoke, tmp_path):
    before = times(smoke.stages_dir)
    options = ["--policy.kl-budget", "0.2", "--policy.procedure", "best_of_3", "--work-dir", str(tmp_path / "other")]
    code, printed, errors = smoke.command_line.run("train", *options)
    assert code == 0, errors
    assert times(smoke.stages_dir) == before
    evaluation = parsed(tmp_path / "other" / "evaluation.json")
    assert evaluation["kl_budget"] == 0.2
    assert set(evaluation["win_rates"]) == {*PROCEDURES, "best_of_3"}, "what it was trained for is always measured"
    assert "best_of_3 win rate" in printed


def test_another_experiment_may_not_take_the_work_directory(smoke):
    before = contents(smoke.work_dir)
    options = ["--policy.kl-budget", "0.2", "--work-dir", str(smoke.work_dir)]
    code, _, errors = smoke.command_line.run("train", *options)
    assert code == 2
    assert "--policy.kl-budget: 0.75 → 0.2" in errors
    assert contents(smoke.work_dir) == before


def copied(smoke, folder: Path) -> tuple[Path, list[str]]:
    """A copy of the work directory that lacks only the evaluation, and the options that name it."""
    work_dir = Path(shutil.copytree(smoke.work_dir, folder / "copy"))
    (work_dir / "evaluation.json").unlink()
    return work_dir, ["--work-dir", str(work_dir)]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(smoke, tmp_path):
    work_dir, options = copied(smoke, tmp_path)
    largest = max((work_dir / "checkpoints" / "10").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    code, printed, errors = smoke.command_line.run("train", *options)
    assert code == 0, errors
    assert f"{work_dir}/checkpoints/10 is damaged" in printed and "set aside as damaged-10" in printed
    assert (work_dir / "checkpoints" / "damaged-10").exists()
    assert "smoke 9/10" in printed
    assert_same_run(work_dir, smoke.work_dir)


def test_stages_that_were_deleted_or_half_written_are_made_again(smoke, tmp_path):
    runs_dir = Path(shutil.copytree(smoke.command_line.runs_dir, tmp_path / "runs"))
    (runs_dir / "smoke" / "evaluation.json").unlink()
    [reward_model] = (runs_dir / "stages").glob("reward_model-*")
    shutil.rmtree(reward_model)
    [calibration] = (runs_dir / "stages").glob("calibration-*")
    for path in calibration.iterdir():
        if path.name != "stage.json":
            path.unlink()
    (calibration / "rewards.npy.partial").write_bytes(b"half")
    code, printed, errors = CommandLine(runs_dir, smoke.command_line.cache_dir).run("train")
    assert code == 0, errors
    assert "reward model 20/20" in printed and "reference policy" not in printed
    assert_same_pipeline(runs_dir, smoke.command_line.runs_dir)


def test_a_policy_that_overflows_stops_and_its_step_can_be_replayed(smoke, tmp_path):
    options = ["--work-dir", str(tmp_path), "--policy.learning-rate", "1e30", "--policy.warmup-steps", "0"]
    code, _, errors = smoke.command_line.run("train", *options)
    assert code == 2 and "Traceback" not in errors, errors
    assert "smoke: step 2 was not made: the " in errors and f"{tmp_path}/failed/step-2.npz" in errors
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
    before = contents(tmp_path)
    code, printed, errors = smoke.command_line.run("replay", *options)
    assert code == 0, errors
    assert "smoke, step 2 again" in printed and "First to go wrong: " in printed
    assert "gradient of " in printed
    assert {name for name in contents(tmp_path)} == set(before)


def test_a_checkpoint_of_another_configuration_is_refused(smoke, tmp_path):
    work_dir, options = copied(smoke, tmp_path)
    (work_dir / "config.json").unlink()  # as if the claim had been lost
    code, _, errors = smoke.command_line.run("train", *options, "--policy.learning-rate", "0.02")
    assert code == 2
    assert "Traceback" not in errors
    assert "was saved by another configuration" in errors
    assert f"move {work_dir}/checkpoints away" in errors


def test_a_run_killed_in_policy_training_ends_as_one_that_was_not(smoke, tmp_path):
    """Killed after the row of step 7 is written and before checkpoint 8: step 7 is taken again, from checkpoint 6."""
    kill = f"""
import os, signal
from ctrl_jax.runtime.metrics import MetricWriter
write = MetricWriter.write
def write_and_die(self, step, values):
    write(self, step, values)
    if step == 7 and {str(tmp_path)!r} in self._file.name:
        os.kill(os.getpid(), signal.SIGKILL)
MetricWriter.write = write_and_die
"""
    work_dir = tmp_path / "killed"
    options = ["--work-dir", str(work_dir)]
    code, _, errors = smoke.command_line.run("train", *options, before=kill)
    assert code == -signal.SIGKILL, errors
    assert [row["step"] for row in rows(work_dir / "metrics.jsonl")] == list(range(1, 8))
    assert {path.name for path in (work_dir / "checkpoints").iterdir()} >= {"4", "6"}

    code, printed, errors = smoke.command_line.run("train", *options)
    assert code == 0, errors
    assert "smoke 7/10" in printed, "it goes on from checkpoint 6"
    assert_same_run(work_dir, smoke.work_dir)


def terminate_at(step: int, work_dir: Path) -> str:
    return f"""
import os, signal
from ctrl_jax.runtime.metrics import MetricWriter
write = MetricWriter.write
def write_and_terminate(self, step, values):
    write(self, step, values)
    if step == {step} and {str(work_dir)!r} in str(self._path):
        os.kill(os.getpid(), signal.SIGTERM)
MetricWriter.write = write_and_terminate
"""


@pytest.mark.slow
def test_a_run_that_gets_sigterm_exits_with_its_code_and_ends_as_one_that_did_not(smoke, tmp_path):
    options = ["--work-dir", str(tmp_path)]
    code, _, errors = smoke.command_line.run("train", *options, before=terminate_at(4, tmp_path))
    assert code == 75, errors
    # It read the metrics of step 4 while step 5 was under way, and was asked behind that.
    assert "Stopped by SIGTERM. smoke: step 5 of 10 is saved" in errors
    assert (tmp_path / "checkpoints" / "5").exists()
    code, printed, errors = smoke.command_line.run("train", *options)
    assert code == 0, errors
    assert "smoke 6/10" in printed
    assert_same_run(tmp_path, smoke.work_dir)


@pytest.mark.slow
def test_pipelines_killed_at_random_moments_end_as_one_that_was_not(smoke, tmp_path):
    """`make chaos` makes 25 kills."""
    chaos(tmp_path, smoke.command_line, kills=6, seed=0)
