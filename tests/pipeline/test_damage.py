"""A damaged file of a stage or a work directory is made anew, or refused by name, and no result changes."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import results as kept_results
from tests.pipeline.fakes import EXPERIMENTS, results, train


def flipped(data: bytes, at: float) -> bytes:
    index = min(int(at * len(data)), len(data) - 1)
    return data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :]


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "a bit at the start": lambda path, other: path.write_bytes(flipped(path.read_bytes(), 0.02)),
    "a bit in the middle": lambda path, other: path.write_bytes(flipped(path.read_bytes(), 0.5)),
    "a bit at the end": lambda path, other: path.write_bytes(flipped(path.read_bytes(), 0.97)),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, other: path.write_bytes(b""),
    "{}": lambda path, other: path.write_bytes(b"{}"),
    "deep": lambda path, other: path.write_bytes(b"[" * 100_000),
    "another run's": lambda path, other: shutil.copy(other, path),
    "gone": lambda path, other: path.unlink(),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


def of_stage(path: Path) -> str:
    """A file's name that is the same in every run: of stages/sft-0123456789ab/done.json that is sft/done.json."""
    parts = path.relative_to("runs").parts
    return "/".join([parts[1].rpartition("-")[0], *parts[2:]] if parts[0] == "stages" else parts)


def files(folder: str) -> dict[str, Path]:
    found = {of_stage(path): path for path in sorted(Path("runs").glob(f"{folder}/**/*")) if path.is_file()}
    return {name: path for name, path in found.items() if path.name != "lock"}


@pytest.fixture
def damaged(prepared, fakes):
    """Runs `train` for every file below a folder of `runs`, damaged, in a copy of a finished run."""

    def check(base: str, folder: str, how: str, *, again: str) -> list[str]:
        """`again`: the work directory that then is trained to. Returns the files whose damage was refused."""
        prepared(base)
        expected = results("runs/work")
        others = files(folder)
        # Of another run: other prompts, temperature, data; the same names.
        train(fakes, other(base), "other/work", "other/stages")
        shutil.move("runs", "mine"), shutil.move("other", "runs")
        strangers = {name: path.read_bytes() for name, path in files(folder).items()}
        shutil.rmtree("runs")
        refused = []
        for name, path in others.items():
            shutil.copytree("mine", "runs")
            stranger = Path("stranger")
            stranger.write_bytes(strangers.get(name, b"another"))
            if how == "another run's" and path.exists() and stranger.read_bytes() == path.read_bytes():
                stranger.write_bytes(b"another")
            DAMAGES[how](path, stranger)
            try:
                train(fakes, EXPERIMENTS[base], again)
            except InputError as error:
                assert path.name in str(error), (name, str(error))
                assert "delete" not in str(error).lower(), str(error)
                refused.append(name)
            else:
                assert results(again) == expected, name
                kept_results.check(Path(again))
            shutil.rmtree("runs")
        return refused

    return check


def other(base: str) -> Experiment:
    return dataclasses.replace(EXPERIMENTS[base], seed=7)


def marked(*fast: str):
    return [how if how in fast else pytest.param(how, marks=pytest.mark.slow) for how in DAMAGES]


@pytest.mark.parametrize("how", marked("a bit in the middle"))
def test_damage_to_a_stage_changes_no_result(damaged, how):
    """Another experiment comes to stages of which one file is damaged; here it is the same, in a folder of its own."""
    assert damaged("trained", "stages", how, again="runs/again") == []


@pytest.mark.parametrize("how", marked("a bit in the middle", "another run's", "gone"))
def test_damage_to_a_work_directory_changes_no_result(damaged, how):
    assert damaged("function", "work", how, again="runs/work") == []


def test_a_folder_of_another_run_in_a_stage_is_not_used(prepared, fakes):
    """The whole calibration of another seed, seal and all, in the place of this one's."""
    prepared("trained")
    expected = results("runs/work")
    train(fakes, other("trained"), "other/work", "other/stages")
    for kind in ("calibration", "reference_evaluation", "data"):
        (mine,) = Path("runs/stages").glob(f"{kind}-*")
        (theirs,) = [path for path in Path("other/stages").glob(f"{kind}-*") if path.name != mine.name] or [None]
        if theirs is not None:
            shutil.rmtree(mine)
            shutil.copytree(theirs, mine)
    train(fakes, EXPERIMENTS["trained"], "runs/again")
    assert results("runs/again") == expected
    table = np.load(next(Path("runs/stages").glob("calibration-*/rewards.npy")))
    assert table.shape == (6, 8) and (np.diff(table, axis=1) >= 0).all()
