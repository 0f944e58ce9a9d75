"""DPO on the three-token language: its loss by definition, its gradient by the score, its optimum the tilted policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.dpo import Dpo
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.errors import InputError
from ctrl_jax.types import Examples, Prompts, Responses
from tests.steps import fakes

BETA = 0.3
DPO = Dpo(fakes.policy, beta=BETA, temperature=1.0, chunk_size=5)
POLICY, REFERENCE = (fakes.params(jax.random.key(seed)) for seed in (0, 1))
RESPONSES = fakes.every_response()
PROMPT = fakes.prompts(0)


def pairs(chosen: np.ndarray, rejected: np.ndarray) -> Examples:
    """The pairs of responses by their place in RESPONSES, all to one prompt; padding is a token that could be said."""
    index = np.stack([chosen, rejected], axis=1)
    tokens, lengths = np.asarray(RESPONSES.tokens)[0][index], np.asarray(RESPONSES.lengths)[0][index]
    size = len(index)
    prompts = Prompts(np.zeros((size, 2), np.int32), np.ones(size, np.int32), np.zeros(size, np.uint32))
    return Examples(prompts, Responses(tokens, lengths))


def some_pairs(size: int = 16, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return pairs(*rng.integers(0, RESPONSES.lengths.shape[1], (2, size)))


def by_definition(params, batch: Examples):
    """Mean loss from the log-probs of all responses, without the algorithm's parts."""
    places = (np.asarray(batch.responses.tokens)[:, :, None] == np.asarray(RESPONSES.tokens)[0]).all(-1).argmax(-1)
    log_ratio = (fakes.log_prob_of(params, PROMPT, RESPONSES) - fakes.log_prob_of(REFERENCE, PROMPT, RESPONSES))[0]
    margin = BETA * (log_ratio[places[:, 0]] - log_ratio[places[:, 1]])
    return jnp.mean(jnp.log1p(jnp.exp(-margin)))


def test_the_loss_and_its_gradient_are_those_of_the_definition():
    batch = some_pairs()
    found, gradient = jax.value_and_grad(lambda params: DPO.loss(params, REFERENCE, batch, (), None)[0].value)(POLICY)
    expected, expected_gradient = jax.value_and_grad(by_definition)(POLICY, batch)
    assert found == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    assert np.abs(expected_gradient).max() > 0.01
    assert DPO.loss(REFERENCE, REFERENCE, batch, (), None)[0].value == pytest.approx(np.log(2))


def test_padding_and_the_size_of_chunks_change_nothing():
    batch = some_pairs()
    real = np.arange(fakes.LENGTH) < np.asarray(batch.responses.lengths)[..., None]
    other = dataclasses.replace(batch.responses, tokens=np.where(real, batch.responses.tokens, 1))
    padded = dataclasses.replace(batch, responses=other)
    whole = dataclasses.replace(DPO, chunk_size=1000)
    losses = [
        one.loss(POLICY, REFERENCE, given, (), None)[0].value for one in (DPO, whole) for given in (batch, padded)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def step_on(devices: int):
    mesh, optimizer = make_mesh(devices), optax.sgd(1.0)
    step = programs.training_step(mesh, optimizer, DPO, micro_batches=lambda batch: 2)
    state = programs.init_state(POLICY, optimizer, mesh, DPO.start())
    return jax.device_get(step(state, replicate(mesh, REFERENCE), shard(mesh, some_pairs())))


def test_eight_devices_take_the_step_of_one_and_it_reports_what_it_declares():
    (state, metrics), (sharded, sharded_metrics) = step_on(1), step_on(8)
    np.testing.assert_allclose(sharded.params, state.params, atol=1e-6)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in Dpo.metrics}
    for name in metrics.keys() - {"first_rows"}:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(state.step) == 1
    margin = BETA * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"])
    assert metrics["margin"] == pytest.approx(margin, rel=1e-4)


def test_training_on_bradley_terry_pairs_ends_at_the_tilted_policy():
    size, rng = RESPONSES.lengths.shape[1], np.random.default_rng(0)
    rewards = rng.normal(size=size)
    first, second = rng.choice(size, (2, 20_000))
    wins = rng.uniform(size=first.shape) < 1 / (1 + np.exp(rewards[second] - rewards[first]))
    batch = shard(make_mesh(1), pairs(np.where(wins, first, second), np.where(wins, second, first)))
    mesh, optimizer = make_mesh(1), optax.adam(0.05)
    whole = dataclasses.replace(DPO, chunk_size=10**6)
    step = programs.training_step(mesh, optimizer, whole, micro_batches=lambda batch: 1)
    state, losses = programs.init_state(REFERENCE, optimizer, mesh), []
    for _ in range(150):
        state, metrics = step(state, REFERENCE, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2)) and losses[-1] < 0.6 and metrics["accuracy"] > 0.65
    tilted = jax.nn.log_softmax(fakes.log_prob_of(REFERENCE, PROMPT, RESPONSES)[0] + rewards / BETA)
    found = fakes.log_prob_of(jax.device_get(state.params), PROMPT, RESPONSES)[0]
    assert np.abs(np.exp(found) - np.exp(tilted)).sum() / 2 < 0.03


def test_options_that_mean_nothing_for_pairs_are_refused():
    for options, message in (({"beta": None}, "Dpo.beta is missing"), ({"transform": "identity"}, "Dpo.transform is")):
        with pytest.raises(InputError, match=message):
            config.Dpo(**options)
