"""This project's sampler: `assembly.sampler`."""

from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, prompt_tokens
from benchmarks.worker import Turn
from ctrl_jax import config
from ctrl_jax.devices.mesh import divide_cpu, make_mesh, num_cores, replicate, shard
from ctrl_jax.models import attention, huggingface, networks, weights
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.divisible import PROMPTS_A_CORE
from ctrl_jax.runtime.platform import peak_memory
from ctrl_jax.steps import logprobs
from ctrl_jax.types import Params, Prompts, Responses

# No token has this id.
NO_EOS = (-1,)


def load(
    case: Case, folder: Path, turn: Turn, devices: int | None = None
) -> tuple[networks.Networks, jax.sharding.Mesh, Params, Prompts]:
    architecture = huggingface.architecture(folder, dtype=case.dtype)
    if case.device == "gpu":
        turn.peak_bytes = peak_memory
    else:
        # As the jobs have it: a device a core for a model from scratch, as far as its prompts divide; one for a large
        # one.
        at_most = min(num_cores(), case.prompts // PROMPTS_A_CORE) if case.model == "tiny" else 1
        divide_cpu(devices or next((count for count in range(at_most, 1, -1) if case.prompts % count == 0), 1))
    mesh = make_mesh()
    params = replicate(mesh, {"params": weights.load(folder, architecture)})
    prompts = Prompts(
        jnp.asarray(prompt_tokens(case, architecture.vocabulary_size)),
        jnp.full(case.prompts, case.prompt_length),
        jnp.arange(case.prompts, dtype=jnp.uint32),
    )
    parts = networks.create(architecture, config.Lora(), fused_attention=attention.has_kernel(mesh))
    return parts, mesh, params, shard(mesh, prompts)


def log_prob(parts: networks.Networks, params: Params, tokens: jax.Array) -> float:
    """Mean log-prob of tokens [P] after the first."""
    prompts = Prompts(tokens[None, :1], jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32))
    responses = Responses(tokens[None, None, 1:], jnp.full((1, 1), tokens.size - 1))
    features = parts.policy.apply(params, prompts, responses)
    return float(logprobs.token_log_probs(parts.policy.unembed, params, features, responses.tokens).mean())


def run(case: Case, folder: Path, turn: Turn, *, devices: int | None = None) -> None:
    parts, mesh, params, prompts = load(case, folder, turn, devices)
    turn.log_prob = log_prob(parts, params, prompts.tokens[0])
    sample = assembly.sampler(
        parts, mesh, num_samples=case.samples, max_length=case.new_tokens, eos_ids=NO_EOS, temperature=1.0
    )
    key = jax.random.key(0)
    step = 0
    while True:
        turn()
        step += 1
        rollouts = jax.block_until_ready(sample(params, prompts, jax.random.fold_in(key, step)))
        assert int(rollouts.responses.lengths.sum()) == case.tokens
