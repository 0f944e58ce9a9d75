"""Every point of an experiment's sweep(), ending in the Pareto figure."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ctrl_jax.commands.experiments import Named
from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import parse, read
from ctrl_jax.config import expand_user
from ctrl_jax.errors import InputError

if TYPE_CHECKING:
    from ctrl_jax.commands.point import Point


@dataclass(frozen=True)
class Options(RunOptions):
    jobs: int = 1
    """Points at a time, each in a process with its share of this machine's cores or GPUs."""
    point: str | None = None
    """Run the point of this name alone, in this process and on all devices, as a batch job does."""
    write_jobs: Path | None = None
    """Run nothing, but write a shell script a point into this folder, to be submitted as a batch job."""
    baseline: str | None = None
    """The transform or other method, or the name of the point, that the others are compared with on the same prompts:
    of a method the point of the same procedure whose measured KL is nearest. By default the sweep's BASELINE, or else
    the identity, of CTRL or of the one algorithm that has it."""

    def __post_init__(self) -> None:
        expand_user(self, "write_jobs")


def main(arguments: list[str]) -> int:
    asked = read("sweep", Options, arguments)
    module = _module(asked.named)
    from ctrl_jax.commands import sweep_comparisons, sweep_points
    from ctrl_jax.commands.launch import started
    from ctrl_jax.commands.point import Point

    sweep_dir = asked.work_dir.with_name(f"{asked.work_dir.name}.sweep")
    own = arguments[1:]
    points = [
        Point(parse("sweep", Options, asked.named, one, own).experiment, sweep_dir / one.name) for one in module.sweep()
    ]
    baseline = asked.options.baseline or getattr(module, "BASELINE", None) or sweep_comparisons.of_identity(points)
    sweep_comparisons.check(points, baseline)
    if asked.options.point is None:
        return _run_all(sweep_dir, points, asked.options, _command_of_point(module, own), baseline)
    point = sweep_points.find(points, asked.options.point)
    with started(replace(asked, experiment=point.experiment, work_dir=point.work_dir)) as run:
        sweep_points.run_point(run, sweep_dir, points, baseline=baseline)
    return 0


def _module(named: Named) -> ModuleType:
    """The file of the experiment, which has a sweep()."""
    if named.module is None:
        raise InputError(f"{named.name} is one run; `sweep` needs the name of an experiment with a sweep().")
    if not hasattr(named.module, "sweep"):
        raise InputError(f"{named.module.__file__} has no sweep(); add one that returns a list of experiments.")
    return named.module


def _run_all(
    sweep_dir: Path, points: "list[Point]", options: Options, command: "Callable[[Point], list[str]]", baseline: str
) -> int:
    """Touches no device: those are for the processes of the points."""
    from ctrl_jax.commands import sweep_points, sweep_processes
    from ctrl_jax.runtime import shares

    if options.write_jobs is not None:
        sweep_points.check(points)
        sweep_points.write_jobs(sweep_dir, points, command, options.write_jobs, baseline=baseline)
        return 0
    found = shares.shares(options.jobs)
    sweep_points.check(points, devices=options.places.devices or found[0].devices)
    return sweep_processes.run(sweep_dir, points, command, found, baseline=baseline)


def _command_of_point(module: ModuleType, arguments: list[str]) -> "Callable[[Point], list[str]]":
    """The command that runs a point alone: this one's options without those that make processes or scripts."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--jobs")
    own.add_argument("--write-jobs", "--write_jobs")
    options = own.parse_known_args(arguments)[1]
    assert module.__file__ is not None  # load_experiment read it from there
    job = [sys.executable, "-m", "ctrl_jax", "sweep", os.path.relpath(module.__file__)]
    return lambda point: [*job, "--point", point.name, *options]
