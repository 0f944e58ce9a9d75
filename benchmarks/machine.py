"""What this machine can do, measured: matrix products in float32, and reads from memory.

    python -m benchmarks.machine jax|torch JSON

Given a list of products [m, k, n], prints their best seconds, and the best bandwidth in bytes/s.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

LARGE = (2048, 2048, 2048)
READ_BYTES = 2**29
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


def with_jax(products: list[tuple[int, int, int]]) -> tuple[list[float], float]:
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.dot)
    found = []
    for m, k, n in products:
        left, right = jnp.ones((m, k)), jnp.ones((k, n))
        found.append(best_seconds(lambda left=left, right=right: multiply(left, right).block_until_ready()))
    total = jax.jit(jnp.sum)
    array = jnp.ones(READ_BYTES // 4)
    return found, READ_BYTES / best_seconds(lambda: total(array).block_until_ready())


def with_torch(products: list[tuple[int, int, int]]) -> tuple[list[float], float]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for m, k, n in products:
        left, out = torch.ones(m, k), torch.empty(m, n)
        # As a linear layer holds its weights, and as they are multiplied.
        layouts = torch.ones(n, k).T, torch.ones(k, n)
        found.append(
            min(
                best_seconds(lambda left=left, right=right, out=out: torch.mm(left, right, out=out))
                for right in layouts
            )
        )
    array = torch.ones(READ_BYTES // 4)
    return found, READ_BYTES / best_seconds(array.sum)


def main() -> None:
    library, products = sys.argv[1:]
    measure = {"jax": with_jax, "torch": with_torch}[library]
    seconds, bandwidth = measure([tuple(product) for product in json.loads(products)])
    print(json.dumps({"seconds": seconds, "bandwidth": bandwidth}))


if __name__ == "__main__":
    main()
