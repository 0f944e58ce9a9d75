"""The list of runs: states, numbers, and whatever is damaged in a row of its own."""

import json

import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands import runs
from ctrl_jax.config import Experiment, Policy
from ctrl_jax.runtime.stages import exclusive, plain, write_json

INTERVAL = {"mean": 0.7, "low": 0.6, "high": 0.8}


def write_run(folder, *, steps=0, done=False, interval=INTERVAL, **policy):
    experiment = Experiment(folder.name, policy=Policy(steps=40, **policy))
    write_json(folder / "config.json", plain(experiment))
    if steps:
        lines = "".join(json.dumps({"step": step, "kl": 0.1}) + "\n" for step in range(1, steps + 1))
        (folder / "metrics.jsonl").write_text(lines)
    if done:
        names = ("sampling", experiment.policy.procedure)
        evaluation = {"kl": interval, "kl_budget": 0.75, "win_rates": dict.fromkeys(names, interval),
                      "gold_win_rates": {}, "ideal": {}, "reward_model": {}, "ties": 0.0, "timings": {}}  # fmt: skip
        write_json(folder / "evaluation.json", evaluation)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Runs in every state."""
    write_run(tmp_path / "done,policy.transform=exponential(5)", steps=40, done=True, transform="exp5")
    write_run(tmp_path / "new")
    write_run(tmp_path / "stopped", steps=20)
    write_run(tmp_path / "nan", steps=7)
    (tmp_path / "nan" / "failed").mkdir()
    (tmp_path / "nan" / "failed" / "step-8.npz").touch()
    write_run(tmp_path / "a.sweep" / "identity_kl0.6", steps=40, done=True, transform="identity", procedure="best_of_2")
    write_json(tmp_path / "a.sweep" / "raw_kl0.6" / "point.json", {"attempts": 2, "reason": "It was killed."})
    (tmp_path / "stages" / "sft-1").mkdir(parents=True)
    (tmp_path / "stages" / "sft-1" / "metrics.jsonl").touch()
    (tmp_path / "ideal_best_of_4.png").touch()
    return tmp_path


STATES = {
    "a.sweep/identity_kl0.6": "done",
    "a.sweep/raw_kl0.6": "failed: It was killed.",
    "done,policy.transform=exponential(5)": "done",
    "nan": "failed, step 7 of 40",
    "new": "step 0 of 40",
    "stopped": "step 20 of 40",
}


def test_every_run_has_its_state(folder):
    assert {row.run: row.state for row in runs.rows(folder)} == {
        f"{folder}/{run}": state for run, state in STATES.items()
    }
    with exclusive(folder / "stopped"):
        states = {row.run: row.state for row in runs.rows(folder)}
    assert states[f"{folder}/stopped"] == "running, step 20 of 40" and states[f"{folder}/new"] == "step 0 of 40"


def test_the_table_has_the_main_numbers_and_whole_addresses(folder, capsys):
    assert command_line.main(["runs", "--runs-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for run, state in STATES.items():
        (line,) = (line for line in lines if f"{folder}/{run} " in line)
        assert state in line
        assert line.count("0.700 [0.600, 0.800]") == (3 if state == "done" else 0)
    (line,) = (line for line in lines if "exponential(5) " in line and "best_of_4" in line)


def test_a_run_of_one_prompt_has_no_interval(tmp_path, capsys):
    write_run(tmp_path / "one", steps=40, done=True, interval={"mean": 0.7, "low": None, "high": None})
    assert command_line.main(["runs", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("0.700 (no interval)") == 3


def test_json_is_for_programs(folder, capsys):
    assert command_line.main(["runs", "--runs-dir", str(folder), "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[f"{folder}/a.sweep/identity_kl0.6"] == {
        "run": f"{folder}/a.sweep/identity_kl0.6", "state": "done", "transform": "identity", "procedure": "best_of_2",
        "kl": INTERVAL, "win_rate": INTERVAL, "sampling_win_rate": INTERVAL,
    }  # fmt: skip


DAMAGES = ["", "{", "null", "[]", "{}", "[" * 100_000, '{"name": [1]}', "\x00\xff", '{"win_rates": {"x": 3}, "kl": 1}',
           '{"step": "x"}\n', '{"step": 1e400}\n', '{"step": null}\n', '{"reason": 3}', "7"]  # fmt: skip


@pytest.mark.parametrize("file", runs.MARKS)
@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_is_a_row_and_no_traceback(folder, file, damage, capsys):
    for name in ("done,policy.transform=exponential(5)", "stopped", "a.sweep/raw_kl0.6"):
        (folder / name / file).write_text(damage, encoding="latin-1")
    rows = {row.run: row.state for row in runs.rows(folder)}
    assert len(rows) == len(STATES) and rows[f"{folder}/a.sweep/identity_kl0.6"] == "done"
    if file == "evaluation.json" or (file == "config.json" and damage != '{"name": [1]}'):
        assert rows[f"{folder}/stopped"].startswith("damaged: ")
    assert command_line.main(["runs", "--runs-dir", str(folder)]) == 0
    capsys.readouterr()


def test_no_folder_of_runs(tmp_path, capsys):
    assert command_line.main(["runs", "--runs-dir", str(tmp_path / "none")]) == 2
    assert "none is not a folder; name the one that holds the runs" in capsys.readouterr().err
    assert runs.rows(tmp_path) == []
