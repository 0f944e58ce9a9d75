"""Learning from pairs on the three-token language: losses by definition, and minima over all pairs by their law."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from ctrl_jax.algorithms.dpo import Dpo
from ctrl_jax.algorithms.ipo import Ipo
from ctrl_jax.algorithms.preference_pairs import FromPairs
from ctrl_jax.algorithms.robust_dpo import RobustDpo
from ctrl_jax.algorithms.slic import Slic
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.types import Examples, Prompts, Responses
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

BETA, FLIPPED, MARGIN, WEIGHT = 0.3, 0.2, 0.7, 0.4


def made(kind: type[FromPairs], **options: float) -> FromPairs:
    return kind(fakes.policy, temperature=1.0, chunk_size=5, **options)


ALGORITHMS = [
    made(Dpo, beta=BETA),
    made(RobustDpo, beta=BETA, flip_probability=FLIPPED),
    made(Ipo, beta=BETA),
    made(Slic, margin=MARGIN, regularization=WEIGHT),
]
each = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda one: type(one).__name__)
POLICY, REFERENCE = (fakes.params(jax.random.key(seed)) for seed in (0, 1))
RESPONSES = fakes.every_response()
Y = RESPONSES.lengths.shape[1]
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
    return pairs(*rng.integers(0, Y, (2, size)))


def of_dpo(h):
    return jnp.log1p(jnp.exp(-BETA * h))


DEFINITIONS = {
    Dpo: lambda h, chosen, rejected: of_dpo(h),
    RobustDpo: lambda h, chosen, rejected: ((1 - FLIPPED) * of_dpo(h) - FLIPPED * of_dpo(-h)) / (1 - 2 * FLIPPED),
    Ipo: lambda h, chosen, rejected: (h - 1 / (2 * BETA)) ** 2,
    Slic: lambda h, chosen, rejected: jnp.maximum(0, MARGIN - chosen + rejected) - WEIGHT * chosen,
}
"""Of pairs, by the margin h of log-ratios, log π(chosen) and log π(rejected)."""


def by_definition(kind, params, batch: Examples):
    """Mean loss from the log-probs of all responses, without the algorithm's parts."""
    places = (np.asarray(batch.responses.tokens)[:, :, None] == np.asarray(RESPONSES.tokens)[0]).all(-1).argmax(-1)
    log_prob = fakes.log_prob_of(params, PROMPT, RESPONSES)[0]
    log_ratio = log_prob - fakes.log_prob_of(REFERENCE, PROMPT, RESPONSES)[0]
    h = log_ratio[places[:, 0]] - log_ratio[places[:, 1]]
    return jnp.mean(DEFINITIONS[kind](h, log_prob[places[:, 0]], log_prob[places[:, 1]]))


@each
def test_the_loss_and_its_gradient_are_those_of_the_definition(algorithm):
    batch = some_pairs()
    found, gradient = jax.value_and_grad(
        lambda params: algorithm.loss(params, REFERENCE, batch, (), None)[0].value
    )(POLICY)  # fmt: skip
    expected, expected_gradient = jax.value_and_grad(by_definition, argnums=1)(type(algorithm), POLICY, batch)
    assert found == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    assert np.abs(expected_gradient).max() > 0.01


@each
def test_padding_and_the_size_of_chunks_change_nothing(algorithm):
    batch = some_pairs()
    real = np.arange(fakes.LENGTH) < np.asarray(batch.responses.lengths)[..., None]
    other = dataclasses.replace(batch.responses, tokens=np.where(real, batch.responses.tokens, 1))
    padded = dataclasses.replace(batch, responses=other)
    whole = dataclasses.replace(algorithm, chunk_size=1000)
    losses = [
        one.loss(POLICY, REFERENCE, given, (), None)[0].value for one in (algorithm, whole) for given in (batch, padded)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def step_on(devices: int, algorithm: FromPairs):
    mesh, optimizer = make_mesh(devices), optax.sgd(1.0)
    step = programs.training_step(mesh, optimizer, algorithm, micro_batches=lambda batch: 2)
    state = programs.init_state(POLICY, optimizer, mesh, algorithm.start())
    return jax.device_get(step(state, replicate(mesh, REFERENCE), shard(mesh, some_pairs())))


@each
def test_eight_devices_take_the_step_of_one_and_it_reports_what_it_declares(algorithm):
    (state, metrics), (sharded, sharded_metrics) = step_on(1, algorithm), step_on(8, algorithm)
    np.testing.assert_allclose(sharded.params, state.params, atol=1e-5)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in type(algorithm).metrics}
    for name in metrics.keys() - {"first_rows"}:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(state.step) == 1
    h = metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"]
    if isinstance(algorithm, Slic):  # of the likelihoods themselves
        pair = by_definition_of_slic()
        assert (metrics["margin"], metrics["within_margin"]) == pytest.approx((pair.mean(), (pair < MARGIN).mean()))
    else:
        assert metrics["margin"] == pytest.approx(h * (1 if isinstance(algorithm, Ipo) else BETA), rel=1e-4)


