"""Learning from stored responses, on the three-token language: losses by definition, optimum, bias, and metrics.

The reference is uniform over tokens, so that the probability of every response is a multiple of 1/27, and a batch may
have each as often as the reference draws it: then nothing is noise.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from ctrl_jax.algorithms.group_projection import GroupProjection
from ctrl_jax.algorithms.regression import Regression
from ctrl_jax.algorithms.reward_distillation import RewardDistillation
from ctrl_jax.algorithms.stored_responses import Tilted
from ctrl_jax.algorithms.weighted_likelihood import WeightedLikelihood
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Prompts, Responses, StoredResponses
from tests import oracle
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

ALGORITHMS = (GroupProjection, Regression, WeightedLikelihood, RewardDistillation)
BETA = 0.3
OBJECTIVE = Objective.parse("identity", "best_of_2", 0.5)
EVERY = jax.tree.map(lambda x: np.asarray(x)[0], fakes.every_response())
Y = len(EVERY.lengths)
REFERENCE = np.zeros((2, 3, 4, 4, 3), np.float32)
LAW = 3.0**-EVERY.lengths
"""[Y] of the reference."""
RAW = np.random.default_rng(0).permutation(Y).astype(np.float32)
"""[Y] no two tie."""
TIED = RAW // 4


def made(kind: type[Tilted], beta: float = BETA, name: str = "identity") -> Tilted:
    objective = dataclasses.replace(OBJECTIVE, transform=Objective.parse(name, "best_of_2", 0.5).transform)
    transformed = objective.transformed(8)
    return kind(fakes.policy, temperature=1.0, chunk_size=10**6, transformed=transformed, beta=beta)


def stored(groups: np.ndarray, raw: np.ndarray, others: np.ndarray | None = None) -> StoredResponses:
    """The groups [B, N] of responses by their place in EVERY, whose prompts had the responses `others` [B, K]."""
    size = len(groups)
    prompts = Prompts(np.zeros((size, 2), np.int32), np.ones(size, np.int32), np.zeros(size, np.uint32))
    responses = Responses(EVERY.tokens[groups].astype(np.uint16), EVERY.lengths[groups])
    log_probs = np.log(LAW)[groups].astype(np.float32)
    return StoredResponses(prompts, responses, log_probs, raw[groups], raw[groups if others is None else others])


def some(seed: int = 0, size: int = 16, group: int = 4, references: int = 8) -> StoredResponses:
    """Groups of responses that the reference drew, some of them twice."""
    drawn = np.random.default_rng(seed).choice(Y, (size, references), p=LAW)
    return stored(drawn[:, :group], TIED, drawn)


def law_of(params: jax.Array) -> np.ndarray:
    return np.exp(np.asarray(fakes.log_prob_of(params, fakes.prompts(0), fakes.every_response()), np.float64)[0])


def ranks(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N] the rank of each in [0, 1] among the K − 1 others of `others` [K], of which each is one itself."""
    against = (values[:, None] > others).sum(1) + 0.5 * (values[:, None] == others).sum(1) - 0.5
    return against / (len(others) - 1)


def log_weights(raw: np.ndarray, others: np.ndarray, beta: float = BETA) -> np.ndarray:
    """[N] Φ(û) / β − log Z by their definitions, Φ the identity."""
    return ranks(raw, others) / beta - (logsumexp(ranks(others, others) / beta) - np.log(len(others)))


