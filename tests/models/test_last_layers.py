"""Adapters on the last layers alone: what is below is read once, and no gradient goes there; nothing else changes."""

import functools
from dataclasses import replace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.algorithms.dpo import Dpo
from ctrl_jax.errors import InputError
from ctrl_jax.models import decoder, lora
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.models.lora import Lora
from ctrl_jax.steps import logprobs
from ctrl_jax.steps.masked import length_mask
from ctrl_jax.types import Examples, Prompts, Responses
from tests.models.test_decoder import CONFIG, KEYS, LENGTHS, PROMPTS, RESPONSES, SIZE, T, V, build, oracle

pytestmark = pytest.mark.usefixtures("compile_fast")

DEEP = replace(CONFIG, layers=4)
SETTINGS = Lora(rank=3, alpha=5.0)
COUNTS = [1, 3, 4]
"""Layers with an adapter; the last is all of them."""


@functools.cache
def parts(count):
    """(the reference's variables, adapters of the last layers that have left their start)"""
    _, params = build(DEEP)
    adapters = lora.init(params, replace(SETTINGS, last_layers=count), KEYS[1])
    return {"params": params}, jax.tree.map(lambda x: x + 0.1, adapters)


@functools.cache
def policy(count=None, rematerialize=False):
    """With a trunk where there is a count; without one it reads the same parameters by all layers at once."""
    return decoder.policy(Decoder(DEEP.architecture(V), replace(SETTINGS, last_layers=count), rematerialize))


def compare(policy, reference, adapters, prompts=PROMPTS, responses=RESPONSES):
    params = {**reference, "lora": adapters}
    return logprobs.compare_policies(policy, params, reference, prompts, responses, temperature=0.7, chunk_size=50)


def loss(policy, reference, adapters):
    comparison = compare(policy, reference, adapters)
    mask = length_mask(RESPONSES.lengths, T)
    return jnp.where(mask, comparison.kl + 0.3 * comparison.log_probs, 0).mean(), comparison


@functools.cache
def taken(adapted, /, **options):
    """((loss, comparison), gradient by the adapters of that many layers); `options` are `policy`'s."""
    reference, adapters = parts(adapted)
    gradient = jax.value_and_grad(functools.partial(loss, policy(**options), reference), has_aux=True)
    return jax.jit(gradient)(adapters)


def assert_close(found, expected, atol=1e-6):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol), found, expected)


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_a_trunk_changes_neither_a_value_nor_a_gradient(count, rematerialize):
    (value, comparison), gradient = taken(count, count=count, rematerialize=rematerialize)
    (expected, other), other_gradient = taken(count)
    assert jnp.abs(comparison.kl).mean() > 1e-2 and all(jnp.abs(x).max() > 1e-5 for x in jax.tree.leaves(gradient))
    assert_close((value, comparison), (expected, other))
    assert_close(gradient, other_gradient)


@pytest.mark.parametrize("count", COUNTS)
def test_log_probs_and_kl_are_the_definitions(count):
    reference, adapters = parts(count)
    merged = lora.merge(reference["params"], adapters, SETTINGS)
    comparison = taken(count, count=count)[0][1]
    for b, n in [(0, 0), (3, 2), (5, 1)]:
        length = int(LENGTHS[b])
        sequence = np.concatenate([PROMPTS.tokens[b, :length], RESPONSES.tokens[b, n]])
        laws = []
        for params in (merged, reference["params"]):
            logits = oracle(DEEP, params, sequence)[length - 1 : length - 1 + T] / 0.7
            laws.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        chosen = [np.take_along_axis(law, np.asarray(RESPONSES.tokens[b, n])[:, None], -1)[:, 0] for law in laws]
        np.testing.assert_allclose(comparison.log_probs[b, n], chosen[0], atol=2e-4)
        np.testing.assert_allclose(comparison.reference_log_probs[b, n], chosen[1], atol=2e-4)
        expected = (np.exp(laws[0]) * (laws[0] - laws[1])).sum(-1)
        np.testing.assert_allclose(comparison.kl[b, n], expected, atol=2e-4)


def test_padding_changes_nothing():
    reference, adapters = parts(1)
    garbage = jnp.where(length_mask(LENGTHS, SIZE), PROMPTS.tokens, (PROMPTS.tokens + 5) % V)
    prompts = Prompts(jnp.pad(garbage, ((0, 0), (0, 4)), constant_values=7), LENGTHS, PROMPTS.ids)
    mask = length_mask(RESPONSES.lengths, T)
    responses = Responses(jnp.where(mask, RESPONSES.tokens, (RESPONSES.tokens + 3) % V), RESPONSES.lengths)
    found = jax.jit(functools.partial(compare, policy(1)))(reference, adapters, prompts, responses)
    for one, other in zip(found, taken(1, count=1)[0][1], strict=True):
        np.testing.assert_allclose(jnp.where(mask, one, 0), jnp.where(mask, other, 0), atol=1e-5)


def test_dpo_takes_the_same_step():
    reference, adapters = parts(1)
    batch = Examples(PROMPTS, Responses(RESPONSES.tokens[:, :2], RESPONSES.lengths[:, :2]))

    def gradient(policy):
        dpo = Dpo(policy, beta=0.3, temperature=0.7, chunk_size=50)
        return jax.jit(
            jax.value_and_grad(lambda x: dpo.loss({**reference, "lora": x}, reference, batch, (), None)[0].value)
        )

    found, expected = gradient(policy(1))(adapters), gradient(policy())(adapters)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(expected[1])) > 1e-3
    assert_close(found, expected)


def products(jaxpr, shapes):
    """Matrix products of a program of which one operand has one of these shapes."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            count += any(operand.aval.shape in shapes for operand in equation.invars)
        count += sum(products(inner, shapes) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("count", COUNTS)
def test_frozen_layers_are_read_once_and_have_no_backward_pass(count):
    reference, adapters = parts(count)
    kernels = {(DEEP.width, DEEP.mlp_width), (DEEP.mlp_width, DEEP.width)}
    # Gate, up and down, of prompts and of responses: each layer that has an adapter in both policies and in the
    # gradient, and the others once.
    of_a_layer = 2 * 3
    gradient = jax.value_and_grad(functools.partial(loss, policy(count), reference), has_aux=True)
    found = products(jax.make_jaxpr(gradient)(adapters).jaxpr, kernels)
    assert found == of_a_layer * ((DEEP.layers - count) + 3 * count)


def test_a_layer_starts_with_the_same_adapter_however_many_have_one():
    _, params = build(replace(CONFIG, layers=12))
    whole, last = (lora.init(params, Lora(rank=2, last_layers=count), KEYS[0]) for count in (None, 3))
    assert set(last) == {"layers_9", "layers_10", "layers_11"}
    for name, adapters in last.items():
        jax.tree.map(np.testing.assert_array_equal, adapters, whole[name])


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(
        InputError, match="last_layers is 5, and the model has 4 layers; give 1 to 4, or leave"
    ) as caught:
        Lora(rank=2, last_layers=5).first_layer(4)
    assert (caught.value.field, caught.value.value) == ("model.lora.last_layers", 5)
    assert [Lora(rank=2, last_layers=count).first_layer(4) for count in (None, 4, 1)] == [0, 0, 3]
