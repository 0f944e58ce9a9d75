"""google-tunix's GRPO learner."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks.cases import Case, even_share, prompt_tokens, spell
from benchmarks.contenders.tunix_sampling import load, log_prob
from benchmarks.worker import Turn


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(even_share(np.array(text.split(), int))) for text in completions]


def run(case: Case, folder: Path, turn: Turn, *, micro_batches: int) -> None:
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    actor = load(folder, mesh)
    turn.log_prob = log_prob(actor, jnp.asarray(prompt_tokens(case, actor.config.vocab_size)[0]))
    graph, state = nnx.split(actor)
    reference = nnx.merge(graph, jax.tree.map(lambda x: x.copy(), state))
    roles = rl_cluster.Role
    micro = case.prompts // micro_batches
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-6, b2=0.99)),
                eval_every_n_steps=1_000_000,
                max_steps=1_000_000,
                mini_batch_size=case.prompts,
                train_micro_batch_size=micro,
                rollout_micro_batch_size=case.prompts,
                compute_logps_micro_batch_size=micro,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=case.new_tokens,
                max_prompt_length=case.prompt_length,
                kv_cache_size=case.prompt_length + case.new_tokens,
                temperature=1.0,
                top_p=1.0,
                # No token has this id.
                eos_tokens=[-1],
            ),
        ),
    )
    learner = grpo_learner.GRPOLearner(
        cluster, grpo_learner.GRPOConfig(num_generations=case.samples, num_iterations=1, beta=0.05), reward
    )
    # An array: the learner repeats the leaves of a batch, and a list's are its strings.
    prompts = np.array([spell(prompt) for prompt in prompt_tokens(case, actor.config.vocab_size)])

    def batches() -> Iterator[dict[str, np.ndarray]]:
        # The learner fetches a batch when it has dispatched the update on the last one.
        while True:
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            turn()
            yield {"prompts": prompts}

    learner.train(batches())
