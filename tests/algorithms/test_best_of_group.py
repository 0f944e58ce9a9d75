"""Learning the law of best-of-N from stored groups, on the three-token language: losses by definition, and minima.

A minimum is over all groups by their probability, so that nothing is noise.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import softmax

from ctrl_jax.algorithms import best_of_group, bonbon
from ctrl_jax.algorithms.best_of_group import BestOfGroup
from ctrl_jax.algorithms.best_of_n_sft import BestOfNSft
from ctrl_jax.algorithms.bonbon import Bonbon
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.types import StoredResponses
from tests.algorithms.test_stored_responses import EVERY, LAW, RAW, REFERENCE, TIED, Y, kl, law_of, stored
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

ALPHA = 0.3
SFT = BestOfNSft(fakes.policy, temperature=1.0, chunk_size=10**6)
BONBON = Bonbon(fakes.policy, temperature=1.0, chunk_size=10**6, alpha=ALPHA)
each = pytest.mark.parametrize("algorithm", [SFT, BONBON], ids=["sft", "bonbon"])
rewards = pytest.mark.parametrize("raw", [RAW, TIED], ids=["no ties", "ties"])
PARAMS = fakes.params(jax.random.key(0), 0.5)


def some() -> StoredResponses:
    """Groups that the reference drew: some have several best or worst, some one response twice, and one ties whole."""
    drawn = np.random.default_rng(0).choice(Y, (16, 8), p=LAW)
    drawn[3, :4] = drawn[3, 0]
    return stored(drawn[:, :4], TIED, drawn)


def extremes(raw: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The places of (best, worst) of a group by all lots, with their probability; none of a group that ties whole."""
    best, worst = np.flatnonzero(raw == raw.max()), np.flatnonzero(raw == raw.min())
    if raw.max() > raw.min():
        yield from ((i, j, 1 / (len(best) * len(worst))) for i in best for j in worst)


def by_definition(params: jax.Array, batch: StoredResponses, alpha: float):
    """α SFT(best) + (1 − α) IPO(best, worst), group by group and pair by pair."""
    places = (np.asarray(batch.responses.tokens)[:, :, None] == EVERY.tokens).all(-1).argmax(-1)
    log_ratio = fakes.log_prob_of(params, fakes.prompts(0), fakes.every_response())[0] - np.log(LAW)
    total = 0.0
    for raw, place in zip(batch.raw, places, strict=True):
        constant = (len(raw) - 1) * sum(1 / k for k in range(1, len(raw)))
        total -= alpha * jnp.mean(log_ratio[place[raw == raw.max()]])
        for best, worst, share in extremes(raw):
            total += (1 - alpha) * share * (log_ratio[place[best]] - log_ratio[place[worst]] - constant) ** 2
    return total / len(places)


def loss_of(algorithm: BestOfGroup, params: jax.Array, batch: StoredResponses):
    return algorithm.loss(params, REFERENCE, batch, None, None)[0].value


@each
def test_the_loss_and_its_gradient_are_those_of_the_definition(algorithm):
    batch = some()
    assert {len(set(row)) for row in batch.raw.tolist()} >= {1, 2, 3}
    found, gradient = jax.value_and_grad(loss_of, argnums=1)(algorithm, PARAMS, batch)
    alpha = 1.0 if algorithm is SFT else ALPHA
    expected, expected_gradient = jax.value_and_grad(by_definition)(PARAMS, batch, alpha)
    assert found == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    assert np.abs(gradient).max() > 0.01


@each
def test_padding_and_the_size_of_chunks_change_nothing(algorithm):
    batch = some()
    real = np.arange(fakes.LENGTH) < batch.responses.lengths[..., None]
    tokens = np.where(real, batch.responses.tokens, 1).astype(np.uint16)
    padded = dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, tokens=tokens))
    chunked = dataclasses.replace(algorithm, chunk_size=5)
    losses = [loss_of(one, PARAMS, given) for one in (algorithm, chunked) for given in (batch, padded)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def step_on(devices: int, algorithm: BestOfGroup):
    mesh, optimizer = make_mesh(devices), optax.sgd(0.1)
    step = programs.training_step(mesh, optimizer, algorithm, micro_batches=lambda batch: 2)
    state = programs.init_state(PARAMS, optimizer, mesh, algorithm.start())
    return jax.device_get(step(state, replicate(mesh, jnp.asarray(REFERENCE)), shard(mesh, some())))


@each
def test_eight_devices_take_the_step_of_one_and_it_reports_what_it_declares(algorithm):
    (state, metrics), (sharded, sharded_metrics) = step_on(1, algorithm), step_on(8, algorithm)
    np.testing.assert_allclose(sharded.params, state.params, atol=1e-5)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in type(algorithm).metrics}
    for name in metrics.keys() - {"first_rows"}:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(state.step) == 1 and np.isfinite(list(map(np.sum, metrics.values()))).all()


def test_weights_are_those_of_all_subsets():
    every = np.random.default_rng(0).integers(0, 4, (3, 7)).astype(np.float32)
    for n in (1, 2, 4):
        expected = np.zeros(every.shape)
        for b, row in enumerate(every):
            subsets = list(itertools.combinations(range(len(row)), n))
            for subset in map(list, subsets):
                best = np.array(subset)[row[subset] == row[subset].max()]
                expected[b, best] += len(row) / len(subsets) / len(best)
        found = np.asarray(best_of_group.log_weights(every, every, n))
        np.testing.assert_allclose(np.exp(found), expected, atol=1e-5)
        np.testing.assert_allclose(best_of_group.log_weights(every[:, 2:4], every, n), found[:, 2:4])
    batch = stored(np.arange(4).reshape(1, 4), TIED, np.arange(Y)[None])
    weights = np.exp(np.asarray(best_of_group.log_weights(batch.reference_rewards, batch.reference_rewards, 4)))[0]
    some_weights = weights[weights > 1e-9]
    assert SFT.targets(batch).kl == pytest.approx(np.sum(some_weights * np.log(some_weights)) / Y, rel=1e-4)


