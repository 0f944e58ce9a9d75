"""Decoders of the enumerable language: the law of what they pick is the procedure's, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.decoding import order
from ctrl_jax.theory import procedures
from ctrl_jax.types import Prompts, Responses
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

PARAMS = fakes.params(jax.random.key(1))
EVERY = fakes.every_response()
PROMPTS = 20_000


def place(responses: Responses) -> np.ndarray:
    """Where in EVERY each response is."""
    known = {tuple(row): index for index, row in enumerate(np.asarray(EVERY.tokens[0]).tolist())}
    return np.array([[known[tuple(row)] for row in of_prompt] for of_prompt in np.asarray(responses.tokens).tolist()])


def score(prompts: Prompts, responses: Responses) -> jax.Array:
    """A reward that no two responses share: their number in base 3, which rises and falls."""
    return jnp.sin(1.0 + (responses.tokens @ jnp.array([9, 3, 1])).astype(jnp.float32))


def decode(name: str, prompts: Prompts, key: int = 0) -> Responses:
    decoder = order.decoder(procedures.parse(name), max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    found = jax.jit(lambda prompts: decoder(fakes.policy, PARAMS, score, prompts, jax.random.key(key)))(prompts)
    assert found.scored == procedures.parse(name).num_samples
    assert np.all(found.sampled >= found.scored) and np.all(found.sampled <= found.scored * fakes.LENGTH)
    return found.responses


@pytest.mark.parametrize("name", ["sampling", "best_of_3", "worst_of_4", "soft_best_of_3(0.5)"])
def test_what_is_picked_has_the_law_of_the_procedure(name):
    """The CDF of the picked reward is T[F], where F is the CDF of one sample's, which enumeration gives."""
    prompt = fakes.prompts(0)
    probabilities = np.exp(np.asarray(fakes.log_prob_of(PARAMS, prompt, EVERY), np.float64))[0]
    by_reward = np.argsort(np.asarray(score(prompt, EVERY))[0])
    cdf = np.cumsum(probabilities[by_reward])
    assert cdf[-1] == pytest.approx(1, abs=1e-6)
    expected = np.diff(np.asarray(procedures.parse(name).rank_cdf(np.minimum(cdf, 1))), prepend=0.0)

    picked = decode(name, fakes.prompts(*range(0, 2 * PROMPTS, 2)))  # the language knows prompts by id mod 2
    assert picked.tokens.shape == (PROMPTS, 1, fakes.LENGTH)
    counts = np.bincount(place(picked)[:, 0], minlength=len(by_reward))[by_reward]
    spread = np.sqrt(PROMPTS * expected * (1 - expected))
    assert np.all(np.abs(counts - PROMPTS * expected) < 4.5 * spread + 1e-6)


def test_a_prompt_gets_the_same_response_in_any_batch():
    name, ids = "soft_best_of_3(0.5)", range(40)
    together = decode(name, fakes.prompts(*ids))
    alone = decode(name, fakes.prompts(*list(ids)[17:23]))
    np.testing.assert_array_equal(together.tokens[17:23], alone.tokens)
    other = decode(name, fakes.prompts(*ids), key=1)
    assert np.any(np.asarray(other.tokens) != np.asarray(together.tokens))


def test_the_response_that_is_taken_keeps_its_length():
    index = jnp.array([len(EVERY.lengths[0]) - 1])
    taken = order.take(EVERY, index)
    np.testing.assert_array_equal(taken.tokens[0, 0], EVERY.tokens[0, -1])
    assert taken.lengths.tolist() == [[int(EVERY.lengths[0, -1])]]
