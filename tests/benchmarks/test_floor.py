"""The floor's formulas against a count, product by product and token by token."""

from dataclasses import replace

from benchmarks.cases import Case, Sizes, random_weights
from benchmarks.floor import (
    Machine,
    decode_products,
    model_flops,
    sampling_seconds,
    step_seconds,
    with_whole_passes,
)

SIZES = Sizes(vocabulary_size=11, width=8, mlp_width=12, layers=3, heads=4, kv_heads=2, tied=False, rope_theta=1e4)
CASE = Case("step", "tiny", prompts=2, samples=3, prompt_length=5, new_tokens=4, repeats=1, contenders=())


def machine(rate: float = 1e30, bandwidth: float = 1e30, product_seconds: float = 0.0) -> Machine:
    return Machine(rate, bandwidth, {product: product_seconds for _, product in decode_products(SIZES, CASE.rows)}, 7.0)


def test_the_parameters_are_those_that_are_written():
    for tied in (False, True):
        sizes = Sizes(11, 8, 12, 3, 4, 2, tied=tied, rope_theta=1e4)
        assert sizes.parameters == sum(array.size for array in random_weights(sizes).values())


def test_a_decode_step_multiplies_with_every_matrix_once():
    weights = random_weights(SIZES)
    matrices = sum(a.size for name, a in weights.items() if a.ndim == 2 and "embed" not in name)
    assert sum(count * k * n for count, (_, k, n) in decode_products(SIZES, CASE.rows)) == matrices
    assert all(m == CASE.rows for _, (m, _, _) in decode_products(SIZES, CASE.rows))


def test_decode_takes_the_longer_of_computing_and_reading():
    products = sum(count for count, _ in decode_products(SIZES, CASE.rows))
    steps = CASE.new_tokens - 1
    assert sampling_seconds(SIZES, CASE, machine(product_seconds=7.0))["decode"] == steps * products * 7.0

    bytes_read = 4 * sum(count * k * n for count, (_, k, n) in decode_products(SIZES, CASE.rows))
    slow = machine(bandwidth=2.0, product_seconds=1e-9)
    assert sampling_seconds(SIZES, CASE, slow)["decode"] == steps * bytes_read / 2.0


def test_the_cache_is_read_once_a_prompt_and_once_a_row():
    reads = 0
    for step in range(1, CASE.new_tokens):
        reads += sum(CASE.prompt_length for _ in range(CASE.prompts))
        reads += sum(step for _ in range(CASE.rows))
    keys_and_values = SIZES.layers * SIZES.kv_heads * (SIZES.width // SIZES.heads) * 2 * 4
    assert sampling_seconds(SIZES, CASE, machine(bandwidth=1.0))["cache"] == reads * keys_and_values


def test_an_update_computes_prompts_once_and_responses_each():
    weights = random_weights(SIZES)
    body = sum(a.size for name, a in weights.items() if a.ndim == 2 and "layers" in name)
    head = weights["lm_head.weight"].size
    forward = 0
    for _ in range(CASE.prompts):
        forward += 2 * body * CASE.prompt_length
        forward += CASE.samples * CASE.new_tokens * 2 * (body + head)
    parts = step_seconds(SIZES, CASE, machine(rate=1.0))
    assert parts["reference"] == forward
    assert parts["update"] == 3 * forward
    assert parts["prefill"] == CASE.prompts * 2 * (body * CASE.prompt_length + head)


def test_adam_moves_seven_floats_a_parameter():
    total = sum(array.size for array in random_weights(SIZES).values())
    assert step_seconds(SIZES, CASE, machine(bandwidth=1.0))["optimizer"] == 7 * 4 * total


def test_whole_passes_take_the_place_of_single_products():
    found = machine(rate=1.0, bandwidth=1.0)
    parts = sampling_seconds(SIZES, CASE, found)
    assert with_whole_passes(parts, CASE, found) == parts["prefill"] + parts["cache"] + 3 * 7.0


def test_model_flops_are_those_of_every_token_once_a_pass():
    weights = random_weights(SIZES)
    body = sum(a.size for name, a in weights.items() if a.ndim == 2 and "layers" in name)
    head = weights["lm_head.weight"].size
    read = CASE.prompts * CASE.prompt_length + CASE.rows * (CASE.new_tokens - 1)
    sampling = 2 * (body * read + head * CASE.rows * CASE.new_tokens)
    assert model_flops(SIZES, replace(CASE, task="sampling")) == sampling
    forward = 2 * (body * (read + CASE.rows) + head * CASE.rows * CASE.new_tokens)
    assert model_flops(SIZES, CASE) == sampling + 4 * forward
