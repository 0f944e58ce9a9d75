"""Where a policy training step spends its time, at bon_helpful's shapes: medians of alternating repetitions.

    make bench        or        python benchmarks/policy_step.py [--repeats 10]

Random weights and EOS switched off, so that every response has its full length.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ctrl_jax import build
from ctrl_jax.__main__ import load_experiment
from ctrl_jax.models import architecture, huggingface, lora
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.mesh import make_mesh
from ctrl_jax.steps import kl_budget
from ctrl_jax.types import Prompts, Responses

NO_EOS = -1


def main(repeats: int = 10, experiment: str = "bon_helpful") -> None:
    config = load_experiment(experiment).experiment()
    data, policy = config.data, config.policy
    mesh = make_mesh()
    sizes = (
        huggingface.architecture(Path(config.model.path), dtype=config.model.dtype)
        if config.model.path
        else (architecture.from_config(config.model, data.vocabulary_size))
    )
    parts = build.models(sizes, config.model.lora)
    batch, samples, length = policy.prompts_per_step, policy.samples_per_prompt, data.response_length
    key = jax.random.key(0)
    params = build.init_decoder(parts, mesh, key)
    reward = lora.overlay(*build.adapt_reward(parts, mesh, key, params))
    tokens = jax.random.randint(key, (batch, data.prompt_length), 0, sizes.vocabulary_size)
    prompts = Prompts(tokens, jnp.full(batch, data.prompt_length), jnp.arange(batch, dtype=jnp.uint32))
    references = jnp.sort(jax.random.normal(key, (batch, config.calibration.samples_per_prompt)), axis=-1)

    sampler = build.sampler(
        parts, mesh, num_samples=samples, max_length=length, eos_ids=(NO_EOS,), temperature=policy.temperature
    )
    scorer = build.scorer(parts, mesh)

    def score(prompts: Prompts, responses: Responses) -> Any:
        return scorer(reward, prompts, responses)

    rollouts = sampler(params, prompts, key)
    phi = build.transform_of(policy, references.shape[1])
    optimizer = build.policy_optimizer(policy)
    step = build.policy_step(parts, mesh, policy, phi, optimizer, score, key=key, max_length=length, eos_ids=(NO_EOS,))
    state = build.init_state(
        build.adapt_decoder(parts, mesh, key, params), optimizer, mesh, kl_budget.init(0.3, budget=policy.kl_budget)
    )

    def whole_step() -> Any:
        nonlocal state
        state, metrics = step(state, params, build.PolicyBatch(prompts, references))
        return metrics

    phases: dict[str, Callable[[], Any]] = {
        "sample": lambda: sampler(params, prompts, key),
        "reward": lambda: score(prompts, rollouts.responses),
        "whole step": whole_step,
    }
    times: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(repeats + 1):  # the first compiles
        for name, phase in phases.items():
            started = time.perf_counter()
            jax.block_until_ready(phase())
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    medians["reference, loss and update"] = medians["whole step"] - medians["sample"] - medians["reward"]
    new_tokens = batch * samples * length
    rows = [[name, 1e3 * seconds, seconds / medians["whole step"]] for name, seconds in medians.items()]
    table(f"{experiment}: {batch} prompts × {samples} × {length} tokens", ["phase", "median ms", "share"], rows)
    rate = {name: new_tokens / seconds for name, seconds in medians.items()}
    say(f"Sampling: {rate['sample']:,.0f} tokens/s; whole step: {rate['whole step']:,.0f}.")


if __name__ == "__main__":
    tyro.cli(main)
