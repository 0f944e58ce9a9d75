import contextlib
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.report.measurements import read_run
from tests.report import synthetic


def test_reads_what_the_files_say(work_dir: pathlib.Path) -> None:
    run = read_run(work_dir)
    tree = json.loads((work_dir / "evaluation.json").read_text())
    assert run.evaluation.win_rates["best_of_4"].low == tree["win_rates"]["best_of_4"]["low"]
    assert run.evaluation.ideal["best_of_2"].optimal == tree["ideal"]["best_of_2"]["optimal"]
    assert (run.name, run.transform, run.procedure) == ("bon_helpful", "exponential(10)", "best_of_4")
    assert len(run.samples) == 32
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(run.metrics["kl"], [row["kl"] for row in rows])


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "evaluation.npz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_required_file_is_named_with_the_command_that_makes_it(
    work_dir: pathlib.Path, name: str, damage: str
) -> None:
    path = work_dir / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    command = "make train" if name == "config.json" else "make evaluate"
    with pytest.raises(InputError, match=rf"{name}.*`{command}`") as caught:
        read_run(work_dir)
    # A folder that holds a trained policy is never to be deleted.
    assert "elete" not in str(caught.value)


def test_a_work_directory_must_exist(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        read_run(tmp_path / "nowhere")


NESTED = [("config.json", "make train"), ("evaluation.json", "make evaluate"), ("samples.jsonl", "make evaluate"),
          ("metrics.jsonl", "remove that line")]  # fmt: skip


@pytest.mark.parametrize(("name", "remedy"), NESTED)
@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused_by_name(work_dir: pathlib.Path, name: str, remedy: str, depth: int) -> None:
    nested = '{"a": ' * depth + "1" + "}" * depth
    whole = (work_dir / name).read_text()
    (work_dir / name).write_text(f"{nested}\n{whole}" if name.endswith("l") else nested)
    with pytest.raises(InputError, match=rf"{name}.*nested.*{remedy}"):
        read_run(work_dir)


@pytest.mark.parametrize("field", ["transform", "procedure", "beta"])
def test_a_configuration_of_another_world_is_refused(work_dir: pathlib.Path, field: str) -> None:
    config = json.loads((work_dir / "config.json").read_text())
    config["policy"][field] = "<script>"
    (work_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json.*<script>.*`make train`"):
        read_run(work_dir)


def test_metrics_out_of_range_are_gaps(work_dir: pathlib.Path) -> None:
    lines = [
        '{"step": 0, "kl": 1e400, "win_rate": 0.5}', '{"step": 1, "kl": 0.1, "win_rate": NaN}',
        f'{{"step": 2, "kl": {10**400}, "win_rate": "0.6"}}', '{"step": 1e400, "kl": 0.3}', f'{{"step": {10**400}}}',
        '{"step": true, "kl": 0.4}', '{"kl": 0.5}',
    ]  # fmt: skip
    (work_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    metrics = read_run(work_dir).metrics
    np.testing.assert_array_equal(metrics["step"], [0, 1, 2])
    np.testing.assert_array_equal(metrics["kl"], [np.nan, 0.1, np.nan])
    np.testing.assert_array_equal(metrics["win_rate"], [0.5, np.nan, np.nan])


def test_a_folder_or_pipe_in_the_place_of_a_file_is_refused(work_dir: pathlib.Path) -> None:
    (work_dir / "samples.jsonl").unlink()
    os.mkfifo(work_dir / "samples.jsonl")
    with pytest.raises(InputError, match=r"samples\.jsonl cannot be read \(it is no regular file\)"):
        read_run(work_dir)


def test_arrays_of_another_run_are_refused(work_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = synthetic.write_work_dir(tmp_path / "other", names=("sampling", "best_of_4"), seed=1, kl=0.2)
    shutil.copy(other / "evaluation.npz", work_dir)
    with pytest.raises(InputError, match=r"evaluation\.npz is of another evaluation.*`make evaluate`"):
        read_run(work_dir)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("reference_rewards", lambda array: array[:-1]),
        ("policy_calibrated", lambda array: array + 1),
        ("policy_gold", lambda array: array[:, :-1]),
        ("reference_judge", lambda array: array[0]),
        ("policy_lengths", lambda array: array * 0),
        ("policy_rewards", lambda array: array.astype(str)),
        ("reliability_count", lambda array: array[:-1]),
        ("validation_loss", lambda array: array[:-1]),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(work_dir: pathlib.Path, name: str, change: Any) -> None:
    with np.load(work_dir / "evaluation.npz") as archive:
        arrays = dict(archive)
    np.savez(work_dir / "evaluation.npz", **arrays | {name: change(arrays[name])})
    with pytest.raises(InputError, match=r"evaluation\.npz.*`make evaluate`"):
        read_run(work_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"kl": np.zeros(39)},
        {"kl": np.full(40, np.nan)},
        {"along_kl": np.zeros((2, 39))},
        {"along_steps": np.arange(3)},
        {"along_rewards": np.zeros((2, 40))},
        {"along_rewards": np.full((2, 40, 16), np.inf)},
        {"along_rewards": None},
    ],
)
def test_arrays_along_the_training_belong_together_too(work_dir: pathlib.Path, change: dict[str, Any]) -> None:
    with np.load(work_dir / "evaluation.npz") as archive:
        arrays = dict(archive)
    along = synthetic.along_arrays("identity", "best_of_4", (0.2, 0.4), arrays["reference_rewards"])
    whole = arrays | along
    np.savez(work_dir / "evaluation.npz", **whole)
    assert read_run(work_dir).arrays.keys() >= along.keys()
    np.savez(work_dir / "evaluation.npz", **{k: v for k, v in (whole | change).items() if v is not None})
    with pytest.raises(InputError, match=r"evaluation\.npz.*`make evaluate`"):
        read_run(work_dir)


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_to_the_arrays_is_refused_or_harmless(work_dir: pathlib.Path, seed: int) -> None:
    random, path = np.random.default_rng(seed), work_dir / "evaluation.npz"
    damaged = bytearray(path.read_bytes())
    for place in random.integers(0, len(damaged), 3):
        damaged[place] ^= 1 << int(random.integers(8))
    path.write_bytes(damaged[: random.integers(1, len(damaged))] if seed % 3 == 0 else damaged)
    with contextlib.suppress(InputError):
        read_run(work_dir)


def test_the_trained_for_win_rate_must_be_there(work_dir: pathlib.Path) -> None:
    tree = json.loads((work_dir / "evaluation.json").read_text())
    del tree["win_rates"]["best_of_4"]
    (work_dir / "evaluation.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"no win rate under best_of_4"):
        read_run(work_dir)


def test_rewards_must_be_finite_and_present(work_dir: pathlib.Path) -> None:
    with np.load(work_dir / "evaluation.npz") as archive:
        arrays = dict(archive)
    spoilt = arrays | {"policy_rewards": np.where(arrays["policy_rewards"] > 0, np.nan, arrays["policy_rewards"])}
    np.savez(work_dir / "evaluation.npz", **spoilt)
    with pytest.raises(InputError, match="policy_rewards"):
        read_run(work_dir)
    del arrays["reference_calibrated"]
    np.savez(work_dir / "evaluation.npz", **arrays)
    with pytest.raises(InputError, match="no array 'reference_calibrated'"):
        read_run(work_dir)


def test_optional_files_may_be_missing(work_dir: pathlib.Path) -> None:
    (work_dir / "metrics.jsonl").unlink()
    (work_dir / "samples.jsonl").unlink()
    run = read_run(work_dir)
    assert run.metrics == {}
    assert run.samples == []


def test_metrics_of_a_killed_and_resumed_run(work_dir: pathlib.Path) -> None:
    rows = [{"step": 0, "kl": 0.1}, {"step": 1, "kl": 9.0}, {"step": 1, "kl": 0.2}, {"step": 2, "win_rate": 0.6}]
    text = "\n".join(json.dumps(row) for row in rows)
    (work_dir / "metrics.jsonl").write_text(text + '\n{"step": 3, "k')
    metrics = read_run(work_dir).metrics
    np.testing.assert_array_equal(metrics["step"], [0, 1, 2])
    np.testing.assert_array_equal(metrics["kl"], [0.1, 0.2, np.nan])
    (work_dir / "metrics.jsonl").write_text('{"step": 0, "k\n' + text)
    with pytest.raises(InputError, match="line 1"):
        read_run(work_dir)


def test_a_sample_without_text_is_named_by_its_line(work_dir: pathlib.Path) -> None:
    with (work_dir / "samples.jsonl").open("a") as lines:
        lines.write(json.dumps({"prompt": "x", "policy": {"text": "y"}, "reference": {}}) + "\n")
    with pytest.raises(InputError, match=r"reference\.text on line 33"):
        read_run(work_dir)


def test_a_point_is_parsed_like_a_run(finished: pathlib.Path) -> None:
    tree = json.loads((finished / "evaluation.json").read_text())
    assert Evaluation.from_json(tree, source="x", remedy="") == read_run(finished).evaluation
