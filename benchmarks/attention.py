"""Attention to a shared prompt and to a response's own tokens, in its two forms: plain, and fused where it is.

    python -m benchmarks.attention        or        python -m benchmarks.attention --help

Times one layer's forward pass, and its forward pass with the gradient, in the shapes of policy updates. On an NVIDIA
GPU in bfloat16 the fused form is cuDNN's kernel (models/attention.py says when the decoder takes it); elsewhere XLA
makes it, which tells that both agree, and little of their speed.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.models import attention
from ctrl_jax.models.attention import KeysValues, attend, attend_fused, has_kernel, visible
from ctrl_jax.runtime.console import say, table

SHAPES = ((32, 16, 128, 128), (4, 8, 512, 512), (4, 4, 1024, 1024))
"""Prompts, responses each, tokens of a prompt and of a response."""


def inputs(prompts: int, samples: int, prompt_length: int, length: int, heads: int, kv_heads: int, dim: int) -> Any:
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    queries = draw(keys[0], prompts, samples, length, heads, dim)
    shared = KeysValues(*(draw(key, prompts, kv_heads, prompt_length, dim) for key in keys[1:3]))
    own = KeysValues(*(draw(key, prompts * samples, kv_heads, length, dim) for key in keys[3:]))
    # Prompts of different lengths.
    lengths = prompt_length - jnp.arange(prompts) % prompt_length // 2
    mask = jnp.broadcast_to((jnp.arange(prompt_length) < lengths[:, None])[:, None], (prompts, length, prompt_length))
    return (queries, shared, own), mask


def seconds(function: Callable[..., Any], arguments: Any, repeats: int) -> float:
    """The median of some calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(form: Callable[..., jax.Array], arguments: Any, mask: jax.Array, repeats: int) -> tuple[jax.Array, ...]:
    """(what it gives, seconds forward, seconds with the gradient)"""
    queries = arguments[0]
    index = jnp.arange(queries.shape[2])

    def forward(queries: jax.Array, shared: KeysValues, own: KeysValues) -> jax.Array:
        return form(queries, shared, mask, own, visible(index, index, None), scale=queries.shape[-1] ** -0.5)

    def loss(*arguments: Any) -> jax.Array:
        return jnp.square(forward(*arguments).astype(jnp.float32)).sum()

    forward, gradient = jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return forward(*arguments), seconds(forward, arguments, repeats), seconds(gradient, arguments, repeats)


def main(heads: int = 32, kv_heads: int = 8, dim: int = 64, repeats: int = 10, shorter: int = 1) -> None:
    """Times both forms of attention.

    Args:
      heads: of queries.
      kv_heads: of keys and values.
      dim: of a head.
      repeats: of which the median is taken.
      shorter: divides all lengths, for a small machine.
    """
    fits = attention.fits_kernel(jnp.zeros((1, 1, 2, heads, dim), jnp.bfloat16), None) and has_kernel(make_mesh(1))
    forms = {"plain": attend, "fused": functools.partial(attend_fused, implementation="cudnn" if fits else "xla")}
    rows: list[list[object]] = []
    for prompts, samples, *lengths in SHAPES:
        prompt_length, length = (each // shorter for each in lengths)
        arguments, mask = inputs(prompts, samples, prompt_length, length, heads, kv_heads, dim)
        results = {name: measure(form, arguments, mask, repeats) for name, form in forms.items()}
        expected = results["plain"][0].astype(jnp.float32)
        for name, (out, *times) in results.items():
            apart = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
            shape = f"{prompts} × {samples}, {prompt_length} + {length}"
            rows.append([shape, name, *(f"{1e3 * each:.2f}" for each in times), f"{apart:.0e}"])
    table(
        f"A layer's attention on {jax.devices()[0].device_kind}, bfloat16; fused by {'cuDNN' if fits else 'XLA'}",
        ["prompts × responses, tokens", "form", "forward ms", "with gradient ms", "relative difference"],
        rows,
    )
    say("What bfloat16 rounds in another order makes a difference of some 1e-3.")


if __name__ == "__main__":
    tyro.cli(main)
