"""`compare RUN RUN`: its table, its JSON, and folders that are no runs."""

import json
from pathlib import Path

import pytest

from ctrl_jax.commands import compare
from ctrl_jax.errors import InputError
from ctrl_jax.report import comparison
from ctrl_jax.report.measurements import read_run
from tests.report import synthetic

NAMES = ("sampling", "best_of_4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    runs = tmp_path_factory.mktemp("runs")
    return tuple(
        synthetic.write_work_dir(runs / name, transform=name, names=NAMES, samples=1, along=(0.2, 0.5))
        for name in ("exponential(10)", "identity")
    )


def test_it_prints_every_difference_with_its_interval_and_what_it_means(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert compare.main([*map(str, folders)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = comparison.compare(*map(read_run, folders), names=tuple(map(str, folders)))
    tables = (found.win_rates, found.gold_win_rates, found.judge_win_rates, found.at_equal_kl, {"": found.kl})
    for one in [one for table in tables for one in table.values()]:
        mean, low, high = one.difference
        shown = f"{mean:+.3f} (no interval)" if low is None else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert shown in printed
        assert f"{one.run:.3f}" in printed and f"{one.baseline:.3f}" in printed
    assert "best_of_4 win rate, gold" in printed and f"best_of_4 win rate at {found.equal_kl:.3f} nats" in printed
    assert "40 test prompts" in printed and "the interval" in printed


def test_its_json_is_for_programs(folders, capsys):
    assert compare.main([*map(str, folders), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["run"], tree["baseline"]) == tuple(map(str, folders))
    assert set(tree["win_rates"]) == set(NAMES)


def test_what_is_no_run_or_damaged_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a directory"):
        compare.main([str(folders[0]), str(tmp_path / "nowhere")])
    other = synthetic.write_work_dir(tmp_path / "other", seed=1, names=NAMES, samples=1)
    with pytest.raises(InputError, match="were not evaluated beside the same responses of one reference"):
        compare.main([str(folders[0]), str(other)])
    (other / "evaluation.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"evaluation\.npz is missing or not what was written"):
        compare.main([str(folders[0]), str(other)])