def by_definition_of_slic() -> np.ndarray:
    """[B] log π(chosen) − log π(rejected) of `some_pairs`."""
    chosen, rejected = np.random.default_rng(0).integers(0, Y, (2, 16))
    log_prob = np.asarray(fakes.log_prob_of(POLICY, PROMPT, RESPONSES))[0]
    return log_prob[chosen] - log_prob[rejected]


def law_of(params: jax.Array) -> np.ndarray:
    return np.exp(np.asarray(fakes.log_prob_of(params, PROMPT, RESPONSES), np.float64)[0])


LAW = law_of(REFERENCE)
REWARDS = np.random.default_rng(0).integers(0, 5, Y) / 2.0
"""[Y] some of them tie."""


def at_the_minimum(algorithm: FromPairs, probabilities: np.ndarray, steps: int = 500) -> np.ndarray:
    """[Y] the law of the least expected loss, where a chosen and a rejected response are as likely as they are here."""
    chosen, rejected = np.nonzero(probabilities)
    every, weights = pairs(chosen, rejected), jnp.asarray(probabilities[chosen, rejected], jnp.float32)
    whole = dataclasses.replace(algorithm, chunk_size=10**6)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, steps))

    def loss(params):
        def of_one(pair):
            return whole.loss(params, REFERENCE, jax.tree.map(lambda x: x[None], pair), (), None)[0].value

        return weights @ jax.vmap(of_one)(jax.tree.map(jnp.asarray, every))

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), None, length=steps)[0][0]

    return law_of(train(REFERENCE))


def tilted(exponents: np.ndarray) -> np.ndarray:
    unnormalised = LAW * np.exp(exponents)
    return unnormalised / unnormalised.sum()


BRADLEY_TERRY = expit(REWARDS[:, None] - REWARDS)
BY_ORDER = (REWARDS[:, None] > REWARDS) + 0.5 * (REWARDS[:, None] == REWARDS)
"""[Y, Y] how often the first is preferred to the second."""


def test_dpo_ends_at_the_tilted_policy_of_the_reward():
    found = at_the_minimum(made(Dpo, beta=BETA), BRADLEY_TERRY / Y**2)
    np.testing.assert_allclose(found, tilted(REWARDS / BETA), rtol=0.01, atol=1e-4)


def test_robust_dpo_ends_there_though_labels_are_flipped_and_dpo_does_not():
    flipped = (1 - FLIPPED) * BRADLEY_TERRY + FLIPPED * BRADLEY_TERRY.T
    robust, plain = (
        at_the_minimum(one, flipped / Y**2)
        for one in (made(RobustDpo, beta=BETA, flip_probability=FLIPPED), made(Dpo, beta=BETA))
    )
    np.testing.assert_allclose(robust, tilted(REWARDS / BETA), rtol=0.02, atol=1e-4)
    assert np.abs(plain - robust).sum() / 2 > 0.05


@pytest.mark.parametrize("preferred", [BY_ORDER, BRADLEY_TERRY], ids=["by order", "bradley-terry"])
def test_ipo_on_pairs_of_the_reference_ends_where_the_share_of_those_it_beats_tilts_it(preferred):
    """By order that share is the calibrated reward, and the policy that of CTRL with the identity."""
    found = at_the_minimum(made(Ipo, beta=BETA), preferred * np.outer(LAW, LAW))
    np.testing.assert_allclose(found, tilted(preferred @ LAW / BETA), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "odds"),
    # Between −δ and δ the slope in h is 1 − 2p − λ (p − σ(h)), above it 1 − p − λ (p − σ(h)): with little λ the minimum
    # is at the kink, and with much of it where the second is 0.
    [(0.2, np.exp(1.0)), (20.0, (0.8 - 0.2 / 20) / (0.2 + 0.2 / 20))],
    ids=["the margin", "the law of the chosen"],
)
def test_slic_ends_at_its_margin_or_near_the_law_of_the_chosen(weight, odds):
    """Two responses, of which the first is preferred by .8. What the reference gives them does not count."""
    probabilities = np.zeros((Y, Y))
    probabilities[0, -1], probabilities[-1, 0] = 0.8, 0.2
    found = at_the_minimum(made(Slic, margin=1.0, regularization=weight), probabilities)
    assert found[0] / found[-1] == pytest.approx(odds, rel=0.02)
    assert LAW[0] / LAW[-1] != pytest.approx(odds, rel=0.2)
