import json
import math
import pathlib

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.report.measurements import lift_share, parse_evaluation, read_run


def test_lift_share_is_the_lift_over_one_half() -> None:
    assert lift_share(0.8, 0.9) == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
    assert lift_share(0.5, 0.9) == 0
    assert lift_share(0.8, None) is None
    assert lift_share(0.8, 0.5) is None


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
    with pytest.raises(InputError, match=rf"{name}.*`make train`"):
        read_run(work_dir)


def test_a_work_directory_must_exist(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kl", "mean"), math.nan),
        (("win_rates", "best_of_4", "high"), "0.9"),
        (("reward_model", "ece"), None),
        (("ideal", "sampling", "identity"), math.inf),
        (("ties",), True),
        (("win_rates",), [0.5]),
        (("gold_win_rates", "sampling"), 0.5),
    ],
)
def test_a_bad_entry_is_named_with_its_place(finished: pathlib.Path, path: tuple[str, ...], value: object) -> None:
    tree = json.loads((finished / "evaluation.json").read_text())
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(InputError) as caught:
        parse_evaluation(tree, source="here.json", remedy="make it again.")
    assert "here.json" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert path[-1] in str(caught.value)


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
