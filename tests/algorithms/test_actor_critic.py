"""CTRL with a critic: its gradient by enumeration, its steps by a second implementation in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.actor_critic import ActorCritic, Extra
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.steps import critic
from tests import assembled
from tests.algorithms import enumerated, test_ppo_clip
from tests.algorithms.enumerated import EVERY, PROMPT, Y, law
from tests.algorithms.test_own_rivals import BETA, POLICY, RAW, REFERENCE, REFERENCES, made, some, tilt
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

WIDTH = fakes.VOCABULARY
SIZES = {"width": WIDTH, "prompts_per_step": 2, "samples_per_prompt": 3}


class Taught(ActorCritic):
    """With a critic that has seen something."""

    def start(self) -> Extra:
        extra, random = super().start(), np.random.default_rng(4)
        of_rank = dataclasses.replace(extra.of_rank, weights=jnp.asarray(random.normal(size=WIDTH), jnp.float32))
        weights = jnp.asarray(random.normal(size=critic.POWERS), jnp.float32)
        return extra._replace(of_rank=of_rank, of_reward=dataclasses.replace(extra.of_reward, weights=weights))


def gradient(algorithm: Ctrl, size: int = 2) -> np.ndarray:
    def loss(params):
        return enumerated.expected_loss(algorithm, params, REFERENCE, size=size, raw=RAW, references=REFERENCES)

    return np.asarray(jax.jit(jax.grad(loss))(POLICY))


def test_with_a_whole_trace_any_critic_leaves_the_expected_gradient_as_it_is():
    taught = made(Taught, beta=3.0, trace=1.0, **SIZES)
    slope = tilt(lambda policy: policy @ RAW, 3.0)(law(POLICY), law(REFERENCE))
    expected = -jax.grad(lambda params: jnp.sum(law(POLICY) * slope * fakes.log_prob_of(params, PROMPT, EVERY)[0]))(
        POLICY
    )
    found = gradient(taught)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    biased = gradient(dataclasses.replace(taught, trace=0.5))
    assert np.abs(biased - expected).max() > 0.05 * np.abs(expected).max(), "with less, a wrong critic shows"


def test_without_a_critic_yet_it_is_ctrl():
    batch = some()
    one = made(ActorCritic, trace=0.0, **SIZES)
    other = made(Ctrl)
    found, expected = (
        jax.grad(lambda p, x=x: x.loss(p, REFERENCE, batch, x.targets(batch), x.start())[0].value)(POLICY)
        for x in (dataclasses.replace(one, trace=1.0), other)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def centred(x: np.ndarray) -> np.ndarray:
    count = x.shape[1]
    return (x - x.mean(axis=1, keepdims=True)) * count / (count - 1)


class Oracle:
    """The critic and its advantages, in float64, one response at a time."""

    def __init__(self) -> None:
        self.rank, self.reward = [(np.zeros((n, n)), np.zeros(n), 0.0, np.zeros(n)) for n in (WIDTH, critic.POWERS)]

    def step(self, batch, rewards: np.ndarray, ranks: np.ndarray, trace: float) -> np.ndarray:
        """A [B, N, T]; then it learns from the batch."""
        prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
        states = np.asarray(fakes.policy.apply(REFERENCE, prompts, responses), np.float64)
        lengths = np.asarray(responses.lengths)
        (B, N), T = lengths.shape, states.shape[2]
        prefix = np.zeros((B, N, T, WIDTH))
        for b, n, t in np.ndindex(B, N, T):
            prefix[b, n, t] = states[b, n, 1 : min(t, lengths[b, n]) + 1].sum(axis=0) / T
        prefix = centred(prefix)
        found, powers = prefix @ self.rank[3], np.zeros((B, N, T, critic.POWERS))
        for b, n, t in np.ndindex(B, N, T):
            u, time = found[b, n, t], min(t, lengths[b, n]) / T
            powers[b, n, t] = [u, u**2, u**3, u * time, u**2 * time, u**3 * time]
        powers = centred(powers)
        values, advantages = powers @ self.reward[3], np.zeros((B, N, T))
        for b, n in np.ndindex(B, N):
            after = rewards[b, n]
            for t in reversed(range(lengths[b, n])):
                later = advantages[b, n, t + 1] if t + 1 < lengths[b, n] else 0.0
                advantages[b, n, t] = after - values[b, n, t] + trace * later
                after = values[b, n, t]
        self.rank = self.learned(self.rank, prefix, ranks, lengths, 1000.0)
        self.reward = self.learned(self.reward, powers, rewards, lengths, 10.0)
        return advantages

    def learned(self, before, x, y, lengths, penalty):
        gram, moment, count = 0.95 * before[0], 0.95 * before[1], 0.95 * before[2] + y.size
        for b, n in np.ndindex(*y.shape):
            rows = x[b, n, : lengths[b, n]]
            gram, moment = gram + rows.T @ rows / len(rows), moment + y[b, n] * rows.mean(axis=0)
        ridge = penalty * np.diag(np.diag(gram)) / count
        used = np.diag(gram) > 0
        weights = np.zeros(len(moment))
        weights[used] = np.linalg.solve((gram + ridge)[np.ix_(used, used)], moment[used])
        return gram, moment, count, weights


@pytest.mark.parametrize("devices", [1, 8])
def test_its_steps_are_those_of_the_definition(devices):
    """Three steps; the gradient of each by advantages of the oracle, whose critic has seen the steps before alone."""
    trace, mesh, optimizer = 0.6, make_mesh(devices), optax.sgd(0.5)
    batches = [test_ppo_clip.experience(seed) for seed in range(3)]
    B, N = batches[0].raw.shape
    algorithm = made(ActorCritic, trace=trace, width=WIDTH, prompts_per_step=B, samples_per_prompt=N)
    step = programs.training_step(mesh, optimizer, algorithm, micro_batches=lambda batch: 2)
    state, params, oracle = programs.init_state(POLICY, optimizer, mesh, algorithm.start()), POLICY, Oracle()
    for batch in batches:
        targets = algorithm.targets(jax.tree.map(jnp.asarray, batch))
        rewards, ranks = (
            centred(np.asarray(x, np.float64)) for x in (targets.scored.transformed, targets.scored.calibrated)
        )
        advantages = oracle.step(batch, rewards, ranks, trace)

        def loss(params, batch=batch, advantages=advantages):
            log_probs, laws = test_ppo_clip.token_laws(params, batch.rollouts.prompts, batch.rollouts.responses)
            references = test_ppo_clip.token_laws(REFERENCE, batch.rollouts.prompts, batch.rollouts.responses)[1]
            mask = np.arange(laws.shape[2]) < np.asarray(batch.rollouts.responses.lengths)[..., None]
            kl = jnp.where(mask, (jnp.exp(laws) * (laws - references)).sum(-1), 0)
            later = jax.lax.stop_gradient(jnp.flip(jnp.cumsum(jnp.flip(kl, -1), -1), -1) - kl)
            later = (later - later.mean(axis=1, keepdims=True)) * N / (N - 1)
            gain = jnp.where(mask, (advantages / BETA - later) * log_probs, 0)
            return (kl.sum(-1) - gain.sum(-1)).mean()

        params = params - 0.5 * jax.grad(loss)(params)
        state, metrics = step(state, replicate(mesh, REFERENCE), shard(mesh, batch))
        np.testing.assert_allclose(np.asarray(state.params), params, atol=2e-5)
    assert np.abs(np.asarray(state.extra.of_reward.weights)).max() > 1e-3, "the critic has something to say"
    np.testing.assert_allclose(state.extra.of_rank.weights, oracle.rank[3], rtol=2e-3, atol=1e-6)
    reported = metrics.keys() - {"first_rows", "gradient_norms"}
    assert reported == {metric.name for metric in algorithm.metrics}


def test_of_the_whole_language_the_critic_is_what_is_to_be_expected():
    """All responses as often as the policy draws them: V_t nears E[R | y_<t], which the states before t tell apart."""
    algorithm = made(ActorCritic, "sampling", transform="identity", trace=1.0, **SIZES)
    random = np.random.default_rng(0)
    params, extra, explained = POLICY, algorithm.start(), []
    for _ in range(12):
        drawn = random.choice(Y, size=(64, 8), p=np.asarray(law(params), np.float64) / float(law(params).sum()))
        batch = enumerated.experience(params, drawn, RAW, REFERENCES)
        algorithm = dataclasses.replace(algorithm, prompts_per_step=64, samples_per_prompt=8)
        targets = algorithm.targets(batch)
        _, auxiliary = algorithm.loss(params, REFERENCE, batch, targets, extra)
        metrics = {name: found.value for name, found in algorithm.measure(batch, targets, auxiliary).items()}
        extra, more = algorithm.after(extra, metrics)
        explained.append(float(more["critic_explains"]))
    ranks = np.array([np.mean((r > REFERENCES) + 0.5 * (r == REFERENCES)) for r in RAW])
    policy = np.asarray(law(POLICY), np.float64)
    tokens, lengths = np.asarray(EVERY.tokens[0]), np.asarray(EVERY.lengths[0])
    residual = total = weight = 0.0
    for y in range(Y):
        for t in range(lengths[y]):
            same = [z for z in range(Y) if lengths[z] > t and (tokens[z, :t] == tokens[y, :t]).all()]
            mean = policy[same] @ ranks[same] / policy[same].sum()
            residual += policy[y] * (ranks[y] - mean) ** 2
            total += policy[y] * (ranks[y] - policy @ ranks) ** 2
            weight += policy[y]
    most = 1 - residual / total
    assert explained[0] == 0 and 0 < most < 1
    assert 0.3 * most < np.mean(explained[-4:]) < 1.1 * most, (explained, most)


def test_what_is_behind_a_response_does_not_count():
    batch = jax.tree.map(np.asarray, some())
    algorithm = made(Taught, trace=0.5, **SIZES)
    other = enumerated.padded_otherwise(batch)
    found = [
        algorithm.loss(POLICY, REFERENCE, x, algorithm.targets(x), algorithm.start())[0].value for x in (batch, other)
    ]
    assert found[0] == pytest.approx(float(found[1]), rel=1e-5)


def test_options_make_it():
    options = config.ActorCritic(trace=0.3)
    algorithm = assembled.assembly.algorithm(
        assembled.models(), make_mesh(1), options, beta=0.2, num_references=16, eos_ids=(fakes.EOS,)
    )
    assert type(algorithm) is ActorCritic and algorithm.trace == 0.3
    assert (algorithm.prompts_per_step, algorithm.samples_per_prompt) == (32, 16)
    assert algorithm.start().of_rank.weights.shape == (8,)
