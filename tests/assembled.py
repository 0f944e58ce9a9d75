"""How the product assembles its steps, here from the three-token language of tests/steps/fakes.py.

The oracles' tests know the product's wiring through this file alone: where that moves, this file changes and no test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctrl_jax import config
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import replicate, shard
from ctrl_jax.models import networks
from ctrl_jax.pipeline import assembly, optimizers, randomness, watch
from ctrl_jax.runtime import loop
from ctrl_jax.steps import calibration
from ctrl_jax.types import Examples, Experience, PolicyBatch, Prompts, Responses, RewardApply, Rollouts
from tests.steps import fakes

Score = Callable[[Prompts, Responses], np.ndarray]
"""Raw rewards [B, N]."""


def models(reward: RewardApply | None = None) -> networks.Networks:
    """The language's policy, and a reward model if one is given, in place of networks."""
    sizes = config.Model(width=8, layers=1, heads=2, kv_heads=1, mlp_width=8).architecture(3)
    return networks.create(sizes, config.Lora())._replace(policy=fakes.policy, reward=reward)


def table_of(rewards: np.ndarray, quantiles: int | None) -> np.ndarray:
    """Raw rewards [B, K] of the reference's responses as the calibration table keeps them, [B, K] or [B, Q]."""
    ascending = jnp.sort(jnp.asarray(rewards, jnp.float32), axis=-1)
    return np.asarray(calibration.quantiles(ascending, rewards.shape[1] if quantiles is None else quantiles))


@dataclass
class PolicyTraining:
    """A policy training on a mesh, from its first step; the attributes and results are NumPy arrays."""

    mesh: Mesh
    reference: jax.Array
    step: assembly.PolicyStep
    state: programs.TrainState

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
        return float(self.state.extra.beta)

    def draw(self, prompts: Prompts) -> Rollouts:
        """The rollouts that the next `train` would learn from."""
        return jax.device_get(self.step.sample(self.state.params, shard(self.mesh, prompts), self._key()))

    def train(self, prompts: Prompts, table: np.ndarray) -> dict[str, np.ndarray]:
        """One whole step; returns its metrics."""
        batch = shard(self.mesh, PolicyBatch(prompts, jnp.asarray(table)))
        self.state, metrics = self.step(self.state, self.reference, batch)
        return jax.device_get(metrics)

    def update(self, rollouts: Rollouts, raw: np.ndarray, table: np.ndarray) -> dict[str, np.ndarray]:
        """One update by given rollouts and their raw rewards [B, N]; returns its metrics."""
        experience = shard(self.mesh, Experience(rollouts, jnp.asarray(raw), jnp.asarray(table)))
        self.state, metrics = self.step.update(self.state, self.reference, experience)
        return jax.device_get(metrics)

    def _key(self) -> jax.Array:
        return self.step.key(self.state.step)


def reference_rewards(
    mesh: Mesh, *, reference: np.ndarray, score: Score, prompts: Prompts, samples: int, temperature: float, seed: int
) -> np.ndarray:
    """Raw rewards [B, K] of responses that the product's sampler draws from the reference."""
    sample = assembly.sampler(
        models(), mesh, num_samples=samples, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,), temperature=temperature
    )
    key = randomness.stage_key(seed, "calibration")
    rollouts = sample(jnp.asarray(reference, jnp.float32), shard(mesh, prompts), key)
    return score(prompts, jax.device_get(rollouts.responses))


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
    kind: type[config.Policy] = config.Policy,
    **policy: Any,
) -> PolicyTraining:
    """Policy and reference are tables of logits (fakes.params); `policy` are the fields of `kind`."""
    options = kind(beta=beta if held else None, **policy)

    def sharded_score(prompts: Prompts, responses: Responses) -> jax.Array:
        assert score is not None
        return shard(mesh, jnp.asarray(score(*jax.device_get((prompts, responses))), jnp.float32))

    algorithm = assembly.algorithm(
        models(), mesh, options, beta=beta, num_references=num_references, eos_ids=(fakes.EOS,)
    )
    optimizer = optimizers.policy(options, updates=algorithm.updates)
    step = assembly.policy_step(
        models(), mesh, options, algorithm, optimizer, sharded_score,
        key=key, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,),
    )  # fmt: skip
    state = programs.init_state(jnp.asarray(start, jnp.float32), optimizer, mesh, algorithm.start())
    return PolicyTraining(mesh, replicate(mesh, jnp.asarray(reference, jnp.float32)), step, state)


