"""The command line: `python -m ctrl_jax train bon_helpful --policy.kl-budget 0.5`."""

import argparse
import difflib
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

if __name__ == "__main__":
    # Until the libraries are imported, nothing is begun; `preemption.run` takes over from there.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

# Before jax is imported: XLA logs an error for every program that it takes from the compilation cache, about
# instruction-set preferences that are not instructions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tyro

from ctrl_jax.config import Decoding, Experiment, expand_user
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import printable

if TYPE_CHECKING:
    from ctrl_jax.commands.sweep import Point
    from ctrl_jax.pipeline.run import Run

JOBS = {
    "train": "run whatever stages are missing, train the policy, evaluate, report",
    "sft": "only the reference policy",
    "reward-model": "only the reward model, and what it needs",
    "calibrate": "only the calibration table, and what it needs",
    "evaluate": "win rates and KL of the policy, with intervals",
    "export": "write the policy as a Hugging Face directory, merged or as an adapter",
    "report": "write report/index.html from an evaluated work directory",
    "sample": "a local page to ask the policy and the reference something (--terminal: a table)",
    "replay": "take the step again at which a training stopped as not finite, and tell what went wrong first",
    "runs": "the runs below runs/, with their state and main numbers",
    "sweep": "every point of the experiment's sweep(), ending in the Pareto figure",
    "plan": "what an experiment would cost on devices that need not be here: time and memory by phase",
    "profile": "a trace of a few policy steps, and where their time went",
    "ideal": "the theory alone: win rates of ideal policies",
}


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


def main(arguments: list[str] | None = None) -> int:
    from ctrl_jax.runtime import console, disk, hosts, preemption

    arguments = sys.argv[1:] if arguments is None else arguments
    console.print_anything()
    try:
        with preemption.raising():
            return _run(arguments)
    except InputError as error:
        return _tell(error, str(error), arguments)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return preemption.INTERRUPTED
    except preemption.Preempted as preempted:
        print(f"{printable(str(preempted))} The same command goes on from there.", file=sys.stderr)
        return preemption.EXIT_CODE
    except hosts.NotJoined as error:
        print(f"error: {error}", file=sys.stderr)
        hosts.leave(preemption.EXIT_CODE)
    except Exception as error:  # Orbax and tensorstore have types of their own for a full disk
        told = disk.explain(error)
        if told is not None:
            return _tell(error, told, arguments)
        told = hosts.explain(error)
        if told is None:
            raise
        traceback.print_exception(error)  # a guess alone would hide an error of the program's own
        print(f"error: {told}", file=sys.stderr)
        hosts.leave(preemption.EXIT_CODE)


