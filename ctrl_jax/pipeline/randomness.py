"""The random keys of stages, and how JAX is set to draw."""

import functools
import zlib
from typing import Any

import jax
import numpy as np

from ctrl_jax.data.pipelines import batches


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of a stage; step, prompt and sample are folded into it in turn."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def draws() -> dict[str, Any]:
    """Whether the same keys still draw the same numbers shows here: JAX's settings, and some numbers that they draw.

    Versions of jax, numpy and grain are not part of it: most of them draw alike, and where one does not, these numbers
    differ. What rounding may change (a normal number's last digit) enters by its order alone.
    """
    return {**random_settings(), "drawn": _drawn(*random_settings().values())}


def random_settings() -> dict[str, Any]:
    """JAX's settings that change what is drawn. Asks no device."""
    names = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")
    return {name: getattr(jax.config, name) for name in names}


@functools.cache
def _drawn(*settings: Any) -> list[Any]:
    """Numbers as the steps draw them, once for each of JAX's `settings`."""
    key = jax.random.fold_in(jax.random.key(0), 1)
    return [
        np.asarray(jax.random.uniform(key, (2,)), np.float64).tolist(),
        np.asarray(jax.random.randint(key, (4,), 0, 1000)).tolist(),
        np.argsort(np.asarray(jax.random.normal(key, (8,)))).tolist(),
        next(batches(np.arange(8), batch_size=8, seed=0)).tolist(),
    ]
