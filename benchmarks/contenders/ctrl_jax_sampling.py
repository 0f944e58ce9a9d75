"""This project's sampler: `build.sampler`."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, prompt_tokens
from ctrl_jax import build, config
from ctrl_jax.models import huggingface, weights
from ctrl_jax.runtime.mesh import make_mesh, replicate
from ctrl_jax.types import Params, Prompts

# No token has this id.
NO_EOS = (-1,)


def load(case: Case, folder: Path) -> tuple[build.Models, jax.sharding.Mesh, Params, Prompts]:
    architecture = huggingface.architecture(folder, dtype="float32")
    mesh = make_mesh(1)
    params = replicate(mesh, {"params": weights.load(folder, architecture)})
    prompts = Prompts(
        jnp.asarray(prompt_tokens(case, architecture.vocabulary_size)),
        jnp.full(case.prompts, case.prompt_length),
        jnp.arange(case.prompts, dtype=jnp.uint32),
    )
    return build.models(architecture, config.Lora()), mesh, params, prompts


def run(case: Case, folder: Path, turn: Callable[[], None]) -> None:
    parts, mesh, params, prompts = load(case, folder)
    sample = build.sampler(
        parts, mesh, num_samples=case.samples, max_length=case.new_tokens, eos_ids=NO_EOS, temperature=1.0
    )
    key = jax.random.key(0)
    step = 0
    while True:
        turn()
        step += 1
        rollouts = jax.block_until_ready(sample(params, prompts, jax.random.fold_in(key, step)))
        assert int(rollouts.responses.lengths.sum()) == case.tokens
