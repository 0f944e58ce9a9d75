"""The set-up that a command needs before it computes: hosts, devices, the compilation cache."""

import contextlib
import importlib.metadata
from collections.abc import Iterator

import jax

from ctrl_jax.commands.options import Asked, Own
from ctrl_jax.devices import mesh
from ctrl_jax.pipeline.divisible import cpu_devices
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime import console, hosts, leftovers, platform
from ctrl_jax.runtime.stages import differences


@contextlib.contextmanager
def started(asked: Asked[Own]) -> Iterator[Workspace]:
    """The workspace of the run that is asked for, on this machine's devices, or on those of all hosts of the job.

    If the block raises before it made anything, the folders that were made for it are removed.

    Raises:
      InputError: if there are no such devices, batches do not divide by them, or the hosts were asked for different
        things.
    """
    experiment, places = asked.experiment, asked.options.places
    _join_hosts(asked)
    if not hosts.several():
        mesh.divide_cpu(places.devices or cpu_devices(experiment, mesh.num_cores()))
    platform.setup_compilation_cache(places.cache_dir / "compiled")
    devices = mesh.make_mesh(places.devices, fsdp=places.fsdp, model=places.model_parallel)
    stages_dir = places.runs_dir / "stages"
    with leftovers.removed_on_failure(asked.work_dir, stages_dir):
        yield Workspace(experiment, asked.work_dir, stages_dir, devices, places.wandb)
        hosts.wait("the job is done")


def _join_hosts(asked: Asked[Own]) -> None:
    """Joins the other processes of the job, if there are any, all of which must have been asked for the same."""
    places = asked.options.places
    hosts.start(asked=places.distributed)
    if not hosts.several():
        return
    settings = {
        "job": asked.command,
        "experiment": asked.experiment,
        "work_dir": str(asked.work_dir),
        "runs_dir": str(places.runs_dir),
        "devices": places.devices,
        "fsdp": places.fsdp,
        "model_parallel": places.model_parallel,
        "code": platform.code_fingerprint(),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "local devices": f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}",
    }
    hosts.check_alike({name: str(value) for name, (_, value) in differences({}, settings).items()})
    if not hosts.first():
        console.be_quiet()
