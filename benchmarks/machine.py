"""What this machine can do, measured: matrix products, and reads from memory.

    python -m benchmarks.machine jax|torch cpu|gpu PRODUCTS PASS

Given a list of products [m, k, n], prints their best seconds, each again and again with the same factors; of a pass, a
list of products too, the best seconds of all in a row, each with weights of its own, so that they come from memory
where the cache cannot hold them; and the best bandwidth in bytes/s. In float32, on a GPU in bfloat16.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

LARGE = {"cpu": (2048, 2048, 2048), "gpu": (8192, 8192, 8192)}
READ_BYTES = {"cpu": 2**29, "gpu": 2**33}
SECONDS, PASS_SECONDS = 0.4, 2.0
"""What one measurement takes, of a product and of a whole pass. The best of many short ones: a floor is what the
machine does undisturbed."""


def best_seconds(run: Callable[[], Any], seconds: float = SECONDS) -> float:
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


Product = tuple[int, int, int]


def with_jax(products: list[Product], in_a_row: list[Product], device: str) -> tuple[list[float], float, float]:
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
    factors = [(random(m, k), random(k, n)) for m, k, n in in_a_row]
    all_products = jax.jit(lambda factors: [left @ right for left, right in factors])
    pass_seconds = best_seconds(lambda: jax.block_until_ready(all_products(factors)), PASS_SECONDS)
    total = jax.jit(jnp.sum)
    array = jnp.ones(READ_BYTES[device] // 4)
    return found, pass_seconds, READ_BYTES[device] / best_seconds(lambda: total(array).block_until_ready())


def with_torch(products: list[Product], in_a_row: list[Product], device: str) -> tuple[list[float], float, float]:
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
    # As a linear layer holds them.
    factors = [(torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).T) for m, k, n in in_a_row]
    pass_seconds = best_seconds(finished(lambda: [torch.mm(left, right) for left, right in factors]), PASS_SECONDS)
    array = torch.ones(READ_BYTES[device] // 4)
    return found, pass_seconds, READ_BYTES[device] / best_seconds(finished(array.sum))


def main() -> None:
    library, device, *lists = sys.argv[1:]
    measure = {"jax": with_jax, "torch": with_torch}[library]
    products, in_a_row = ([tuple(product) for product in json.loads(given)] for given in lists)
    seconds, pass_seconds, bandwidth = measure(products, in_a_row, device)
    print(json.dumps({"seconds": seconds, "pass_seconds": pass_seconds, "bandwidth": bandwidth}))


if __name__ == "__main__":
    main()
