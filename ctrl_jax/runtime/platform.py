"""What the run stands on: the libraries it refuses, the compilation cache, and the record of its environment."""

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from ctrl_jax.errors import InputError

BROKEN_JAXLIBS = {
    "0.10.2": "computes wrong numbers on CPU and crashes (jax-ml/jax#39103, #40412)",
    "0.11.0": "crashes on CPU (jax-ml/jax#40412, #39257)",
}

PINNED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}

_RECORDED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "sentencepiece",
    "numpy",
)


def check_jaxlib(version: str | None = None) -> None:
    """Refuses the jaxlib releases that are known to compute wrong numbers or to crash.

    Args:
      version: of jaxlib; by default the installed one, read without importing it.

    Raises:
      InputError: with the version, what is wrong with it, and the command that mends it.
    """
    version = importlib.metadata.version("jaxlib") if version is None else version
    if version in BROKEN_JAXLIBS:
        excluded = "".join(f",!={broken}" for broken in BROKEN_JAXLIBS)
        raise InputError(
            f"jaxlib {version} is installed, which {BROKEN_JAXLIBS[version]}. Install another one: "
            f"{sys.executable} -m pip install 'jax>=0.10.1{excluded}' 'jaxlib>=0.10.1{excluded}'"
        )


def pin_jax() -> None:
    """Sets what the environment may set otherwise, of jax's settings that change draws or types of every program.

    Under JAX_ENABLE_X64=1 steps would not compile, and under another generator no draw would be what its seed says:
    an experiment alone decides its results.
    """
    for name, value in PINNED.items():
        jax.config.update(name, value)


def setup_compilation_cache(directory: Path) -> Path:
    """Keeps compiled programs of any size under `directory`, so that a second start compiles nothing.

    The folder is keyed by jaxlib's version and the device, on CPU by its model and instruction set too: a program
    compiled for another processor may crash this one. Where JAX_COMPILATION_CACHE_DIR names a folder, that one is used
    as it is. Call it after `jax.distributed.initialize`, before anything is compiled.

    Returns:
      The folder in use.
    """
    device = jax.devices()[0]
    name = f"jaxlib-{importlib.metadata.version('jaxlib')}-{device.device_kind}-{device_fingerprint()}"
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(chosen) if chosen else Path(directory).absolute() / re.sub(r"[^\w.-]+", "-", name).lower()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def device_fingerprint() -> str:
    """Eight hex digits that differ between machines whose compiled programs must not be mixed."""
    device = jax.devices()[0]
    parts = [device.platform, device.device_kind, platform.machine()]
    if device.platform == "cpu":
        parts += _cpu()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def code_fingerprint() -> str:
    """12 hex digits of the sources of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What a reader needs to reproduce a run; JSON, for `environment.json`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _RECORDED},
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "processes": jax.process_count(),
        "cpu": {"model": _cpu()[0], "count": os.cpu_count()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": _git(Path(__file__).parents[2]),
        "command": sys.argv,
    }


def peak_memory() -> int:
    """Bytes: the most the first device has held where it says so, otherwise the most this process has held."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu() -> list[str]:
    """The processor's model and instruction set, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [platform.processor(), ""]
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    model = fields.get("model name", platform.processor())
    return [model.strip(), fields.get("flags", fields.get("Features", "")).strip()]


def _git(checkout: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None where the package is not run from a checkout."""
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=checkout, check=True, capture_output=True, encoding="utf-8", errors="replace"
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None
