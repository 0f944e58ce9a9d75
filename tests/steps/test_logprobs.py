import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ctrl_jax.models import costs
from ctrl_jax.steps import logprobs
from ctrl_jax.types import Policy, Responses

B, N, T, D, V = 8, 2, 5, 6, 11
KEYS = jax.random.split(jax.random.key(0), 5)
WEIGHTS, OTHER = (jax.random.normal(key, (D, V)) for key in KEYS[:2])
FEATURES, OTHER_FEATURES = (jax.random.normal(key, (B, N, T, D)) for key in KEYS[2:4])
TOKENS = jax.random.randint(KEYS[4], (B, N, T), 0, V)


def unembed(params, features):
    return features @ params


def log_softmax(features, weights, temperature):
    logits = np.asarray(features, np.float64) @ np.asarray(weights, np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(weights, features, chunk_size=4096, temperature=1.0, tokens=TOKENS, other=OTHER_FEATURES):
    return logprobs.compare(
        unembed, weights, features, OTHER, other, tokens, temperature=temperature, chunk_size=chunk_size
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 80, 4096])
def test_definition_whatever_the_chunks(temperature, chunk_size):
    law = log_softmax(FEATURES, WEIGHTS, temperature)
    other = log_softmax(OTHER_FEATURES, OTHER, temperature)
    chosen = np.take_along_axis(law, np.asarray(TOKENS)[..., None], -1)[..., 0]
    result = logprobs.token_log_probs(
        unembed, WEIGHTS, FEATURES, TOKENS, temperature=temperature, chunk_size=chunk_size
    )
    np.testing.assert_allclose(result, chosen, atol=1e-5)
    comparison = compare(WEIGHTS, FEATURES, chunk_size, temperature)
    np.testing.assert_allclose(comparison.log_probs, chosen, atol=1e-5)
    np.testing.assert_allclose(
        comparison.reference_log_probs, np.take_along_axis(other, np.asarray(TOKENS)[..., None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(comparison.kl, (np.exp(law) * (law - other)).sum(-1), atol=1e-5)


def test_policies_are_compared_behind_one_trunk_the_reference_s():
    read = []

    def below(params, prompts, responses):
        read.append(params)
        return 3.0

    policy = Policy(below, lambda params, trunk, *_: trunk * FEATURES, unembed, None, None, None)
    found = logprobs.compare_policies(
        policy, WEIGHTS, OTHER, None, Responses(TOKENS, None), temperature=1.0, chunk_size=50
    )
    expected = compare(WEIGHTS, 3 * FEATURES, other=3 * FEATURES)
    assert len(read) == 1 and read[0] is OTHER
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_chunks_change_no_gradient():
    def loss(weights, features, chunk_size):
        comparison = compare(weights, features, chunk_size)
        return (comparison.kl + comparison.log_probs).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, parts = gradient(WEIGHTS, FEATURES, 4096), gradient(WEIGHTS, FEATURES, 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, parts)


def test_no_gradient_reaches_the_reference():
    gradient = jax.grad(lambda other: (compare(WEIGHTS, FEATURES, other=other).kl).sum())(OTHER_FEATURES)
    np.testing.assert_array_equal(gradient, 0)


def test_the_logits_of_all_tokens_never_exist():
    """The largest array of the compiled gradient is below [B·N·T, V] once chunks are small."""
    vocabulary, rows = 512, 256
    weights = jnp.ones((D, vocabulary))
    features = jnp.ones((1, 1, rows, D))
    tokens = jnp.zeros((1, 1, rows), jnp.int32)

    def peak(chunk_size):
        def loss(weights, features):
            return logprobs.token_log_probs(unembed, weights, features, tokens, chunk_size=chunk_size).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, features).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(rows // 16) < peak(rows) / 4


@pytest.mark.parametrize("measure", ["token_log_probs", "compare"])
def test_the_loss_of_a_large_vocabulary_takes_less_than_a_tenth_of_its_logits(measure):
    """Loss and gradient of [8, 512] tokens, 128k of vocabulary, with the chunks that the jobs use."""
    vocabulary, width = 128 * 1024, 16
    weights = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    features = jax.ShapeDtypeStruct((8, 1, 512, width), jnp.float32)
    tokens = jax.ShapeDtypeStruct((8, 1, 512), jnp.int32)
    chunk_size = costs.chunk_size(vocabulary, None)

    def loss(weights, features, other, other_features, tokens):
        if measure == "token_log_probs":
            return logprobs.token_log_probs(unembed, weights, features, tokens, chunk_size=chunk_size).sum()
        comparison = logprobs.compare(unembed, weights, features, other, other_features, tokens, chunk_size=chunk_size)
        return (comparison.kl + comparison.log_probs).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(weights, features, weights, features, tokens).compile()
    logits = 8 * 512 * vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 10


@pytest.mark.parametrize("chunk_size", [7, 4096])
def test_loss_and_gradients_are_those_of_the_plain_form(chunk_size):
    def loss(compared):
        # Weights of their own a token, so that no error cancels.
        scale = jnp.arange(1.0, 1 + B * N * T).reshape(B, N, T) / (B * N * T)
        return (scale * compared.log_probs + jnp.flip(scale) * compared.kl).sum()

    def plain(weights, features):
        law = jax.nn.log_softmax(features @ weights / 0.7)
        reference = jax.nn.log_softmax(OTHER_FEATURES @ OTHER / 0.7)
        chosen, of_reference = (jnp.take_along_axis(x, TOKENS[..., None], -1)[..., 0] for x in (law, reference))
        return loss(logprobs.Comparison(chosen, of_reference, (jnp.exp(law) * (law - reference)).sum(-1)))

    def chunked(weights, features):
        return loss(compare(weights, features, chunk_size, temperature=0.7))

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(WEIGHTS, FEATURES) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_token_that_cannot_be_said_has_no_gradient():
    """Logits of −inf, as a banned token has them, under both laws."""
    banned = jnp.where(jnp.arange(V) == V - 1, -jnp.inf, 0.0)[None, :]

    def loss(weights, features):
        comparison = logprobs.compare(
            lambda params, features: features @ params + banned, weights, features, OTHER, OTHER_FEATURES,
            TOKENS % (V - 1),
        )  # fmt: skip
        return (comparison.kl + comparison.log_probs).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(WEIGHTS, FEATURES)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradients)
    np.testing.assert_array_equal(gradients[0][:, V - 1], 0)
    assert (gradients[0][:, : V - 1] != 0).all()


def test_sharded_is_single_device(mesh):
    def value_and_gradient(weights, features, tokens, other):
        def loss(weights):
            comparison = compare(weights, features, tokens=tokens, other=other)
            return (comparison.kl + comparison.log_probs).sum(), comparison

        return jax.value_and_grad(loss, has_aux=True)(weights)

    def sharded(weights, features, tokens, other):
        def loss(weights):
            comparison = compare(weights, features, tokens=tokens, other=other)
            return jax.lax.psum((comparison.kl + comparison.log_probs).sum(), "data"), comparison

        return jax.value_and_grad(loss, has_aux=True)(weights)

    mapped = jax.shard_map(
        sharded, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=((P(), P("data")), P())
    )
    arguments = (WEIGHTS, FEATURES, TOKENS, OTHER_FEATURES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(mapped)(*arguments),
        jax.jit(value_and_gradient)(*arguments),
    )
