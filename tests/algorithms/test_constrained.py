"""CTRL under constraints: its gradient and its optimum by enumeration, its steps by their definition."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.constrained import Constrained, Extra
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.evaluation import RewardSignal
from ctrl_jax.pipeline import train
from ctrl_jax.steps import multipliers, policy_gradient
from ctrl_jax.types import Experience
from tests import assembled
from tests.algorithms import enumerated, test_ppo_clip
from tests.algorithms.enumerated import EVERY, PROMPT, Y, law
from tests.algorithms.test_own_rivals import BETA, POLICY, RAW, REFERENCE, REFERENCES, made
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

RANKS = np.random.default_rng(5).uniform(size=(Y, 2)).astype(np.float32)
"""[Y, M]"""
GIVEN = jnp.array([1.5, 0.7])


class Priced(Constrained):
    """With multipliers that are not 0."""

    def start(self) -> Extra:
        return super().start()._replace(multipliers=multipliers.State(GIVEN, GIVEN))


FLOORS = (0.5, 0.4)
PRICED = made(Priced, beta=3.0, floors=FLOORS)


def gradient(algorithm: Ctrl, params: jax.Array, *, constrained: np.ndarray | None = RANKS) -> jax.Array:
    """The expected gradient of pairs."""

    def loss(params):
        return enumerated.expected_loss(
            algorithm, params, REFERENCE, size=2, raw=RAW, references=REFERENCES, constrained=constrained
        )

    return jax.grad(loss)(params)


def test_the_expected_gradient_is_that_of_the_lagrangian():
    slope = RAW / 3.0 + RANKS @ np.asarray(GIVEN) - np.log(law(POLICY) / law(REFERENCE))
    weights = law(POLICY) * slope
    expected = -jax.grad(lambda params: jnp.sum(weights * fakes.log_prob_of(params, PROMPT, EVERY)[0]))(POLICY)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(gradient(PRICED, POLICY), expected, atol=2e-5 * np.abs(expected).max())


def test_with_multipliers_of_0_it_is_ctrl():
    free, plain = made(Constrained, beta=3.0, floors=FLOORS), made(Ctrl, beta=3.0)
    expected = gradient(plain, POLICY, constrained=None)
    np.testing.assert_allclose(gradient(free, POLICY), expected, atol=1e-5)


def test_it_rests_where_the_floors_are_kept_and_what_is_not_needed_costs_nothing():
    """The first reward would fall below its floor; the second has one that is kept anyway."""
    reference = np.asarray(law(REFERENCE))
    unconstrained = reference * np.exp(RAW / 3.0)
    unconstrained /= unconstrained.sum()
    without = unconstrained @ RANKS
    algorithm = made(Constrained, beta=3.0, floors=(float(without[0]) + 0.1, float(without[1]) - 0.1))
    floors = jnp.asarray(algorithm.floors)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    class With(Constrained):
        def start(self):
            return super().start()._replace(multipliers=at["state"])

    at = {}
    held = With(**{field.name: getattr(algorithm, field.name) for field in dataclasses.fields(algorithm)})

    @jax.jit
    def fit(params):
        def update(carry, _):
            params, moments, at["state"] = carry
            updates, moments = optimizer.update(gradient(held, params), moments)
            state = multipliers.update(at["state"], law(params) @ RANKS, floors)
            return (optax.apply_updates(params, updates), moments, state), None

        start = params, optimizer.init(params), multipliers.init(2)
        return jax.lax.scan(update, start, None, length=400)[0]

    params, _, state = fit(REFERENCE)
    policy, values = np.asarray(law(params)), np.asarray(state.values)
    assert policy @ RANKS[:, 0] == pytest.approx(float(floors[0]), abs=2e-3)
    assert policy @ RANKS[:, 1] > floors[1] and values[1] == 0 and values[0] > 0.5
    optimum = reference * np.exp(RAW / 3.0 + RANKS @ values)
    np.testing.assert_allclose(policy, optimum / optimum.sum(), atol=3e-3)


def experience() -> Experience:
    batch = test_ppo_clip.experience()
    shape = (*batch.raw.shape, 2)
    return dataclasses.replace(batch, constrained=np.random.default_rng(6).uniform(size=shape).astype(np.float32))


@pytest.mark.parametrize("devices", [1, 8])
def test_its_step_is_that_of_the_definition(devices):
    mesh, optimizer, batch = make_mesh(devices), optax.sgd(0.5), experience()
    step = programs.training_step(mesh, optimizer, PRICED, micro_batches=lambda batch: 2)
    state = programs.init_state(POLICY, optimizer, mesh, PRICED.start())
    after, metrics = jax.device_get(step(state, replicate(mesh, REFERENCE), shard(mesh, batch)))

    def loss(params):
        """−J by its definition: rewards with the price of ranks in them, and no β."""
        comparison = PRICED.compare(params, REFERENCE, batch)
        rewards = batch.raw / 3.0 + batch.constrained @ GIVEN
        lengths = batch.rollouts.responses.lengths
        return policy_gradient.exact_kl_loss(comparison.log_probs, comparison.kl, rewards, lengths, beta=1.0).value

    whole = jax.grad(loss)(POLICY)
    assert np.abs(whole).max() > 1e-2
    np.testing.assert_allclose(after.params, POLICY - 0.5 * whole, atol=1e-5)
    ranks = batch.constrained.mean(axis=(0, 1))
    assert metrics["above_floors"] == pytest.approx(min(ranks - FLOORS), abs=1e-6)
    assert metrics["multiplier"] == pytest.approx(1.5)
    expected = multipliers.update(PRICED.start().multipliers, jnp.asarray(ranks), jnp.asarray(FLOORS))
    np.testing.assert_allclose(after.extra.multipliers.values, expected.values, atol=1e-6)
    assert not np.allclose(expected.values, GIVEN)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in PRICED.metrics}


def test_what_is_behind_a_response_does_not_count():
    batch = experience()
    other = enumerated.padded_otherwise(batch)
    losses = [
        PRICED.loss(POLICY, REFERENCE, one, PRICED.targets(one), PRICED.start())[0].value for one in (batch, other)
    ]
    assert losses[0] == pytest.approx(float(losses[1]), rel=1e-6)


def test_options_make_it_with_the_beta_of_ctrl():
    table = np.sort(np.random.default_rng(0).normal(size=(12, 64)), axis=-1).astype(np.float32)

    def algorithm(options: config.Policy) -> Ctrl:
        run = SimpleNamespace(
            models=assembled.models(), mesh=make_mesh(1),
            experiment=SimpleNamespace(
                calibration=config.Calibration(), reward_model=config.RewardModel(), combine=config.Combine(),
                combines=False, start=None,
            ),
            corpus=SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(fakes.EOS,))),
        )  # fmt: skip
        return train.algorithm_of(
            run, options, SimpleNamespace(table=SimpleNamespace(rewards=table), signal=RewardSignal())
        )

    given = {"procedure": "best_of_2", "kl_budget": 0.2}
    found, plain = algorithm(config.Constrained(floors=(0.5,), **given)), algorithm(config.Policy(**given))
    assert type(found) is Constrained and found.floors == (0.5,)
    assert found.beta == plain.beta and found.beta != BETA
