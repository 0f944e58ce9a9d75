"""The cost model against XLA's own count of what it compiles, and against the shapes that are made."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from ctrl_jax.config import Lora
from ctrl_jax.models import architecture, costs, decoder, huggingface, lora
from ctrl_jax.models.architecture import Architecture, Layer
from ctrl_jax.models.costs import Batch, Work
from ctrl_jax.types import Prompts, Responses
from tests.models.oracles import cases

NO_ADAPTER = Lora()
BATCH = Batch(prompts=4, samples=4, prompt_length=32, response_length=24)
SIZES = Architecture(
    vocabulary_size=384,
    width=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=320,
    layers=(Layer(None, architecture.rotary_frequencies(32, 1e4)),) * 3,
    tied_embeddings=True,
    embedding_scale=1.0,
    query_scale=32**-0.5,
    norm_epsilon=1e-6,
)


def shaped(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def texts(batch):
    prompts = Prompts(
        shaped((batch.prompts, batch.prompt_length), jnp.int32),
        shaped((batch.prompts,), jnp.int32),
        shaped((batch.prompts,), jnp.uint32),
    )
    rows = (batch.prompts, batch.samples)
    return prompts, Responses(shaped((*rows, batch.response_length), jnp.int32), shaped(rows, jnp.int32))


def variables(model):
    return jax.eval_shape(lambda key: {"params": model.init(key, *examples())["params"]}, jax.random.key(0))


def examples():
    prompts = Prompts(jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32))
    return prompts, Responses(jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1), jnp.int32))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(function, *arguments):
    # What XLA counts is settled before LLVM, which would take most of the time.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*arguments).compile(compiler_options=fast)


@pytest.mark.parametrize("name", cases.read("configs"))
def test_parameters_are_those_that_are_made(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(cases.read("configs")[name]["given"]))
    sizes = huggingface.architecture(tmp_path, dtype="float32")
    assert costs.parameters(sizes) == count(variables(decoder.Decoder(sizes)))


@pytest.mark.parametrize(
    "adapter", [Lora(rank=3), Lora(rank=8, targets=("q_proj", "down_proj")), Lora(rank=3, last_layers=2)], ids=str
)
def test_parameters_of_an_adapter(adapter):
    made = jax.eval_shape(
        lambda key: lora.init(decoder.Decoder(SIZES, adapter).init(key, *examples())["params"], adapter, key),
        jax.random.key(0),
    )
    assert costs.adapter_parameters(SIZES, adapter) == count(made)


@pytest.mark.parametrize(
    "adapter", [NO_ADAPTER, Lora(rank=16), Lora(rank=16, last_layers=2)], ids=["whole", "adapter", "last layers"]
)
def test_flops_of_forward_and_backward_are_xlas(adapter):
    # XLA counts norms, masks and the softmax too: 1 to 2 % at this width. The rest is for how it fuses them.
    model = decoder.Decoder(SIZES, adapter)
    policy = decoder.policy(model)
    frozen = variables(model)
    trained = frozen
    if adapter.rank:
        key = shaped((), jax.random.key(0).dtype)
        trained = {"lora": jax.eval_shape(lambda params, key: lora.init(params, adapter, key), frozen["params"], key)}
    prompts, responses = texts(BATCH)

    def features(trained, frozen, prompts, responses):
        return policy.apply(lora.overlay(frozen, trained), prompts, responses)

    def loss(*arguments):
        return (features(*arguments) ** 2).sum()

    # The first token is predicted by the prompt: T - 1 are read.
    length = BATCH.response_length - 1
    forward = costs.forward(SIZES, adapter, BATCH, length=length)
    both = forward + costs.backward(SIZES, adapter, BATCH, length=length)
    arguments = (trained, frozen, prompts, responses)
    assert compiled(features, *arguments).cost_analysis()["flops"] == pytest.approx(forward.flops, rel=0.05)
    assert compiled(jax.grad(loss), *arguments).cost_analysis()["flops"] == pytest.approx(both.flops, rel=0.05)


def test_the_layers_in_two_parts_are_all_of_them():
    below, above = costs.split(SIZES, Lora(rank=4, last_layers=2))
    assert (below.layers, above.layers) == (SIZES.layers[:1], SIZES.layers[1:])
    assert costs.split(SIZES, NO_ADAPTER) == (dataclasses.replace(SIZES, layers=()), SIZES)


def test_flops_of_sampling_are_xlas():
    policy = decoder.policy(decoder.Decoder(SIZES))
    params = variables(decoder.Decoder(SIZES))
    prompts, _ = texts(BATCH)
    rows = (BATCH.prompts, BATCH.samples)

    def first(params, prompts):
        features, _ = policy.prefill(params, prompts)
        return policy.unembed(params, jnp.repeat(features, BATCH.samples, axis=0))

    def another(params, prompt_cache, response_cache, lengths, tokens, index):
        features, _ = policy.decode(params, prompt_cache, response_cache, lengths, tokens, index)
        return policy.unembed(params, features)

    prompt_cache = jax.eval_shape(policy.prefill, params, prompts)[1]
    response_cache = jax.eval_shape(lambda cache: policy.start(cache, rows[1], BATCH.response_length), prompt_cache)
    lengths, tokens, index = shaped(rows[:1], jnp.int32), shaped(rows, jnp.int32), shaped((), jnp.int32)
    step = compiled(another, params, prompt_cache, response_cache, lengths, tokens, index)

    prefill, decode = costs.prefill(SIZES, NO_ADAPTER, BATCH), costs.decode(SIZES, NO_ADAPTER, BATCH)
    assert compiled(first, params, prompts).cost_analysis()["flops"] == pytest.approx(prefill.flops, rel=0.05)
    steps = BATCH.response_length - 1
    assert steps * step.cost_analysis()["flops"] == pytest.approx(decode.flops, rel=0.05)


def test_caches_are_as_large_as_those_that_are_made():
    policy = decoder.policy(decoder.Decoder(SIZES))
    prompts, _ = texts(BATCH)
    prompt_cache = jax.eval_shape(policy.prefill, variables(decoder.Decoder(SIZES)), prompts)[1]
    made = jax.eval_shape(lambda cache: policy.start(cache, BATCH.samples, BATCH.response_length), prompt_cache)
    assert costs.prompt_cache(SIZES, BATCH) == size(prompt_cache)
    assert costs.response_cache(SIZES, BATCH) == size(made)


def test_bytes_and_activations_are_near_xlas():
    policy = decoder.policy(decoder.Decoder(SIZES))
    arguments = (variables(decoder.Decoder(SIZES)), *texts(BATCH))
    length = BATCH.response_length - 1
    forward = costs.forward(SIZES, NO_ADAPTER, BATCH, length=length)
    moved = compiled(policy.apply, *arguments).cost_analysis()["bytes accessed"]
    assert 0.6 < forward.moved / moved < 1.6
    gradient = compiled(jax.grad(lambda *arguments: (policy.apply(*arguments) ** 2).sum()), *arguments)
    kept = costs.kept_activations(SIZES, BATCH, length=length, rematerialize=False)
    assert 0.6 < kept / gradient.memory_analysis().temp_size_in_bytes < 1.6


def test_recomputation_keeps_a_fraction():
    deep = Batch(prompts=8, samples=8, prompt_length=256, response_length=256)
    kept = {on: costs.kept_activations(SIZES, deep, length=255, rematerialize=on) for on in (False, True)}
    # Of three layers two are held whole, and a small part of each.
    assert 2 / 4 < kept[True] / kept[False] < 3 / 4


def test_work_adds_up():
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)
    # A product of [5, 128] and [128, 384]; its table, its features, and five passes over the logits.
    assert costs.unembed(SIZES, 5) == Work(2 * 5 * 128 * 384, 4 * (128 * 384 + 128 * 5 + 5 * 5 * 384))