def groups_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All groups [Y^n, n] and their probabilities under the reference."""
    tuples = np.array(list(itertools.product(range(Y), repeat=n)))
    return tuples, LAW[tuples].prod(axis=1)


def best_of(raw: np.ndarray, n: int) -> np.ndarray:
    """[Y] the law of best-of-n, ties by lot."""
    law = np.zeros(Y)
    for places, probability in zip(*groups_of(n), strict=True):
        best = places[raw[places] == raw[places].max()]
        np.add.at(law, best, probability / len(best))
    return law


def at_the_minimum(algorithm: BestOfGroup, raw: np.ndarray, n: int, steps: int = 500) -> tuple[np.ndarray, float]:
    """[Y] the law of the least expected loss over all groups, and that loss."""
    tuples, probabilities = groups_of(n)
    every = jax.tree.map(jnp.asarray, stored(tuples, raw))
    weights = jnp.asarray(probabilities, jnp.float32)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, steps))

    def loss(params):
        return weights @ jax.vmap(lambda one: loss_of(algorithm, params, jax.tree.map(lambda x: x[None], one)))(every)

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(update, (params, optimizer.init(params)), None, length=steps)[0][0]
        return params, loss(params)

    params, least = train(jnp.asarray(PARAMS))
    return law_of(params), float(least)


@rewards
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fine_tuning_on_the_best_ends_at_the_law_of_best_of_n(n, raw):
    found, least = at_the_minimum(SFT, raw, n)
    expected = best_of(raw, n)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-4)
    assert least == pytest.approx(-kl(expected, LAW), abs=1e-4)
    np.testing.assert_allclose(best_of(raw, 1), LAW, rtol=1e-9)


def least_by_itself(raw: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """[Y] the law of BoNBoN's least expected loss, from how often each response is the best and each pair the two."""
    pairs, likelihood = np.zeros((Y, Y)), best_of(raw, n)
    for places, probability in zip(*groups_of(n), strict=True):
        for best, worst, share in extremes(raw[places]):
            pairs[places[best], places[worst]] += probability * share
    constant = (n - 1) * sum(1 / k for k in range(1, n))

    def expected(logits):
        log_ratio = np.log(softmax(logits)) - np.log(LAW)
        gaps = log_ratio[:, None] - log_ratio - constant
        slopes = 2 * (1 - alpha) * ((pairs * gaps).sum(1) - (pairs * gaps).sum(0)) - alpha * likelihood
        value = (1 - alpha) * np.sum(pairs * gaps**2) - alpha * likelihood @ log_ratio
        return value, slopes - softmax(logits) * slopes.sum()

    return softmax(minimize(expected, np.log(LAW), jac=True, method="BFGS", options={"gtol": 1e-9}).x)


@rewards
@pytest.mark.parametrize(("n", "alpha"), [(2, 0.0), (2, ALPHA), (3, 0.005)])
def test_bonbon_ends_at_the_minimum_of_its_expected_loss(n, alpha, raw):
    found, _ = at_the_minimum(dataclasses.replace(BONBON, alpha=alpha), raw, n)
    np.testing.assert_allclose(found, least_by_itself(raw, n, alpha), rtol=0.02, atol=3e-4)


def test_its_limits_are_best_of_n_the_identity_and_the_reference():
    """α = 1 is the likelihood alone; of two, IPO alone is that of the reference's pairs, β = ½; of one, nothing."""
    batch = some()
    alone = dataclasses.replace(BONBON, alpha=1.0)
    assert loss_of(alone, PARAMS, batch) == pytest.approx(float(loss_of(SFT, PARAMS, batch)), rel=1e-6)
    calibrated = np.array([LAW @ ((reward > RAW) + 0.5 * (reward == RAW)) for reward in RAW])
    identity = LAW * np.exp(2 * calibrated)
    identity /= identity.sum()
    np.testing.assert_allclose(least_by_itself(RAW, 2, 0.0), identity, rtol=1e-5)
    # As near as the page says: not the law of best-of-2, whose KL is larger.
    assert kl(identity, LAW) < 0.9 * kl(best_of(RAW, 2), LAW)
    np.testing.assert_allclose(at_the_minimum(BONBON, RAW, 1)[0], LAW, rtol=0.01)


@pytest.mark.parametrize(("n", "beta"), [(2, 0.5), (4, 0.09091), (8, 0.02755), (32, 0.004005)])
def test_the_margin_is_that_of_best_of_n_whatever_the_best_is(n, beta):
    """log w = (n − 1) log u + log n; below a best of u, the worst of n − 1 uniform ranks is u times that below 1."""
    assert 1 / (2 * bonbon.margin(n)) == pytest.approx(beta, rel=1e-3)
    best = quad(lambda u: np.log(u) * n * u ** (n - 1), 0, 1)[0]
    worst = quad(lambda u: np.log(u) * n * (1 - u) ** (n - 1), 0, 1)[0]
    below_1 = quad(lambda u: np.log(u) * (n - 1) * (1 - u) ** (n - 2), 0, 1)[0]
    assert bonbon.margin(n) == pytest.approx((n - 1) * (best - worst), rel=1e-6)
    assert bonbon.margin(n) == pytest.approx(-(n - 1) * below_1, rel=1e-6)
