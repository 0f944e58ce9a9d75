"""The least time that the work can take on a machine: its matrix products and its reads of memory, and nothing else.

Every token is computed once. Rollouts share their prompt: its keys and values are made once and read once a decode
step, and the update reads it once. Attention's products, norms, softmax and sampling count nothing. So no program
reaches the floor; how near one comes says how much of its time is overhead.

Letters as in `ctrl_jax.types`; R = B N rows, W the parameters of the layers' matrices, F bytes a number: 4, or 2
where bfloat16 is sampled from.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import Case, Sizes

FLOAT = 4


def itemsize(case: Case) -> int:
    """Bytes of a weight that is sampled from, and of what is kept in the caches."""
    return 2 if case.dtype == "bfloat16" else FLOAT


Product = tuple[int, int, int]
"""[m, k] times [k, n]."""


@dataclass(frozen=True)
class Machine:
    rate: float
    """FLOP/s of a large product."""
    bandwidth: float
    """Bytes/s read from memory."""
    product_seconds: dict[Product, float]
    """Of products in a decode step's shapes, their factors in the processor's cache where they fit."""
    pass_seconds: float
    """Of all products of a decode step in a row, each with weights of its own."""


def decode_products(sizes: Sizes, rows: int) -> Iterator[tuple[int, Product]]:
    """(how often, shape) of the products of one decode step: joined where they share their input."""
    heads = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    yield sizes.layers, (rows, sizes.width, heads)
    yield sizes.layers, (rows, sizes.heads * sizes.head_dim, sizes.width)
    yield sizes.layers, (rows, sizes.width, 2 * sizes.mlp_width)
    yield sizes.layers, (rows, sizes.mlp_width, sizes.width)
    yield 1, (rows, sizes.width, sizes.vocabulary_size)


def with_whole_passes(parts: dict[str, float], case: Case, machine: Machine) -> float:
    """Seconds of a floor's parts, but a decode step takes what its products took one after the other.

    Higher than the floor where a library cannot read weights as fast as the memory allows, while it multiplies.
    """
    return sum(parts.values()) - parts["decode"] + (case.new_tokens - 1) * machine.pass_seconds


def sampling_seconds(sizes: Sizes, case: Case, machine: Machine) -> dict[str, float]:
    """Parts of the floor of sampling.

    - decode: T - 1 steps (the prefill gives the first token), each the sum over its products of
      max(measured seconds, F k n / bandwidth): weights that do not stay in the cache are read every step;
    - cache: what is read in those steps, of each prompt once and of each row its own tokens,
      sum over t = 1 .. T - 1 of (B P + R t) · 2 F · layers · kv_heads · head_dim / bandwidth;
    - prefill: 2 (W B P + V D B) / rate, logits of each prompt's last token.
    """
    steps = case.new_tokens - 1
    dense = sum(
        count * max(machine.product_seconds[m, k, n], itemsize(case) * k * n / machine.bandwidth)
        for count, (m, k, n) in decode_products(sizes, case.rows)
    )
    token_bytes = 2 * itemsize(case) * sizes.layers * sizes.kv_heads * sizes.head_dim
    tokens_read = steps * case.prompts * case.prompt_length + case.rows * steps * (steps + 1) // 2
    prompt_tokens = case.prompts * case.prompt_length
    unembedding = sizes.vocabulary_size * sizes.width
    return {
        "decode": steps * dense,
        "cache": token_bytes * tokens_read / machine.bandwidth,
        "prefill": 2 * (sizes.body * prompt_tokens + unembedding * case.prompts) / machine.rate,
    }


def step_seconds(sizes: Sizes, case: Case, machine: Machine) -> dict[str, float]:
    """Parts of the floor of a whole RL step: sampling, and

    - reference: one forward pass, 2 (W (B P + R T) + V D R T) / rate;
    - update: policy's forward pass and its backward pass of twice the work, three times that;
    - optimizer: Adam reads parameters, gradients and two moments and writes all but the gradients, 7 · 4 · parameters /
      bandwidth, in float32 everywhere.
    """
    forward = forward_flops(sizes, case) / machine.rate
    return sampling_seconds(sizes, case, machine) | {
        "reference": forward,
        "update": 3 * forward,
        "optimizer": 7 * FLOAT * sizes.parameters / machine.bandwidth,
    }


def forward_flops(sizes: Sizes, case: Case) -> int:
    """Of one pass over prompts and responses, 2 (W (B P + R T) + V D R T)."""
    tokens = case.prompts * case.prompt_length + case.tokens
    return 2 * (sizes.body * tokens + sizes.vocabulary_size * sizes.width * case.tokens)


def model_flops(sizes: Sizes, case: Case) -> int:
    """What the task multiplies with its matrices, each token once a pass, attention left out.

    Sampling reads each prompt and all tokens of a response but its last, and makes logits for each new token; a step
    is that, a reference's pass, and an update of three.
    """
    sampling = forward_flops(sizes, case) - 2 * sizes.body * case.rows
    return sampling if case.task == "sampling" else sampling + 4 * forward_flops(sizes, case)


def parts(sizes: Sizes, case: Case, machine: Machine) -> dict[str, float]:
    return {"sampling": sampling_seconds, "step": step_seconds}[case.task](sizes, case, machine)
