"""What devices can do at most: the rates and memory that a plan, or a utilisation, is reckoned with."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One device's limits; decimal units, as in data sheets."""

    kind: str
    bfloat16: float
    """FLOP/s of dense matrix products."""
    float32: float
    """The same of float32 arrays at jax's default precision: one bfloat16 pass on TPU, TF32 on these GPUs."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s to and from that memory."""
    interconnect: float | None
    """Bytes/s that a device sends to others of its pod or NVLink domain; None where there are none."""

    @property
    def own_memory(self) -> float | None:
        """None for a CPU, which shares the host's."""
        return None if self.kind == "cpu" else self.memory

    def flops(self, dtype: str) -> float:
        return self.bfloat16 if dtype == "bfloat16" else self.float32


# TPUs: the tables of docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (interconnect there in Gbit/s, or in both
# directions together). GPUs: NVIDIA's data sheets of the SXM modules A100 80 GB, H100 and H200, without sparsity.
KINDS = {
    found.kind: found
    for found in (
        Accelerator("v4", 275e12, 275e12, 32 * 2**30, 1.2e12, 300e9),
        Accelerator("v5e", 197e12, 197e12, 16e9, 819e9, 200e9),
        Accelerator("v5p", 459e12, 459e12, 95e9, 2.765e12, 600e9),
        Accelerator("v6e", 918e12, 918e12, 32e9, 1.638e12, 400e9),
        Accelerator("A100", 312e12, 156e12, 80e9, 2.039e12, 300e9),
        Accelerator("H100", 989.4e12, 494.7e12, 80e9, 3.35e12, 450e9),
        Accelerator("H200", 989.4e12, 494.7e12, 141e9, 4.8e12, 450e9),
    )
}

# As jax names devices. An H100 PCIe is another device, and has no row.
_NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}


def named(kind: str) -> Accelerator:
    """The accelerator of that name; `cpu` is this machine, measured now.

    Raises:
      InputError: if there is none, with the names there are.
    """
    if kind.lower() == "cpu":
        return measure_cpu()
    for name, found in KINDS.items():
        if name.lower() == kind.lower():
            return found
    raise InputError(
        f"`device_kind` is {kind!r}",
        field="device_kind",
        value=kind,
        remedy=f"it is one of {', '.join(KINDS)}, or cpu, which is this machine.",
    )


def of_device(device: jax.Device) -> Accelerator | None:
    """The accelerator that a device of jax is, or None where its rates are not known. A CPU is measured."""
    if device.platform == "cpu":
        return measure_cpu()
    return _by_name(device)


def _by_name(device: jax.Device) -> Accelerator | None:
    kind = _NAMES.get(device.device_kind)
    return None if kind is None else KINDS[kind]


SMALLEST = min(found.memory for found in KINDS.values())


def memory(device: jax.Device) -> float | None:
    """Bytes of a device's own memory, the same on every host; None for a CPU, which shares the host's.

    Looked up by the device's kind: reported free memory differs a little between hosts, whose programs must not. A
    kind that is not known is taken for the smallest of those that are.
    """
    if device.platform == "cpu":
        return None
    found = _by_name(device)
    return SMALLEST if found is None else found.memory


def measure_cpu() -> Accelerator:
    """This machine: the best of a few float32 products of 1536² and of a few copies, in about a second.

    Both are the whole machine's; on CPU bfloat16 is no faster. Other work on the machine makes them lower.
    """
    cpu = jax.devices("cpu")[0]
    size = 1536
    matrix = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32), cpu)
    product = _fastest(lambda: jnp.matmul(matrix, matrix).block_until_ready())

    source = np.ones(2**25, np.float32)  # 128 MiB: no cache holds it
    target = np.zeros_like(source)
    threads = os.cpu_count() or 1
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        # numpy lets go of the interpreter while it copies.
        copy = _fastest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))

    flops = 2 * size**3 / product
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Accelerator("cpu", flops, flops, memory, 2 * source.nbytes / copy, None)


def _fastest(function: Callable[[], object], repeats: int = 6) -> float:
    """Seconds of the fastest of a few calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times[1:])
