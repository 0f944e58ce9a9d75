"""Algorithms under constraints: gradients and an optimum by enumeration, steps by their definition."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.bon_rl import BonRl
from ctrl_jax.algorithms.bond import Bond
from ctrl_jax.algorithms.constrained import Constrained, Extra
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.algorithms.functional_derivative import FunctionalDerivative
from ctrl_jax.algorithms.grpo import Grpo
from ctrl_jax.algorithms.j_bond import JBond
from ctrl_jax.algorithms.k_sample import KSample
from ctrl_jax.algorithms.ppo_clip import PpoClip
from ctrl_jax.algorithms.protocol import Algorithm
from ctrl_jax.algorithms.vbon import Vbon
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.evaluation import RewardSignal
from ctrl_jax.pipeline import train
from ctrl_jax.steps import multipliers, policy_gradient
from ctrl_jax.types import Experience
from tests import assembled
from tests.algorithms import enumerated, test_actor_critic, test_ppo_clip
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
CTRL = made(Ctrl, beta=3.0)
PRICED = Priced(CTRL, FLOORS)
CLIPPED = {"clip": 0.2, "epochs": 1, "minibatches": 1}
ALGORITHMS = {
    "CTRL": CTRL,
    "with a critic": made(test_actor_critic.Taught, trace=0.5, **test_actor_critic.SIZES),
    "PPO-clip": made(PpoClip, **CLIPPED),
    "GRPO": made(Grpo, **CLIPPED),
    "vBoN": made(Vbon, beta=1.0),
    "BOND": made(Bond, beta=1.0, backward=0.3),
    "the likelihood of BOND alone": made(Bond, beta=1.0, backward=0.0),
    "J-BOND": made(JBond, beta=1.0, backward=0.5),
    "k-sample": made(KSample, beta=3.0),
    "BoN-RL": made(BonRl, success=0.5),
    "functional derivative": made(FunctionalDerivative),
}


def gradient(algorithm: Algorithm, params: jax.Array, *, size: int = 2) -> jax.Array:
    """The expected gradient of groups."""
    ranks = RANKS if isinstance(algorithm, Constrained) else None

    def loss(params):
        return enumerated.expected_loss(
            algorithm, params, REFERENCE, size=size, raw=RAW, references=REFERENCES, constrained=ranks
        )

    return jax.jit(jax.grad(loss))(params)


def score(weights: jax.Array) -> jax.Array:
    """Σ_y w(y) ∇log π(y) at POLICY."""
    return jax.jit(jax.grad(lambda params: jnp.sum(weights * fakes.log_prob_of(params, PROMPT, EVERY)[0])))(POLICY)


def test_the_expected_gradient_is_that_of_the_lagrangian():
    slope = RAW / 3.0 + RANKS @ np.asarray(GIVEN) - np.log(law(POLICY) / law(REFERENCE))
    expected = -score(law(POLICY) * slope)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(gradient(PRICED, POLICY), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_each_algorithm_climbs_the_price_beside_its_own_objective(algorithm):
    price = RANKS @ np.asarray(GIVEN)
    # Less a constant, which counts where a mean over tokens is taken.
    earned = law(POLICY) * (price - law(POLICY) @ price)
    expected = -score(earned / EVERY.lengths[0] if isinstance(algorithm, Grpo) else earned)
    plain = gradient(algorithm, POLICY, size=3)
    assert np.abs(plain).max() > 1e-3 and np.abs(expected).max() > 0.01
    np.testing.assert_allclose(gradient(Priced(algorithm, FLOORS), POLICY, size=3) - plain, expected, atol=1e-5)


def test_with_multipliers_of_0_it_is_the_algorithm_with_all_its_updates():
    """As the whole step makes them."""
    mesh, optimizer, batch = make_mesh(1), optax.sgd(0.5), experience()
    plain = test_ppo_clip.PPO
    assert plain.updates == 4

    def after(algorithm: Algorithm) -> tuple[jax.Array, dict[str, jax.Array]]:
        step = programs.training_step(mesh, optimizer, algorithm, micro_batches=lambda batch: 1)
        state = programs.init_state(POLICY, optimizer, mesh, algorithm.start())
        state, metrics = step(state, replicate(mesh, REFERENCE), shard(mesh, batch))
        return jax.device_get(state.params), jax.device_get(metrics)

    expected, metrics = after(plain)
    found, more = after(Constrained(plain, FLOORS))
    assert np.abs(expected - POLICY).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert more.keys() - metrics.keys() == {"above_floors", "multiplier"}
    for name in ("kl", "beta", "clipped", "update_share"):
        np.testing.assert_allclose(more[name], metrics[name], rtol=1e-5)


def test_it_rests_where_the_floors_are_kept_and_what_is_not_needed_costs_nothing():
    """The first reward would fall below its floor; the second has one that is kept anyway."""
    reference = np.asarray(law(REFERENCE))
    unconstrained = reference * np.exp(RAW / 3.0)
    unconstrained /= unconstrained.sum()
    without = unconstrained @ RANKS
    floors = jnp.array([without[0] + 0.1, without[1] - 0.1])
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    class With(Constrained):
        def start(self):
            return super().start()._replace(multipliers=at["state"])

    at = {}
    held = With(CTRL, tuple(floors.tolist()))

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
        comparison = CTRL.compare(params, REFERENCE, batch)
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
    found, plain = algorithm(config.Policy(floors=(0.5,), **given)), algorithm(config.Policy(**given))
    assert type(found) is Constrained and found.floors == (0.5,)
    assert type(found.algorithm) is Ctrl and found.beta == plain.beta != BETA
    clipped = algorithm(config.PpoClip(floors=(0.5,), **given))
    assert isinstance(clipped.algorithm, PpoClip) and clipped.updates == clipped.algorithm.updates > 1
