"""This project's step of policy training: `assembly.policy_step`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, even_share
from benchmarks.contenders.ctrl_jax_sampling import NO_EOS, load, log_prob
from benchmarks.worker import Turn
from ctrl_jax import config
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import shard
from ctrl_jax.pipeline import assembly, optimizers
from ctrl_jax.types import PolicyBatch, Prompts, Responses


def score(prompts: Prompts, responses: Responses) -> np.ndarray:
    return even_share(responses.tokens).astype(np.float32)


def run(case: Case, folder: Path, turn: Turn, *, micro_batches: int | None) -> None:
    parts, mesh, reference, prompts = load(case, folder, turn)
    turn.log_prob = log_prob(parts, reference, prompts.tokens[0])
    policy = config.Policy(
        prompts_per_step=case.prompts,
        samples_per_prompt=case.samples,
        micro_batches=micro_batches,
        beta=0.05,
        learning_rate=1e-6,
        steps=10_000,
    )
    # Even shares of reference responses, as a calibration table has them.
    references = np.random.default_rng(1).binomial(case.new_tokens, 0.5, (case.prompts, 128)) / case.new_tokens
    batch = shard(mesh, PolicyBatch(prompts, jnp.asarray(np.sort(references, axis=1), jnp.float32)))
    optimizer = optimizers.policy(policy)
    algorithm = assembly.algorithm(parts, mesh, policy, beta=0.05, num_references=128, eos_ids=NO_EOS)
    step = assembly.policy_step(
        parts, mesh, policy, algorithm, optimizer, score,
        key=jax.random.key(0), max_length=case.new_tokens, eos_ids=NO_EOS,
    )  # fmt: skip
    state = programs.init_state(reference, optimizer, mesh, algorithm.start())
    while True:
        turn()
        state, metrics = jax.block_until_ready(step(state, reference, batch))
        assert float(metrics["response_length"]) == case.new_tokens