def gaps(lw: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """[..., N, N] of the implicit reward less those of the explicit one, in units of β."""
    return (lr[..., :, None] - lr[..., None, :]) - (lw[..., :, None] - lw[..., None, :])


def number_of_pairs(lr: np.ndarray) -> float:
    return lr.shape[-1] * (lr.shape[-1] - 1) / 2


LOSSES = {
    GroupProjection: lambda lw, lr: np.sum(
        softmax(lw, axis=-1) * (np.log(softmax(lw, axis=-1)) - np.log(softmax(lr, axis=-1))), axis=-1
    ),
    Regression: lambda lw, lr: np.mean((lw - lr) ** 2, axis=-1),
    WeightedLikelihood: lambda lw, lr: np.mean(np.exp(lw) * (lw - lr) - np.exp(lw) + np.exp(lr), axis=-1),
    RewardDistillation: lambda lw, lr: np.sum(np.triu(gaps(lw, lr)) ** 2, axis=(-2, -1)) / number_of_pairs(lr),
}
"""Of groups, by log w and log π/π_ref [..., N]."""
SLOPES = {
    GroupProjection: lambda lw, lr: softmax(lr, axis=-1) - softmax(lw, axis=-1),
    Regression: lambda lw, lr: -2 * (lw - lr) / lr.shape[-1],
    WeightedLikelihood: lambda lw, lr: (np.exp(lr) - np.exp(lw)) / lr.shape[-1],
    RewardDistillation: lambda lw, lr: 2 * np.sum(gaps(lw, lr), axis=-1) / number_of_pairs(lr),
}
"""What ∇log π of each response is multiplied by."""


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_loss_and_its_gradient_are_those_of_the_definition(kind):
    algorithm, batch, params = made(kind), some(), fakes.params(jax.random.key(0), 0.5)
    places = (np.asarray(batch.responses.tokens)[:, :, None] == EVERY.tokens).all(-1).argmax(-1)
    log_ratio = (np.log(law_of(params)) - np.log(LAW))[places]
    targets = [log_weights(*row) for row in zip(batch.raw, batch.reference_rewards, strict=True)]
    expected = np.mean([LOSSES[kind](*row) for row in zip(targets, log_ratio, strict=True)])
    slopes = np.array([SLOPES[kind](*row) for row in zip(targets, log_ratio, strict=True)]) / len(batch.raw)

    def loss(params):
        return algorithm.loss(params, REFERENCE, batch, algorithm.targets(batch), None)[0].value

    def by_slopes(params):
        log_probs = fakes.log_prob_of(params, fakes.prompts(0), fakes.every_response())[0]
        return jnp.sum(jnp.asarray(slopes, jnp.float32) * log_probs[places])

    found, gradient = jax.value_and_grad(loss)(params)
    assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(by_slopes)(params), atol=2e-6)
    assert np.abs(gradient).max() > 0.01


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_padding_and_the_size_of_chunks_change_nothing(kind):
    algorithm, batch, params = made(kind), some(), fakes.params(jax.random.key(0), 0.5)
    real = np.arange(fakes.LENGTH) < batch.responses.lengths[..., None]
    tokens = np.where(real, batch.responses.tokens, 1).astype(np.uint16)
    padded = dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, tokens=tokens))
    assert (tokens != batch.responses.tokens).any()
    losses = [
        one.loss(params, REFERENCE, given, one.targets(given), None)[0].value
        for one in (algorithm, dataclasses.replace(algorithm, chunk_size=5))
        for given in (batch, padded)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def step_on(devices: int, kind: type[Tilted]):
    mesh, optimizer = make_mesh(devices), optax.sgd(1.0)
    step = programs.training_step(mesh, optimizer, made(kind), micro_batches=lambda batch: 2)
    state = programs.init_state(fakes.params(jax.random.key(0), 0.5), optimizer, mesh, made(kind).start())
    return jax.device_get(step(state, replicate(mesh, jnp.asarray(REFERENCE)), shard(mesh, some())))


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_eight_devices_take_the_step_of_one_and_it_reports_what_it_declares(kind):
    (state, metrics), (sharded, sharded_metrics) = step_on(1, kind), step_on(8, kind)
    np.testing.assert_allclose(sharded.params, state.params, atol=1e-6)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in kind.metrics}
    for name in metrics.keys() - {"first_rows"}:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(state.step) == 1 and metrics["beta"] == np.float32(BETA)


def as_often_as_drawn(raw: np.ndarray, references: int) -> StoredResponses:
    """Every K-tuple of responses, each as often as its probability, a multiple of 27^-K, says."""
    often = np.rint(27 * LAW).astype(int)
    tuples = np.array(list(itertools.product(range(Y), repeat=references)))
    return stored(np.repeat(tuples, often[tuples].prod(axis=1), axis=0), raw)


