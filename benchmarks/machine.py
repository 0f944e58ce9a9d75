"""What this machine can do, measured: matrix products, and reads from memory.

    python -m benchmarks.machine jax|torch cpu|gpu JSON

Given a list of products [m, k, n], prints their best seconds, and the best bandwidth in bytes/s: in float32, on a GPU
in bfloat16.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

LARGE = {"cpu": (2048, 2048, 2048), "gpu": (8192, 8192, 8192)}
READ_BYTES = {"cpu": 2**29, "gpu": 2**33}
SECONDS = 0.4
"""What one measurement takes. The best of many short ones: a floor is what the machine does undisturbed."""


def best_seconds(run: Callable[[], Any], seconds: float = SECONDS) -> float:
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def with_jax(products: list[tuple[int, int, int]], device: str) -> tuple[list[float], float]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if device == "gpu" else jnp.float32
    multiply = jax.jit(jnp.dot)

    def random(*shape: int) -> jax.Array:
        # Not zeros or ones: a GPU is faster with those.
        return jax.random.normal(jax.random.key(0), shape, dtype)

    found = []
    for m, k, n in products:
        left, right = random(m, k), random(k, n)
        found.append(best_seconds(lambda left=left, right=right: multiply(left, right).block_until_ready()))
    total = jax.jit(jnp.sum)
    array = jnp.ones(READ_BYTES[device] // 4)
    return found, READ_BYTES[device] / best_seconds(lambda: total(array).block_until_ready())


def with_torch(products: list[tuple[int, int, int]], device: str) -> tuple[list[float], float]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_default_device("cuda" if device == "gpu" else "cpu")
    dtype = torch.bfloat16 if device == "gpu" else torch.float32
    finish = torch.cuda.synchronize if device == "gpu" else (lambda: None)

    def finished(run: Callable[[], Any]) -> Callable[[], None]:
        return lambda: (run(), finish())[1]

    found = []
    for m, k, n in products:
        left, out = torch.randn(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
        # As a linear layer holds its weights, and as they are multiplied.
        layouts = torch.randn(n, k, dtype=dtype).T, torch.randn(k, n, dtype=dtype)
        found.append(
            min(
                best_seconds(finished(lambda left=left, right=right, out=out: torch.mm(left, right, out=out)))
                for right in layouts
            )
        )
    array = torch.ones(READ_BYTES[device] // 4)
    return found, READ_BYTES[device] / best_seconds(finished(array.sum))


def main() -> None:
    library, device, products = sys.argv[1:]
    measure = {"jax": with_jax, "torch": with_torch}[library]
    seconds, bandwidth = measure([tuple(product) for product in json.loads(products)], device)
    print(json.dumps({"seconds": seconds, "bandwidth": bandwidth}))


if __name__ == "__main__":
    main()
