"""The options of all commands that take an experiment or a run, and how a line of them is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import tyro

from ctrl_jax.commands import address
from ctrl_jax.commands.experiments import Named, find
from ctrl_jax.config import Experiment, expand_user
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.stages import differences, fingerprint


@dataclass(frozen=True)
class Places:
    """Where files go, and what runs the job."""

    runs_dir: Path = Path("runs")
    """Holds a work directory for each experiment, and `stages/`, which they share."""
    work_dir: Path | None = None
    """This experiment's own files; by default `<runs-dir>/<name>`, with what the options change behind the name."""
    cache_dir: Path = Path(".cache")
    """Compiled programs."""
    devices: int | None = None
    """Devices to use; by default all, and of a CPU a device a core where the model is small. What the next two leave of
    them is data-parallel: docs/devices.md."""
    fsdp: int = 1
    """Devices that split parameters and optimiser state between them, as well as a batch."""
    model_parallel: int = 1
    """Devices that split each layer between them; a batch is split over the others."""
    distributed: bool = False
    """Join the other hosts of a TPU pod. Those of Slurm, Open MPI or JAX_COORDINATOR_ADDRESS are joined without it."""
    wandb: bool = False
    """Log the policy's training to Weights & Biases too (make setup EXTRA=wandb)."""
    debug: bool = False
    """Print a traceback on bad input too."""

    def __post_init__(self) -> None:
        expand_user(self, "runs_dir", "work_dir", "cache_dir")
        for name in ("runs_dir", "work_dir", "cache_dir"):
            remote = re.match(r"([a-z][a-z0-9]+):/+(.*)", str(getattr(self, name)))
            if remote:
                url = f"{remote[1]}://{remote[2]}"
                raise InputError(
                    f"--{name.replace('_', '-')} is {url}, an object store, which has neither locks nor files that "
                    "grow. Give a folder of a local or a network file system, and copy it there and back: `gcloud "
                    f"storage rsync --recursive FOLDER {url}`."
                )


@dataclass(frozen=True)
class Options:
    experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    places: Annotated[Places, tyro.conf.arg(name="")] = Places()

    @property
    def needs_stages(self) -> bool:
        """Whether the command goes on from the stages of a run."""
        return True


Own = TypeVar("Own", bound=Options)


@dataclass(frozen=True)
class Asked(Generic[Own]):
    """A command about an experiment or a run."""

    command: str
    named: Named
    options: Own
    experiment: Experiment
    """With the options in place."""
    work_dir: Path


def read(command: str, kind: type[Own], arguments: Sequence[str]) -> Asked[Own]:
    """Reads a line such as `bon_helpful --policy.kl-budget 0.5`: an experiment or a run, and options.

    Raises:
      InputError: if there is no such experiment or run, or the run has other options or needs stages that are missing.
      SystemExit: from tyro, for `--help` and for options that cannot be read.
    """
    named, rest = read_name(command, arguments)
    options = parse(command, kind, named, named.experiment, rest)
    if named.work_dir is not None:
        _check_run(named.work_dir, named.experiment, options)
    places = options.places
    work_dir = places.work_dir or places.runs_dir / _run_name(named.experiment, options.experiment)
    return Asked(command, named, options, options.experiment, work_dir)


def read_name(command: str, arguments: Sequence[str]) -> tuple[Named, Sequence[str]]:
    """The experiment or run that the first argument names, and the other arguments.

    Raises:
      InputError: if there is none.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            f"{command!r} needs the name of an experiment, such as `python -m ctrl_jax {command} bon_helpful`, or the "
            f"folder of a run, such as `python -m ctrl_jax {command} runs/bon_helpful`."
        )
    return find(arguments[0]), arguments[1:]


def parse(command: str, kind: type[Own], named: Named, experiment: Experiment, arguments: Sequence[str]) -> Own:
    """The options of a command: those of `experiment`, but where the arguments give others."""
    places = Places()
    if named.work_dir is not None:
        places = Places(runs_dir=address.runs_dir(named.work_dir), work_dir=named.work_dir)
    return tyro.cli(
        kind,
        default=kind(experiment, places),
        args=arguments,
        prog=f"python -m ctrl_jax {command} {named.name}",
        description=None if named.module is None else named.module.__doc__,
    )


def _check_run(work_dir: Path, own: Experiment, options: Options) -> None:
    """Refuses options that a run named by its folder cannot have, before any device is touched."""
    address.check_unchanged(work_dir, own, options.experiment)
    places = options.places
    if places.work_dir != work_dir:
        raise InputError(f"--work-dir is {places.work_dir}, but {work_dir} names the run; leave --work-dir out.")
    if not options.needs_stages:
        return
    address.check_versions(work_dir)
    if not (places.runs_dir / "stages").is_dir():
        raise InputError(
            f"{work_dir} stands on stages, its reference policy and its reward model, and {places.runs_dir} has "
            "no stages/. Give --runs-dir the folder that has them."
        )


def _run_name(default: Experiment, chosen: Experiment) -> str:
    """Names a run after its experiment and the options that differ from it, so that no two share a work directory."""
    own = ("name", "evaluation.judge")  # the judge of a run may change
    changes = {name: new for name, (_, new) in differences(default, chosen).items() if name not in own}
    lists = {name: [*map(str, new)] for name, new in changes.items() if isinstance(new, list)}
    shown = {**changes, **{name: "+".join(new) for name, new in lists.items()}}
    suffix = "".join(f",{name}={value}" for name, value in shown.items())
    is_plain = all(new and not any("+" in one for one in new) for new in lists.values())
    if len(suffix) > 100 or "/" in suffix or not is_plain:
        suffix = f",{fingerprint(changes)}"
    return chosen.name + suffix