def at_the_minimum(algorithm: Tilted, batch: StoredResponses, steps: int = 400) -> np.ndarray:
    """[Y] the law of the policy of the least loss."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, steps))
    targets = algorithm.targets(batch)

    def loss(params):
        return algorithm.loss(params, REFERENCE, batch, targets, None)[0].value

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), None, length=steps)[0][0]

    return law_of(train(jnp.asarray(REFERENCE)))


def kl(policy: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sum(policy * np.log(policy / reference)))


def biased(kind: type[Tilted], raw: np.ndarray, references: int) -> np.ndarray:
    """[Y] the law that K references are least at, by the expected loss over all tuples of them, minimised by itself."""
    tuples = np.array(list(itertools.product(range(Y), repeat=references)))
    probabilities = LAW[tuples].prod(axis=1)
    found = np.array([log_weights(row, row) for row in raw[tuples]])
    if kind is WeightedLikelihood:  # in closed form: E w over the other references
        sums = np.zeros(Y)
        np.add.at(sums, tuples, probabilities[:, None] * np.exp(found) / references)
        return sums

    def expected(logits):
        law = softmax(logits)
        log_ratio = (np.log(law) - np.log(LAW))[tuples]
        losses, slopes = LOSSES[kind](found, log_ratio), SLOPES[kind](found, log_ratio)
        of_log_prob = np.zeros(Y)
        np.add.at(of_log_prob, tuples, probabilities[:, None] * slopes)
        return probabilities @ losses, of_log_prob - law * of_log_prob.sum()

    return softmax(minimize(expected, np.log(LAW), jac=True, method="BFGS", options={"gtol": 1e-9}).x)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("raw", [RAW, TIED], ids=["no ties", "ties"])
def test_of_two_references_the_bias_is_that_of_the_expected_loss(kind, raw):
    found, expected = at_the_minimum(made(kind), as_often_as_drawn(raw, 2)), biased(kind, raw, 2)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-4)
    ideal = LAW * np.exp(oracle.calibrated(raw[None], np.repeat(raw, np.rint(27 * LAW).astype(int))[None])[0] / BETA)
    assert np.abs(found - ideal / ideal.sum()).sum() / 2 > 0.05, "two references bias it"


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("raw", [RAW, TIED], ids=["no ties", "ties"])
def test_of_all_references_the_minimum_is_the_optimal_policy(kind, raw):
    """One prompt, whose 27 · 20 responses are the reference's law itself."""
    size = 20
    every = np.repeat(np.arange(Y), size * np.rint(27 * LAW).astype(int))
    groups = np.random.default_rng(1).permutation(every).reshape(-1, 27)
    batch = stored(groups, raw, np.broadcast_to(every, (len(groups), len(every))))
    found = at_the_minimum(made(kind), batch)
    ideal = LAW * np.exp(oracle.calibrated(raw[None], raw[every][None])[0] / BETA)
    ideal /= ideal.sum()
    assert kl(found, LAW) == pytest.approx(kl(ideal, LAW), rel=0.02)
    assert kl(ideal, LAW) > 0.2
    np.testing.assert_allclose(found, ideal, rtol=0.02, atol=2e-4)


def test_a_raw_reward_that_is_distilled_is_that_of_rlhf():
    """∝ π_ref exp(r / β), ties and all, of groups that have every response."""
    raw = TIED / 2
    found = at_the_minimum(made(RewardDistillation, name="raw"), stored(np.arange(Y)[None], raw))
    ideal = LAW * np.exp(raw / BETA)
    np.testing.assert_allclose(found, ideal / ideal.sum(), rtol=0.01, atol=1e-4)


def test_metrics_are_expectations_under_the_policy_by_enumeration():
    """Of all responses as often as the reference draws them, in groups of their own."""
    algorithm, params = made(Regression), fakes.params(jax.random.key(0), 0.5)
    every = np.repeat(np.arange(Y), np.rint(27 * LAW).astype(int))
    batch, law = stored(every[None], RAW), law_of(params)
    targets = algorithm.targets(batch)
    _, log_ratio = algorithm.loss(params, REFERENCE, batch, targets, None)
    found = {name: one.value for name, one in algorithm.measure(batch, targets, log_ratio).items()}
    own = ranks(RAW, RAW[every])
    assert found["kl"] == pytest.approx(kl(law, LAW), rel=1e-4)
    assert found["calibrated_reward"] == pytest.approx(law @ own, rel=1e-4)
    assert found["raw_reward"] == pytest.approx(law @ RAW, rel=1e-4)
    assert found["response_length"] == pytest.approx(law @ EVERY.lengths, rel=1e-4)
    assert found["effective_samples"] == pytest.approx(1 / (law**2 / LAW).sum(), rel=1e-4)
    target = LAW * np.exp(own / BETA) / (LAW @ np.exp(own / BETA))
    assert found["target_kl"] == pytest.approx(kl(target, LAW), rel=1e-4)
    assert found["target_effective_samples"] == pytest.approx(1 / (target**2 / LAW).sum(), rel=1e-4)
    assert found["group_divergence"] == pytest.approx(kl(target, law), rel=1e-4)
    assert found["constant_rewards"] == 0


@pytest.mark.parametrize("nats", [200.0, -200.0])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_response_that_is_learned_or_forgotten_leaves_the_metrics_finite(kind, nats):
    """float32 has no exp above 88; the loss of some algorithms does not mind."""
    algorithm, batch = made(kind), some()
    log_ratio = jnp.zeros(batch.raw.shape).at[0, 0].set(nats)
    found = algorithm.measure(batch, algorithm.targets(batch), log_ratio)
    assert all(np.isfinite(one).all() for one in jax.tree.leaves({**found, "kl_standard_error": 0.0}))


@pytest.mark.parametrize("transform", ["exponential(10)", "exponential(-10)", "logarithm", "raw"])
def test_the_mean_weight_of_a_prompt_is_1(transform):
    """Z is that of the K ranks, whatever Φ is: also where it is infinite at 0, and where rewards tie."""
    algorithm, drawn = made(Regression, name=transform), np.random.default_rng(0).choice(Y, (6, 8), p=LAW)
    for raw in (TIED, RAW):
        targets = algorithm.targets(stored(drawn, raw))
        np.testing.assert_allclose(np.exp(targets.log_weights).mean(axis=1), 1, rtol=1e-4)
