"""Double precision for the numbers that are solved for once, whatever the precision that trains."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """JAX computes in float64, on the CPU, and at once even where a `jit` is being traced."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(cpu):
        yield


def evaluate(
    function: Callable[[jax.Array], jax.Array], ranks: np.ndarray, dtype: type[np.floating] = np.float64
) -> np.ndarray:
    """The elementwise `function` at `ranks` as `dtype` computes it; `function` may be written in JAX or in numpy."""
    with double_precision():
        values = np.asarray(function(jnp.asarray(ranks, dtype)), np.float64)
    return np.broadcast_to(values, np.shape(ranks))