def _tell(error: Exception, paragraph: str, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    else:
        print(f"error: {printable(paragraph)}", file=sys.stderr)  # it may quote a prompt, or a name of a file
    return 2


def _run(arguments: list[str]) -> int:
    from ctrl_jax.runtime import platform

    platform.check_jaxlib()
    platform.pin_jax()
    _check_letters(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    job, *rest = arguments
    if job not in JOBS:
        raise InputError(f"There is no job {job!r}{_nearest(job, JOBS)}; the jobs are {', '.join(JOBS)}.")
    if job == "ideal":
        from ctrl_jax.commands import ideal

        return ideal.main(rest)
    if job == "runs":
        from ctrl_jax.commands import runs

        return runs.main(rest)
    if not rest or rest[0].startswith("-"):
        raise InputError(
            f"{job!r} needs the name of an experiment, such as `python -m ctrl_jax {job} bon_helpful`, or the folder "
            f"of a run, such as `python -m ctrl_jax {job} runs/bon_helpful`."
        )
    named = find(rest[0])
    if job == "plan":
        from ctrl_jax.planning import plan

        return plan.main(named.name, named.experiment, rest[1:])
    return _run_job(job, named, rest[1:])


@dataclass(frozen=True)
class Named:
    """What the command line names: a file of experiments, or the work directory of a run."""

    name: str
    experiment: Experiment
    module: ModuleType | None = None
    work_dir: Path | None = None


def find(name: str) -> Named:
    """The experiment of that name, or the run in that folder.

    Raises:
      InputError: if there is neither, or config.json of the run cannot be read.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.exists(folder / "config.json") and not os.path.isfile(f"experiments/{name}.py"):
        from ctrl_jax.commands import address

        return Named(name, address.read_experiment(folder), work_dir=folder)
    module = load_experiment(name)
    return Named(module.__name__.removeprefix("experiments."), module.experiment(), module=module)


def _check_letters(arguments: list[str]) -> None:
    """Refuses bytes that are no UTF-8, which Python reads as lone surrogates: no file could be written of them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The argument {argument!r} has at character {error.start + 1} what is no text in UTF-8. Type it anew; "
                "if it is the name of a file, rename that."
            ) from None


def load_experiment(name: str) -> ModuleType:
    """The module `experiments/<name>.py` below the current folder, or the file that `name` is the path of.

    Raises:
      InputError: if there is none, with the nearest names.
    """
    path = Path(os.path.expanduser(name)) if name.endswith(".py") else Path("experiments") / f"{name}.py"
    if not os.path.isfile(path):  # False, not an error, for a name that no system can have
        known = sorted(file.stem for file in Path("experiments").glob("*.py"))
        folder = Path(os.path.expanduser(name))
        if os.path.isdir(folder):
            inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
            named = f" It has the runs {', '.join(inside)}; name one of them." if inside else ""
            raise InputError(f"{name!r} is a folder without config.json, and so no run.{named}")
        where = f"experiments/ has {', '.join(known)}" if known else f"there is no folder experiments/ in {Path.cwd()}"
        raise InputError(
            f"There is no experiment {name!r}{_nearest(name, known)}: {where}. A path of a .py file serves too, and so "
            "does the folder of a run; `python -m ctrl_jax runs` lists those."
        )
    spec = importlib.util.spec_from_file_location(f"experiments.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "experiment"):
        raise InputError(f"{path} has no experiment(); add one that returns a ctrl_jax.config.Experiment.")
    return module


@dataclass(frozen=True)
class Options:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    places: Annotated[Places, tyro.conf.arg(name="")] = Places()


@dataclass(frozen=True)
class SampleOptions(Options):
    prompt: str | None = None
    """What the human says; in the terminal by default the first test prompt."""
    num_samples: int | None = None
    """Responses of each policy; by default 4, or as many as the procedure looks at."""
    procedure: str | None = None
    """What picks one of them; by default what the policy is trained for."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)
    untrained: bool = False
    """Ask the model at --model.path as it is, without rewards; nothing is trained."""
    terminal: bool = False
    """Print a table instead of opening a page."""
    browser: bool = True
    """Open the page in a browser, where there is a display."""
    port: int = 0
    """Of the page, on 127.0.0.1; 0 is a free one."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise InputError(f"num_samples is {self.num_samples}; ask for at least 1 response.")


@dataclass(frozen=True)
class ExportOptions(Options):
    output: Path | None = None
    """The directory to write; by default `export` or `export-adapter` in the work directory."""
    format: Literal["merged", "adapter"] = "merged"
    """The whole model, or its LoRA adapter in PEFT's form."""

    def __post_init__(self) -> None:
        expand_user(self, "output")


@dataclass(frozen=True)
class ProfileOptions(Options):
    steps: int = 3
    """Steps to time, and as many to trace."""


@dataclass(frozen=True)
class SweepOptions(Options):
    jobs: int = 1
    """Points at a time, each in a process with its share of this machine's cores or GPUs."""
    point: str | None = None
    """Run the point of this name alone, in this process and on all devices, as a batch job does."""
    write_jobs: Path | None = None
    """Run nothing, but write a shell script a point into this folder, to be submitted as a batch job."""

    def __post_init__(self) -> None:
        expand_user(self, "write_jobs")


def _run_job(job: str, named: Named, arguments: list[str]) -> int:
    kinds = {"sample": SampleOptions, "export": ExportOptions, "profile": ProfileOptions, "sweep": SweepOptions}
    kind = kinds.get(job, Options)
    program = f"python -m ctrl_jax {job} {named.name}"
    about = None if named.module is None else named.module.__doc__
    own_places = _places_of(named.work_dir)

    def parse(experiment: Experiment) -> Options:
        return tyro.cli(kind, default=kind(experiment, own_places), args=arguments, prog=program, description=about)

    options = parse(named.experiment)
    if named.work_dir is not None:
        _check_run(job, named, options)
    # Imported only now: a mistyped option should not wait for orbax and tensorflow-datasets.
    from ctrl_jax.commands import sweep
    from ctrl_jax.devices import mesh
    from ctrl_jax.pipeline.run import Run, cpu_devices
    from ctrl_jax.runtime import hosts, leftovers, platform

    places = options.places
    work_dir = places.work_dir or places.runs_dir / _run_name(named.experiment, options.experiment)
    experiment = options.experiment
    if isinstance(options, SweepOptions):
        module = named.module
        if module is None:
            raise InputError(f"{named.name} is one run; `sweep` needs the name of an experiment with a sweep().")
        if not hasattr(module, "sweep"):
            raise InputError(f"{module.__file__} has no sweep(); add one that returns a list of experiments.")
        sweep_dir = work_dir.with_name(f"{work_dir.name}.sweep")
        points = [sweep.Point(parse(one).experiment, sweep_dir / one.name) for one in module.sweep()]
        if options.point is None:
            return _run_sweep(sweep_dir, points, options, _command_of_point(module, arguments))
        experiment, work_dir = sweep.find(points, options.point)

    _join_hosts(job, places, experiment, work_dir)
    if not hosts.several():
        mesh.divide_cpu(places.devices or cpu_devices(experiment, mesh.num_cores()))
    platform.setup_compilation_cache(places.cache_dir / "compiled")
    devices = mesh.make_mesh(places.devices, fsdp=places.fsdp, model=places.model_parallel)
    stages_dir = places.runs_dir / "stages"
    with leftovers.removed_on_failure(work_dir, stages_dir):
        run = Run(experiment, work_dir, stages_dir, devices, places.wandb)
        if isinstance(options, SweepOptions):
            sweep.run_point(run, sweep_dir, points)
        else:
            _do(job, run, options)
        hosts.wait("the job is done")
    return 0


def _do(job: str, run: "Run", options: Options) -> None:
    from ctrl_jax.commands import export, replay, report, sample, sample_page, summary
    from ctrl_jax.pipeline import align, calibrate, evaluate, reward_model, sft, train
    from ctrl_jax.planning import profile
    from ctrl_jax.runtime import hosts

    match job:
        case "train":
            align.run(run)
        case "sft":
            sft.run(run)
        case "reward-model":
            reward_model.run(run, sft.run(run))
        case "calibrate":
            reference = sft.run(run)
            reward, _ = reward_model.run(run, reference)
            calibrate.run(run, reference, reward)
        case "evaluate":
            with run.claimed():
                evaluate.independent_judge(run)  # refused before anything is trained
                summary.print_run(run, evaluate.run(run, train.run(run)), None)
        case "export":
            assert isinstance(options, ExportOptions)
            name = "export" if options.format == "merged" else "export-adapter"
            output = options.output or run.work_dir / name
            export.check(run, output, options.format)
            with run.claimed():
                aligned = train.run(run)
            export.run(run, aligned, output, options.format)
        case "profile":
            assert isinstance(options, ProfileOptions)
            profile.run(options.experiment, run.mesh, run.work_dir, steps=options.steps)
        case "replay":
            with run.claimed():
                replay.run(run)
        case "report":
            if hosts.first():
                summary.print_report(report.run(run.work_dir))
        case "sample":
            assert isinstance(options, SampleOptions)
            asked = sample.ask_for(
                options.experiment.policy, options.num_samples, options.procedure, rewards=not options.untrained
            )
            if options.untrained:
                session = sample.untrained(run, options.decoding)
            else:
                with run.claimed():
                    session = sample.trained(run, options.decoding, options.prompt)
                summary.print_address(run)
            if options.terminal:
                sample.print_responses(session, sample.conversation(run, options.prompt), asked)
            else:
                sample_page.serve(
                    session, run.experiment, options.prompt or "", asked, port=options.port, browser=options.browser
                )


def _places_of(work_dir: Path | None) -> Places:
    if work_dir is None:
        return Places()
    from ctrl_jax.commands import address

    return Places(runs_dir=address.runs_dir(work_dir), work_dir=work_dir)


def _check_run(job: str, named: Named, options: Options) -> None:
    """Refuses what a run named by its folder cannot do, before any device is touched."""
    from ctrl_jax.commands import address

    assert named.work_dir is not None
    address.check_unchanged(named.work_dir, named.experiment, options.experiment)
    places = options.places
    if places.work_dir != named.work_dir:
        raise InputError(f"--work-dir is {places.work_dir}, but {named.work_dir} names the run; leave --work-dir out.")
    untrained = isinstance(options, SampleOptions) and options.untrained
    if job in ("report", "profile") or untrained:
        return  # these need no stages
    address.check_versions(named.work_dir)
    if not (places.runs_dir / "stages").is_dir():
        raise InputError(
            f"{named.work_dir} stands on stages, its reference policy and its reward model, and {places.runs_dir} has "
            "no stages/. Give --runs-dir the folder that has them."
        )


def _join_hosts(job: str, places: Places, experiment: Experiment, work_dir: Path) -> None:
    """Joins the other processes of the job, if there are any, all of which must have been asked for the same."""
    import jax

    from ctrl_jax.runtime import console, hosts, platform
    from ctrl_jax.runtime.stages import differences

    hosts.start(asked=places.distributed)
    if not hosts.several():
        return
    asked = {
        "job": job,
        "experiment": experiment,
        "work_dir": str(work_dir),
        "runs_dir": str(places.runs_dir),
        "devices": places.devices,
        "fsdp": places.fsdp,
        "model_parallel": places.model_parallel,
        "code": platform.code_fingerprint(),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "local devices": f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}",
    }
    hosts.check_alike({name: str(value) for name, (_, value) in differences({}, asked).items()})
    if job == "sample":
        raise InputError("`sample` answers on one host; start it there alone. A finished run is read from --runs-dir.")
    if not hosts.first():
        console.be_quiet()


def _run_sweep(
    sweep_dir: Path, points: "list[Point]", options: SweepOptions, command: "Callable[[Point], list[str]]"
) -> int:
    """Touches no device: those are for the processes of the points."""
    from ctrl_jax.commands import sweep
    from ctrl_jax.runtime import shares

    if options.write_jobs is not None:
        sweep.check(points)
        sweep.write_jobs(sweep_dir, points, command, options.write_jobs)
        return 0
    found = shares.shares(options.jobs)
    sweep.check(points, devices=options.places.devices or found[0].devices)
    return sweep.run(sweep_dir, points, command, found)


def _command_of_point(module: ModuleType, arguments: list[str]) -> "Callable[[Point], list[str]]":
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--jobs")
    own.add_argument("--write-jobs", "--write_jobs")
    options = own.parse_known_args(arguments)[1]
    assert module.__file__ is not None  # load_experiment read it from there
    job = [sys.executable, "-m", "ctrl_jax", "sweep", os.path.relpath(module.__file__)]
    return lambda point: [*job, "--point", point.name, *options]


def _run_name(default: Experiment, chosen: Experiment) -> str:
    """Names a run after its experiment and the options that differ from it, so that no two share a work directory."""
    from ctrl_jax.runtime.stages import differences, fingerprint

    own = ("name", "evaluation.judge")  # the judge of a run may change
    changes = {name: new for name, (_, new) in differences(default, chosen).items() if name not in own}
    suffix = "".join(f",{name}={value}" for name, value in changes.items())
    if len(suffix) > 100 or "/" in suffix:
        suffix = f",{fingerprint(changes)}"
    return chosen.name + suffix


def _usage() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {job:{width}}  {text}" for job, text in JOBS.items())
    return (
        f"python -m ctrl_jax JOB EXPERIMENT [options]\n\n{jobs}\n\n"
        "EXPERIMENT names a file of experiments/. Options are the fields of its configuration, such as\n"
        "--policy.kl-budget 0.5; `python -m ctrl_jax train bon_helpful --help` lists them. The folder of a run, such\n"
        "as runs/bon_helpful, serves in its place: it has its options, and takes no others."
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2)
    return f", did you mean {' or '.join(near)}?" if near else ""


if __name__ == "__main__":
    from ctrl_jax.runtime import preemption

    preemption.run(main)
