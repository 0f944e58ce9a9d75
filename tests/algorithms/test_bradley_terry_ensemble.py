"""An ensemble's loss beside its definition, and that its members come to differ by their pairs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.algorithms.bradley_terry_ensemble import BradleyTerryEnsemble
from ctrl_jax.steps import ensemble
from ctrl_jax.types import Examples, Prompts, Responses

PAIRS, MEMBERS, TOKENS = 6, 3, 4


def reward(params, prompts, responses):
    """A member's reward of a response is its entry for the only token: [B, 2, M]."""
    return params[responses.tokens[..., 0]]


ALGORITHM = BradleyTerryEnsemble(reward, MEMBERS, seed=5)


@pytest.fixture
def pairs():
    tokens = np.random.default_rng(0).integers(0, TOKENS, (PAIRS, 2, 1))
    ids = jnp.arange(PAIRS, dtype=jnp.uint32) + 10
    return Examples(
        Prompts(jnp.zeros((PAIRS, 1), jnp.int32), jnp.ones(PAIRS, jnp.int32), ids),
        Responses(jnp.asarray(tokens, jnp.int32), jnp.ones((PAIRS, 2), jnp.int32)),
    )


@pytest.fixture
def params():
    return jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, MEMBERS)), jnp.float32)


def loss(params, pairs):
    mean, rewards = ALGORITHM.loss(params, {}, pairs, ALGORITHM.targets(pairs), None)
    return mean.value, rewards


def test_the_loss_and_its_gradient_are_those_of_the_definition(pairs, params):
    weights = np.asarray(ensemble.bootstrap_weights(pairs.prompts.ids, jax.random.key(5), MEMBERS))
    assert len(np.unique(weights)) > 2 and (weights == 0).any()
    tokens, table = np.asarray(pairs.responses.tokens)[..., 0], np.asarray(params, np.float64)
    expected, slopes = 0.0, np.zeros(table.shape)
    for (chosen, rejected), row in zip(tokens, weights, strict=True):
        for member, weight in enumerate(row):
            gap = table[chosen, member] - table[rejected, member]
            expected += weight * np.log1p(np.exp(-gap)) / weights.sum()
            for token, sign in ((chosen, -1), (rejected, 1)):
                slopes[token, member] += sign * weight / (1 + np.exp(gap)) / weights.sum()
    (found, rewards), gradient = jax.value_and_grad(loss, has_aux=True)(params, pairs)
    assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)
    accuracy = ALGORITHM.measure(pairs, None, rewards)["accuracy"].value
    mean = table.mean(axis=1)
    assert accuracy == pytest.approx(np.mean([(1 + np.sign(mean[c] - mean[r])) / 2 for c, r in tokens]))


def test_heads_that_start_alike_part_by_their_pairs(pairs):
    gradient = jax.grad(lambda params: loss(params, pairs)[0])(jnp.zeros((TOKENS, MEMBERS)))
    assert np.ptp(np.asarray(gradient), axis=1).max() > 0.01