def kl_of_responses(
    mesh: Mesh, policy: np.ndarray, reference: np.ndarray, prompts: Prompts, responses: Responses, *, temperature: float
) -> np.ndarray:
    """[B, N] nats of given responses, as the evaluation measures it."""
    measure = assembly.kl_of_responses(models(), mesh, temperature=temperature)
    params = [replicate(mesh, jnp.asarray(table, jnp.float32)) for table in (policy, reference)]
    log_probs = np.zeros(responses.tokens.shape, np.float32)
    return np.asarray(measure(*params, shard(mesh, Rollouts(prompts, responses, log_probs))))


def train_policy(
    mesh: Mesh, directory: Path, *, reference: np.ndarray, score: Score, prompts: Prompts, table: np.ndarray,
    seed: int, **policy: Any,
) -> np.ndarray:  # fmt: skip
    """A whole training from the reference, by the product's own β, optimiser, controller and loop; the parameters."""
    options = config.Policy(checkpoint_every=policy["steps"], **policy)
    objective, num_references = options.objective, table.shape[1]
    objective.check(num_references)
    training = policy_training(
        mesh, start=reference, reference=reference, score=score, key=randomness.stage_key(seed, "policy"),
        beta=objective.beta(num_references, table), held=False, num_references=num_references, **policy,
    )  # fmt: skip
    data = batches(PolicyBatch(prompts, table), batch_size=options.prompts_per_step, seed=seed)
    with loop.open_training(
        "policy", training.state, data, metrics=Ctrl.metrics, devices=programs.Devices(mesh),
        steps=options.steps, checkpoint_every=options.checkpoint_every, directory=directory, fingerprint="policy",
    ) as updates:  # fmt: skip
        for update in updates.updates(lambda state, batch: training.step(state, training.reference, batch)):
            updates.refuse_unsound(update)
            updates.save(update, score=watch.score(options, updates.report(update)))
    return np.asarray(updates.state.params)


@dataclass
class SupervisedTraining:
    """A training on examples: of demonstrations for the reference policy, or of preference pairs for a reward model."""

    mesh: Mesh
    step: programs.Step
    state: programs.TrainState

    @property
    def params(self) -> np.ndarray:
        return np.asarray(self.state.params)

    def train(self, batch: Examples) -> dict[str, np.ndarray]:
        """One step; returns its metrics."""
        self.state, metrics = self.step(self.state, {}, shard(self.mesh, batch))
        return jax.device_get(metrics)


def supervised_training(
    mesh: Mesh, *, start: np.ndarray, reward: RewardApply | None, micro_batches: int, members: int = 1, **stage: Any
) -> SupervisedTraining:
    """SFT, or Bradley-Terry where there is a reward model; `stage` are the fields of config.Supervised."""
    optimizer = optimizers.supervised(config.Supervised(**stage))
    if members > 1:
        parts = models(reward)._replace(members=members)
        step = assembly.reward_ensemble_step(parts, mesh, optimizer, seed=0, micro_batches=micro_batches)
    else:
        make = assembly.sft_step if reward is None else assembly.reward_model_step
        step = make(models(reward), mesh, optimizer, micro_batches=micro_batches)
    return SupervisedTraining(mesh, step, programs.init_state(jnp.asarray(start, jnp.float32), optimizer, mesh))
