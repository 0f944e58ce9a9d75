"""How the product assembles its steps, here from the three-token language of tests/steps/fakes.py.

The oracles' tests know the product's wiring through this file alone: where that moves, this file changes and no test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctrl_jax import build, config
from ctrl_jax.devices.mesh import replicate, shard
from ctrl_jax.models import architecture
from ctrl_jax.steps import calibration, kl_budget
from ctrl_jax.types import Prompts, Responses, Rollouts
from tests.steps import fakes

Score = Callable[[Prompts, Responses], np.ndarray]
"""Raw rewards [B, N]."""


def models(reward: Any = None) -> build.Models:
    """The language's policy, and a reward model if one is given, in place of networks."""
    sizes = architecture.from_config(config.Model(width=8, layers=1, heads=2, kv_heads=1, mlp_width=8), 3)
    return build.models(sizes, config.Lora())._replace(policy=fakes.policy, reward=reward)


def table_of(rewards: np.ndarray, quantiles: int | None) -> np.ndarray:
    """Raw rewards [B, K] of the reference's responses as the calibration table keeps them, [B, K] or [B, Q]."""
    ascending = jnp.sort(jnp.asarray(rewards, jnp.float32), axis=-1)
    return np.asarray(calibration.quantiles(ascending, rewards.shape[1] if quantiles is None else quantiles))


@dataclass
class PolicyTraining:
    """A policy training on a mesh, from its first step; the attributes and results are NumPy arrays."""

    mesh: Mesh
    reference: jax.Array
    step: build.PolicyStep
    state: build.TrainState

    @property
    def params(self) -> np.ndarray:
        return np.asarray(self.state.params)

    @property
    def second_moment(self) -> np.ndarray:
        """The optimiser's running mean of squared gradients, of the shape of the parameters."""
        (moment,) = (x for x in jax.tree.leaves(self.state.optimizer) if x.shape == self.state.params.shape)
        return np.asarray(moment)

    @property
    def beta(self) -> float:
        return float(self.state.budget.beta)

    def draw(self, prompts: Prompts) -> Rollouts:
        """The rollouts that the next `train` would learn from."""
        return jax.device_get(self.step.sample(self.state.params, shard(self.mesh, prompts), self._key()))

    def train(self, prompts: Prompts, table: np.ndarray) -> dict[str, np.ndarray]:
        """One whole step; returns its metrics."""
        batch = shard(self.mesh, build.PolicyBatch(prompts, jnp.asarray(table)))
        self.state, metrics = self.step(self.state, self.reference, batch)
        return jax.device_get(metrics)

    def update(self, rollouts: Rollouts, raw: np.ndarray, table: np.ndarray) -> dict[str, np.ndarray]:
        """One update by given rollouts and their raw rewards [B, N]; returns its metrics."""
        arguments = shard(self.mesh, (rollouts, jnp.asarray(raw), jnp.asarray(table)))
        self.state, metrics = self.step.update(self.state, self.reference, *arguments)
        return jax.device_get(metrics)

    def _key(self) -> jax.Array:
        return self.step.key(self.state.step)


def policy_training(
    mesh: Mesh,
    *,
    start: np.ndarray,
    reference: np.ndarray,
    score: Score | None,
    key: jax.Array,
    beta: float,
    held: bool,
    num_references: int,
    **policy: Any,
) -> PolicyTraining:
    """Policy and reference are tables of logits (fakes.params); `policy` are the fields of config.Policy."""
    options = config.Policy(**policy)
    optimizer = build.policy_optimizer(options)

    def sharded_score(prompts: Prompts, responses: Responses) -> jax.Array:
        assert score is not None
        return shard(mesh, jnp.asarray(score(*jax.device_get((prompts, responses))), jnp.float32))

    step = build.policy_step(
        models(), mesh, options, options.objective.transformed(num_references), optimizer, sharded_score,
        key=key, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,),
    )  # fmt: skip
    controller = kl_budget.init(beta, budget=options.kl_budget, held=held)
    state = build.init_state(jnp.asarray(start, jnp.float32), optimizer, mesh, controller)
    return PolicyTraining(mesh, replicate(mesh, jnp.asarray(reference, jnp.float32)), step, state)
