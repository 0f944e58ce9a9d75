"""Kills a whole pipeline again and again, and checks that it ends as one that was left alone: `make chaos`.

The experiment `smoke` runs its five stages (SFT, reward model, calibration, training, evaluation). At random moments
its process gets SIGKILL, every second time while a checkpoint is being written; the same command then starts again.
Where a pipeline ends before the kills are used up, another begins from nothing. Parameters, metrics without their
timings, tables, samples and evaluation must all be bit-identical to an undisturbed pipeline's.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_jax.runtime.stages import read_arrays
from tests.trained import CommandLine


def chaos(folder: Path, undisturbed: CommandLine, *, kills: int, seed: int, longest: float = 20.0) -> None:
    """Runs pipelines below `folder` until `kills` kills were made, each to its end, and compares each.

    A kill comes `longest` seconds from a start at the latest, or in one of the first checkpoints from it.

    Raises AssertionError where one fails, or ends other than the undisturbed one.
    """
    chance, made, pipelines = random.Random(seed), 0, 0
    while made < kills:
        pipelines += 1
        command_line = CommandLine(folder / f"runs-{pipelines}", undisturbed.cache_dir)
        ended = False
        while not ended and made < kills:
            process = command_line.start("train")
            moment = chance.uniform(0.5, longest)
            with ThreadPoolExecutor(1) as thread:
                in_checkpoint = made % 2 == 1
                when = thread.submit(_kill, process, command_line.runs_dir, chance, moment, in_checkpoint=in_checkpoint)
                printed, errors = process.communicate()
                told = when.result()
            ended = process.returncode == 0
            assert ended or process.returncode == -signal.SIGKILL, errors
            if not ended:
                made += 1
                last = ([line for line in printed.splitlines() if line.strip()] or ["nothing printed yet"])[-1]
                print(f"kill {made}/{kills}, pipeline {pipelines}: {told}; {last[:90]}", flush=True)
        if not ended:
            code, _, errors = command_line.run("train")
            assert code == 0, errors
        assert_same_pipeline(command_line.runs_dir, undisturbed.runs_dir)
        print(f"pipeline {pipelines}: bit-identical to the undisturbed one", flush=True)


def _kill(
    process: subprocess.Popen[str], runs_dir: Path, chance: random.Random, moment: float, *, in_checkpoint: bool
) -> str:
    """Kills the process at a moment of chance, unless it ends before; returns which moment it was."""
    started = time.monotonic()
    sighting, delay = chance.randint(1, 4), chance.uniform(0, 0.05)
    left, seen = _unfinished(runs_dir), set[Path]()  # the first by the kill before
    while process.poll() is None:
        if in_checkpoint:
            found = _unfinished(runs_dir)
            left &= found
            seen |= found - left
            if len(seen) >= sighting:
                time.sleep(delay)
                process.kill()
                return f"{1000 * delay:.0f} ms into a checkpoint, {time.monotonic() - started:.1f} s from its start"
        elif time.monotonic() - started > moment:
            process.kill()
            return f"{moment:.1f} s from its start"
        time.sleep(0.002 if in_checkpoint else 0.02)
    return "it had ended"


def _unfinished(runs_dir: Path) -> set[Path]:
    """The checkpoints that are being written."""
    found: set[Path] = set()
    for folder in (runs_dir / "smoke", *runs_dir.glob("stages/*")):
        with contextlib.suppress(FileNotFoundError):  # it is moved to its place as we look
            found.update((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    return found


def assert_same_pipeline(found: Path, expected: Path) -> None:
    """All that two runs folders of `smoke` hold, but timings, is bit-identical."""
    names = sorted(path.name for path in (expected / "stages").iterdir())
    assert sorted(path.name for path in (found / "stages").iterdir()) == names
    for name in names:
        _assert_same_training(found / "stages" / name, expected / "stages" / name)
    assert_same_run(found / "smoke", expected / "smoke")


def assert_same_run(found: Path, expected: Path) -> None:
    """All that two work directories hold, but timings, is bit-identical."""
    _assert_same_training(found, expected)
    mine, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (found, expected))
    assert {**mine, "timings": None} == {**theirs, "timings": None}
    assert (found / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()


def _assert_same_training(found: Path, expected: Path) -> None:
    """The last checkpoint, the metrics and the arrays of a stage or a work directory, where it has them."""
    if (expected / "checkpoints").exists():
        arrays, others = last_checkpoint(found), last_checkpoint(expected)
        assert any(name.startswith("params") for name in others)
        _assert_same_arrays(arrays, others)
        assert untimed(found / "metrics.jsonl") == untimed(expected / "metrics.jsonl")
    for path in expected.glob("*.np[yz]"):
        if path.suffix == ".npy":
            assert (found / path.name).read_bytes() == path.read_bytes(), path.name
        else:
            _assert_same_arrays(read_arrays(found / path.name), read_arrays(path))


def _assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def last_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every array of it: parameters, optimiser, controller."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        assert step == len(untimed(folder / "metrics.jsonl"))
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return {name: np.asarray(array) for name, array in restored.items()}


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        undisturbed = CommandLine(folder / "undisturbed", folder / "cache")
        code, _, errors = undisturbed.run("train")
        assert code == 0, errors
        alone = time.monotonic() - started
        print(f"undisturbed: {alone:.0f} s", flush=True)
        try:
            # Half of that was compilation, which the others are spared: a third is most of what they need.
            chaos(folder, undisturbed, kills=options.kills, seed=options.seed, longest=alone / 3)
        except AssertionError as error:
            print(f"FAILED with --seed {options.seed}: {error}")
            return 1
    print(
        f"{options.kills} kills (--seed {options.seed}), {time.monotonic() - started:.0f} s: every restart went on by "
        "itself, and every pipeline ended bit-identical to the undisturbed one."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
