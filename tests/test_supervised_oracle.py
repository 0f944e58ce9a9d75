"""The assembled, jitted steps of SFT and of the reward model beside NumPy, on one device and on eight."""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.steps.ensemble import bootstrap_weights
from ctrl_jax.types import Examples, Prompts, Responses
from tests import assembled, oracle
from tests.steps import fakes

BATCH, STEPS, WARMUP, OF, RATE = 16, 5, 2, 10, 0.05
SFT_START = np.asarray(fakes.params(jax.random.key(1)))
REWARD_START = np.random.default_rng(1).normal(size=(2, fakes.LENGTH, fakes.VOCABULARY))


pytestmark = pytest.mark.usefixtures("compile_fast")


def examples(seed: int, samples: int) -> Examples:
    """Responses of all lengths, the longer ones on the devices of the first prompts; and some equal pairs."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**32, BATCH, np.uint32)
    lengths = np.sort(rng.integers(1, fakes.LENGTH + 1, (BATCH, samples)), axis=0)[::-1].astype(np.int32)
    tokens = rng.integers(0, fakes.VOCABULARY, (BATCH, samples, fakes.LENGTH)).astype(np.int32)
    tokens[:2], lengths[:2] = tokens[:2, :1], lengths[:2, :1]
    prompts = Prompts(np.zeros((BATCH, 2), np.int32), np.ones(BATCH, np.int32), ids)
    return Examples(prompts, Responses(tokens, np.ascontiguousarray(lengths)))


def reward(params: jax.Array, prompts: Prompts, responses: Responses, *, scale: float = 1.0) -> jax.Array:
    """Raw rewards [B, N]: of each real token its entry of the table [2, T, V]."""
    tokens, lengths = responses.tokens, responses.lengths
    position = jnp.arange(tokens.shape[-1])[None, None]
    values = scale * params[(prompts.ids % 2)[:, None, None], position, tokens]
    return jnp.where(position < lengths[..., None], values, 0).sum(-1)


def negative_log_likelihood(params: np.ndarray, batch: Examples) -> tuple[dict[str, float], np.ndarray]:
    """(metrics, gradient) of the mean of −log π(token) over the real tokens of the batch."""
    losses, gradient = [], np.zeros(params.shape)
    for prompt, tokens, length in zip(
        batch.prompts.ids, batch.responses.tokens[:, 0], batch.responses.lengths[:, 0], strict=True
    ):
        for t in range(length):
            law = oracle.log_law(params, prompt, tokens[:t], temperature=1.0)
            losses.append(-law[tokens[t]])
            gradient[oracle.place(prompt, tokens[:t])] += np.exp(law) - np.eye(3)[tokens[t]]
    return {"loss": float(np.mean(losses))}, gradient / len(losses)


def bradley_terry(params: np.ndarray, batch: Examples, *, scale: float = 1.0) -> tuple[dict[str, float], np.ndarray]:
    """(metrics, gradient) of the mean of −log σ(r(chosen) − r(rejected)) over the pairs."""
    losses, right, gradient = [], [], np.zeros(params.shape)
    for prompt, tokens, lengths in zip(batch.prompts.ids, batch.responses.tokens, batch.responses.lengths, strict=True):
        margin, slope = 0.0, np.zeros(params.shape)
        for response, sign in ((0, 1), (1, -1)):
            for t in range(lengths[response]):
                margin += sign * scale * params[prompt % 2, t, tokens[response, t]]
                slope[prompt % 2, t, tokens[response, t]] += sign * scale
        losses.append(math.log1p(math.exp(-margin)))
        right.append(0.5 if not slope.any() else float(margin > 0))
        gradient -= slope / (1 + math.exp(margin))
    return {"loss": float(np.mean(losses)), "accuracy": float(np.mean(right))}, gradient / len(losses)


@dataclass
class AdamW:
    """Gradients of norm 1 at most; a learning rate straight up, then down by half a cosine; weight decay of 1 %."""

    params: np.ndarray
    step: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(()))
    square: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def take(self, gradient: np.ndarray) -> None:
        gradient = gradient / max(1.0, np.linalg.norm(gradient))
        self.mean, self.square = 0.9 * self.mean + 0.1 * gradient, 0.999 * self.square + 0.001 * gradient**2
        count = self.step + 1
        adam = self.mean / (1 - 0.9**count) / (np.sqrt(self.square / (1 - 0.999**count)) + 1e-8)
        done = (self.step - WARMUP) / (OF - WARMUP)
        rate = RATE * (self.step / WARMUP if done < 0 else 0.5 * (1 + math.cos(math.pi * done)))
        self.params = self.params - rate * (adam + 0.01 * self.params)
        self.step = count


MEMBERS = 3


def ensemble_reward(params: jax.Array, prompts: Prompts, responses: Responses) -> jax.Array:
    """Raw rewards [B, N, M]: each member has a table of its own."""
    return jnp.stack([reward(params[member], prompts, responses) for member in range(MEMBERS)], axis=-1)


def weighted_bradley_terry(params: np.ndarray, batch: Examples) -> tuple[dict[str, float], np.ndarray]:
    """As `bradley_terry`, of each member by its bootstrap sample; the accuracy is that of their mean."""
    weights = np.asarray(bootstrap_weights(jnp.asarray(batch.prompts.ids), jax.random.key(0), MEMBERS))
    loss, gradient = 0.0, np.zeros(params.shape)
    for row, member in np.ndindex(weights.shape):
        values, slope = bradley_terry(params[member], jax.tree.map(lambda x, row=row: x[row : row + 1], batch))
        loss += weights[row, member] * values["loss"] / weights.sum()
        gradient[member] += weights[row, member] * slope / weights.sum()
    rewards = np.asarray(ensemble_reward(*jax.tree.map(jnp.asarray, (params, batch.prompts, batch.responses)))).mean(-1)
    right = np.mean((1 + np.sign(rewards[:, 0] - rewards[:, 1])) / 2)
    return {"loss": float(loss), "accuracy": float(right)}, gradient


KINDS = {
    "reward ensemble": (
        ensemble_reward,
        weighted_bradley_terry,
        np.stack([REWARD_START, -REWARD_START, 0 * REWARD_START]),
    ),
    "sft": (None, negative_log_likelihood, SFT_START),
    "reward model": (reward, bradley_terry, REWARD_START),
    "reward model, clipped": (partial(reward, scale=20), partial(bradley_terry, scale=20), REWARD_START / 20),
}


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 1), (1, 4), (8, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_assembled_steps_are_the_oracles(kind, devices, micro_batches):
    score, loss, start = KINDS[kind]
    product = assembled.supervised_training(
        make_mesh(devices), start=start, reward=score, micro_batches=micro_batches,
        steps=OF, warmup_steps=WARMUP, learning_rate=RATE, batch_size=BATCH,
        members=MEMBERS if "ensemble" in kind else 1,
    )  # fmt: skip
    expected = AdamW(np.asarray(start, np.float64))
    norms = []
    for step in range(STEPS):
        batch = examples(step, samples=1 if score is None else 2)
        metrics = product.train(batch)
        values, gradient = loss(expected.params, batch)
        norms.append(np.linalg.norm(gradient))
        for name, value in (values | {"gradient_norm": norms[-1]}).items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, step {step}")
        expected.take(gradient)
        # Adam divides a gradient by its size: what rounding leaves of one that is 0 is no smaller.
        np.testing.assert_allclose(product.params, expected.params, rtol=1e-5, atol=2e-5)
    assert (max(norms) > 1) == ("clipped" in kind), norms


def test_the_pairs_hold_ties_and_the_lengths_differ():
    batch = examples(0, 2)
    rewards = np.asarray(
        reward(jnp.asarray(REWARD_START), *jax.tree.map(jnp.asarray, (batch.prompts, batch.responses)))
    )
    assert 0 < np.mean(rewards[:, 0] == rewards[:, 1]) < 1
    assert bradley_terry(REWARD_START, batch)[0]["accuracy"] % (1 / BATCH) != 0.5
    assert len({int(length) for length in batch.responses.lengths.ravel()}) == fakes.LENGTH
