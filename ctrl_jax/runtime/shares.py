"""The devices of this machine in equal shares, for processes that run beside each other."""

import itertools
import os
import subprocess
import sys
from typing import NamedTuple

from ctrl_jax.errors import InputError


class Share(NamedTuple):
    devices: int
    """How many a process with this share sees."""
    environment: dict[str, str]
    """What lets it see only those."""
    cores: frozenset[int] | None
    """The CPU cores it may run on; None is all of them."""


def shares(jobs: int) -> list[Share]:
    """One share for each of `jobs` processes. GPUs are never shared by two of them, and some may stay idle.

    The devices are counted by a process of their own: this one must not hold memory that the others need.

    Raises:
      InputError: if there are fewer GPUs, or if the devices cannot be divided.
    """
    if jobs < 1:
        raise InputError(f"`jobs` is {jobs}; run at least 1 point at a time.")
    platform, devices = _devices()
    if jobs == 1:
        return [Share(devices, {}, None)]
    if platform == "gpu":
        if jobs > devices:
            raise InputError(f"`jobs` is {jobs}, but {devices} GPUs are visible, and no two points share one.")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        ids, each = visible.split(","), devices // jobs
        starts = range(0, jobs * each, each)
        return [Share(each, {"CUDA_VISIBLE_DEVICES": ",".join(ids[start : start + each])}, None) for start in starts]
    if platform != "cpu":
        raise InputError(
            f"`jobs` is {jobs}, but the {platform.upper()} chips of a machine belong to one process at a time. Leave "
            "it at 1, and each point has all of them; or write a batch job a point, `write_jobs=DIR`."
        )
    if not hasattr(os, "sched_getaffinity"):  # macOS cannot bind a process to cores
        return [Share(devices, {}, None)] * jobs
    cores = sorted(os.sched_getaffinity(0))
    bounds = [len(cores) * job // jobs for job in range(jobs + 1)]
    # With more jobs than cores some share one.
    slices = [cores[low : max(high, low + 1)] for low, high in itertools.pairwise(bounds)]
    return [Share(devices, {}, frozenset(own)) for own in slices]


def _devices() -> tuple[str, int]:
    """The platform that jax chooses, and how many devices this machine has of it."""
    program = "import jax; print(jax.default_backend(), jax.local_device_count())"
    try:
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=120)
    except subprocess.TimeoutExpired:
        raise InputError(
            "jax did not find its devices within two minutes. A host of a TPU pod waits for the others: there, run one "
            "point at a time on all hosts, sweep EXPERIMENT `point=NAME`."
        ) from None
    if found.returncode:
        raise InputError(f"jax finds no devices: {found.stderr.strip().splitlines()[-1]}")
    platform, devices = found.stdout.split()
    return platform, int(devices)
