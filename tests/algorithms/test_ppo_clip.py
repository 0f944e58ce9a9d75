"""PPO-clip on the three-token language: its loss by definition, CTRL's gradient at ρ = 1, and its several updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.algorithms.ppo_clip import PpoClip
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly, optimizers
from ctrl_jax.steps import policy_gradient
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Experience, PolicyBatch, Prompts, Responses, Rollouts
from tests import assembled
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

POLICY, REFERENCE = (fakes.params(jax.random.key(seed), 0.5) for seed in (0, 1))
OBJECTIVE = Objective.parse("exponential(2)", "best_of_2", 0.3)
FIELDS = {
    "policy": fakes.policy, "transformed": OBJECTIVE.transformed(8), "procedure": OBJECTIVE.procedure, "beta": 0.4,
    "kl_budget": 0.3, "hold_beta": True, "eos_ids": (fakes.EOS,), "temperature": 1.0, "chunk_size": 7,
}  # fmt: skip
PPO = PpoClip(**FIELDS, clip=0.2, epochs=2, minibatches=2)
B, N = 16, 3


def experience(seed: int = 0, drift: float = 0.3) -> Experience:
    """Random responses of all lengths, whose sampler was by `drift` nats a token another policy than POLICY."""
    rng = np.random.default_rng(seed)
    lengths = 1 + (np.arange(B)[:, None] + np.arange(N)) % fakes.LENGTH
    prompts = Prompts(np.zeros((B, 2), np.int32), np.ones(B, np.int32), np.arange(B, dtype=np.uint32))
    responses = Responses(rng.integers(0, 3, (B, N, fakes.LENGTH)).astype(np.int32), lengths.astype(np.int32))
    log_probs = np.asarray(token_laws(POLICY, prompts, responses)[0]) + drift * rng.normal(size=responses.tokens.shape)
    rollouts = Rollouts(prompts, responses, log_probs.astype(np.float32))
    raw, references = rng.normal(size=(B, N)), np.sort(rng.normal(size=(B, 8)), axis=-1)
    return Experience(rollouts, raw.astype(np.float32), references.astype(np.float32))


def token_laws(params, prompts, responses):
    """Log-probs of the tokens [B, N, T], and the laws [B, N, T, V], read from the table."""
    laws = jax.nn.log_softmax(fakes.policy.apply(params, prompts, responses))
    return jnp.take_along_axis(laws, jnp.asarray(responses.tokens)[..., None], -1)[..., 0], laws


def token_kl(prompts, responses):
    """[B, N, T] of POLICY to REFERENCE."""
    laws, reference_laws = (token_laws(params, prompts, responses)[1] for params in (POLICY, REFERENCE))
    return (jnp.exp(laws) * (laws - reference_laws)).sum(-1)


def by_definition(params, batch: Experience, beta: float, clip: float):
    """The mean loss, token by token."""
    prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
    log_probs, laws = token_laws(params, prompts, responses)
    reference_laws = token_laws(REFERENCE, prompts, responses)[1]
    kl = (jnp.exp(laws) * (laws - reference_laws)).sum(-1)
    held = np.asarray(token_kl(prompts, responses))  # within an advantage
    ranks = ((batch.raw[:, :, None] > batch.reference_rewards[:, None]).mean(-1)).astype(np.float32)
    rewards = np.expm1(2 * ranks) / np.expm1(2)  # Φ on [0, 1]; nothing ties
    real = [[list(range(length)) for length in row] for row in responses.lengths.tolist()]
    total = 0.0
    for b in range(B):
        for n in range(N):
            others = [m for m in range(N) if m != n]
            for t in real[b][n]:
                later = [sum(held[b, m, s] for s in real[b][m] if s > t) for m in range(N)]
                advantage = (rewards[b, n] - np.mean([rewards[b, m] for m in others])) / beta
                advantage -= later[n] - np.mean([later[m] for m in others])
                ratio = jnp.exp(log_probs[b, n, t] - batch.rollouts.log_probs[b, n, t])
                gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
                total += kl[b, n, t] - gain
    return total / (B * N)


def loss_of(algorithm, params, batch: Experience):
    return algorithm.loss(params, REFERENCE, batch, algorithm.targets(batch), algorithm.start())[0].value


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_of_the_definition(drift):
    batch = experience(drift=drift)
    found, gradient = jax.value_and_grad(lambda params: loss_of(PPO, params, batch))(POLICY)
    expected, expected_gradient = jax.value_and_grad(by_definition)(POLICY, batch, 0.4, 0.2)
    assert found == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-6)
    assert np.abs(expected_gradient).max() > 0.01


def test_at_the_first_update_the_gradient_is_ctrls_and_later_it_is_not():
    ctrl = Ctrl(**FIELDS)
    for drift, same in ((0.0, True), (0.3, False)):
        batch = experience(drift=drift)
        found, expected = (jax.grad(loss_of, argnums=1)(one, POLICY, batch) for one in (PPO, ctrl))
        assert np.allclose(found, expected, atol=1e-6) == same


def test_a_clipped_token_has_no_gradient():
    """All tokens twice as likely as when they were sampled: those with an advantage push no farther."""
    batch = experience(drift=0.0)
    rollouts = dataclasses.replace(batch.rollouts, log_probs=batch.rollouts.log_probs - np.log(2).astype(np.float32))
    batch, best = dataclasses.replace(batch, rollouts=rollouts), np.zeros((B, N), np.float32)
    best[:, 0] = 1e3  # so that the KL of later tokens decides no sign
    everything = dataclasses.replace(PPO, transformed=lambda raw, calibrated: raw)

    def gain(params, clip):
        one = dataclasses.replace(everything, clip=clip)
        return loss_of(one, params, dataclasses.replace(batch, raw=best))

    free, clipped = (jax.grad(gain)(POLICY, clip) for clip in (10.0, 0.2))
    assert np.abs(free - clipped).max() > 1
    # Of the best response nothing is left but the gradient of its KL, which is small beside rewards of 1e3.
    losers = jax.grad(lambda params: _losers(params, batch, best))(POLICY)
    np.testing.assert_allclose(clipped, losers, atol=0.5)


def _losers(params, batch, rewards):
    """The mean surrogate of all responses but the best, whose ratio of 2 no clip holds: they fall."""
    log_probs, _ = token_laws(params, batch.rollouts.prompts, batch.rollouts.responses)
    mask = np.arange(fakes.LENGTH) < np.asarray(batch.rollouts.responses.lengths)[..., None]
    advantages = np.asarray(policy_gradient.leave_one_out(jnp.asarray(rewards)))[..., None] / 0.4
    ratio = jnp.exp(log_probs - batch.rollouts.log_probs)
    return -jnp.where(mask & (advantages < 0), ratio * advantages, 0.0).sum() / (B * N)


def test_padding_changes_nothing():
    batch = experience()
    real = np.arange(fakes.LENGTH) < batch.rollouts.responses.lengths[..., None]
    responses = dataclasses.replace(batch.rollouts.responses, tokens=np.where(real, batch.rollouts.responses.tokens, 1))
    log_probs = np.where(real, batch.rollouts.log_probs, 1e3).astype(np.float32)
    rollouts = dataclasses.replace(batch.rollouts, responses=responses, log_probs=log_probs)
    found = loss_of(PPO, POLICY, dataclasses.replace(batch, rollouts=rollouts))
    assert found == pytest.approx(float(loss_of(PPO, POLICY, batch)), rel=1e-6)


def step_on(devices: int, batch: Experience):
    mesh, optimizer = make_mesh(devices), optax.sgd(0.5)
    step = programs.training_step(mesh, optimizer, PPO, micro_batches=lambda batch: 1)
    state = programs.init_state(POLICY, optimizer, mesh, PPO.start())
    return jax.device_get(step(state, replicate(mesh, REFERENCE), shard(mesh, batch)))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_makes_an_update_by_every_minibatch_of_every_epoch(devices):
    batch = experience()
    state, metrics = step_on(devices, batch)
    params, losses = POLICY, []
    for minibatch in (0, 1, 0, 1):
        part = jax.tree.map(lambda x, first=minibatch: x[first::2], batch)
        value, gradient = jax.value_and_grad(lambda params, part=part: loss_of(PPO, params, part))(params)
        losses.append(float(value))
        params = params - 0.5 * gradient
    np.testing.assert_allclose(state.params, params, atol=1e-5)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert int(state.step) == 1
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in PpoClip.metrics}
    assert 0 < metrics["clipped"] < 1


def test_a_step_that_is_not_finite_makes_none_of_its_updates():
    batch = experience()
    batch.raw[3, 1] = np.nan
    state, _ = step_on(1, batch)
    np.testing.assert_array_equal(state.params, POLICY)
    assert int(state.step) < 0


def test_training_nears_the_budget_and_raises_the_reward():
    options = config.PpoClip(
        transform="identity", procedure="best_of_2", kl_budget=0.2, steps=80, prompts_per_step=16,
        samples_per_prompt=16, warmup_steps=2, learning_rate=0.01, epochs=2, minibatches=2,
    )  # fmt: skip
    mesh, parts = make_mesh(1), assembled.models()
    prompts = Prompts(np.zeros((16, 2), np.int32), np.ones(16, np.int32), np.arange(16, dtype=np.uint32))

    def score(prompts, responses):
        return (responses.tokens * jnp.array([[[9.0, 3.0, 1.0]]])).sum(-1)

    sample = assembly.sampler(
        parts, mesh, num_samples=128, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,), temperature=1.0
    )
    table = np.sort(np.asarray(score(prompts, sample(REFERENCE, prompts, jax.random.key(1)).responses)), axis=-1)
    beta = options.objective.beta(128, table)
    ppo = assembly.algorithm(parts, mesh, options, beta=beta, num_references=128, eos_ids=(fakes.EOS,))
    assert isinstance(ppo, PpoClip) and ppo.updates == 4
    optimizer = optimizers.policy(options, updates=ppo.updates)
    step = assembly.policy_step(
        parts, mesh, options, ppo, optimizer, score, key=jax.random.key(2), max_length=fakes.LENGTH,
        eos_ids=(fakes.EOS,),
    )  # fmt: skip
    state, rows = programs.init_state(REFERENCE, optimizer, mesh, ppo.start()), []
    for _ in range(options.steps):
        state, metrics = step(state, REFERENCE, PolicyBatch(prompts, jnp.asarray(table)))
        rows.append({name: float(metrics[name]) for name in ("kl", "calibrated_reward")})
    kl, reward = (np.mean([row[name] for row in rows[-20:]]) for name in ("kl", "calibrated_reward"))
    assert rows[0]["calibrated_reward"] == pytest.approx(0.5, abs=0.1)
    # The clip slows the way to the budget down; the controller lets it no farther.
    assert 0.6 * 0.2 < kl < 1.15 * 0.2
    assert reward > 0.58


def test_options_that_cannot_be_are_refused():
    for options, message in (({"minibatches": 5}, "minibatches is 5"), ({"clip": 1.5}, "clip is 1.5")):
        with pytest.raises(InputError, match=message):
            config.PpoClip(**options)
