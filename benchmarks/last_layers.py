"""A policy step with adapters on all layers, and on the last ones alone, of any model directory.

    python -m benchmarks.last_layers models/SmolLM2-135M-Instruct --counts 30 10 6

Times the three programs of a step: the policy samples, a reward model on its trunk scores, and the update. Each number
of layers is measured twice: once with the layers below read by policy and reference each for itself, and once by both
together, as training does it. All are in one process and take turns, so that a disturbance hits them alike; prompts are
random, and no response ends before its full length.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ctrl_jax import config
from ctrl_jax.devices import parameters, partitioning, programs
from ctrl_jax.devices.mesh import make_mesh, shard
from ctrl_jax.models import attention, lora, networks, pretrained
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.lora import Lora
from ctrl_jax.pipeline import assembly, optimizers
from ctrl_jax.rewards.reward import scorer
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.platform import setup_compilation_cache
from ctrl_jax.types import Experience, Params, PolicyBatch, Prompts

NO_EOS = -1
REFERENCES = 32


@dataclass
class Step:
    """A policy step in the making, and all that it is called with."""

    layers: int
    shared: bool
    step: assembly.PolicyStep
    state: programs.TrainState
    reference: Params
    batch: PolicyBatch

    def seconds(self) -> tuple[dict[str, float], float]:
        """(seconds of each program of one step, its loss)"""
        params, key = lora.overlay(self.reference, self.state.params), self.step.key(self.state.step)
        jax.block_until_ready((params, key))
        sampling, rollouts = _clock(lambda: self.step.sample(params, self.batch.prompts, key))
        scoring, raw = _clock(lambda: self.step.score(self.batch.prompts, rollouts.responses))
        experience = Experience(rollouts, raw, self.batch.reference_rewards)
        updating, (self.state, metrics) = _clock(lambda: self.step.update(self.state, self.reference, experience))
        return {"sample": sampling, "score": scoring, "update": updating}, float(metrics["loss"])


def _clock(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - started, result


def prepare(
    architecture: Architecture, reference: Params, adapters: Lora, policy: config.Policy, *,
    prompt_length: int, response_length: int, shared: bool,
) -> Step:  # fmt: skip
    mesh, key = make_mesh(1), jax.random.key(0)
    fused = attention.has_kernel(mesh)
    parts = networks.create(architecture, adapters, fused_attention=fused)
    layers = len(architecture.layers) - adapters.first_layer(len(architecture.layers))
    if not shared:
        # It reads the same adapters, and does not know that there are none below.
        whole = networks.create(architecture, replace(adapters, last_layers=None), fused_attention=fused)
        parts = parts._replace(policy=whole.policy)
    optimizer = optimizers.policy(policy)
    algorithm = assembly.algorithm(parts, mesh, policy, beta=0.3, num_references=REFERENCES, eos_ids=(NO_EOS,))
    frozen, trained = parameters.adapt_reward(parts, mesh, key, reference)
    reward, score = lora.overlay(frozen, trained), scorer(parts, mesh)
    step = assembly.policy_step(
        parts, mesh, policy, algorithm, optimizer, lambda *batch: score(reward, *batch),
        key=key, max_length=response_length, eos_ids=(NO_EOS,),
    )  # fmt: skip
    state = programs.init_state(
        parameters.adapt_decoder(parts, mesh, key, reference), optimizer, mesh, algorithm.start()
    )
    count = policy.prompts_per_step
    tokens = jax.random.randint(key, (count, prompt_length), 0, architecture.vocabulary_size)
    prompts = Prompts(tokens, jnp.full(count, prompt_length), jnp.arange(count, dtype=jnp.uint32))
    rewards = jnp.sort(jax.random.normal(key, (count, REFERENCES)), axis=-1)
    return Step(layers, shared, step, state, reference, shard(mesh, PolicyBatch(prompts, rewards)))


def main(
    model: Path,
    counts: tuple[int, ...] = (30, 10, 6),
    rank: int = 8,
    prompts: int = 8,
    samples: int = 8,
    prompt_length: int = 64,
    response_length: int = 24,
    dtype: pretrained.Type = "float32",
    repeats: int = 5,
) -> None:
    """Times a policy step by the number of layers that have an adapter.

    Args:
      model: a Hugging Face directory.
      counts: of the last layers that have an adapter.
      rank: of the adapters.
      prompts: of a step.
      samples: responses a prompt.
      prompt_length: tokens.
      response_length: tokens.
      dtype: of the computation.
      repeats: steps of each kind, of which the medians are shown, after one that compiles.
    """
    setup_compilation_cache(Path(".cache/compiled"))
    architecture = pretrained.architecture(model, None, dtype=dtype)
    place = functools.partial(partitioning.sharding, make_mesh(1))
    reference = pretrained.load(model, None, dtype=dtype, place=place)
    policy = config.Policy(prompts_per_step=prompts, samples_per_prompt=samples, learning_rate=1e-4)
    lengths = {"prompt_length": prompt_length, "response_length": response_length}
    steps = [
        prepare(architecture, reference, Lora(rank, 2.0 * rank, last_layers=count), policy, shared=shared, **lengths)
        for count in counts
        for shared in ((False, True) if count < len(architecture.layers) else (True,))
    ]
    measured = [[step.seconds() for step in steps] for _ in range(1 + repeats)][1:]
    rows: list[list[object]] = []
    for step, found in zip(steps, zip(*measured, strict=True), strict=True):
        medians = [statistics.median(seconds[name] for seconds, _ in found) for name in ("sample", "score", "update")]
        total = statistics.median(sum(seconds.values()) for seconds, _ in found)
        below = len(architecture.layers) - step.layers
        how = "–" if not below else f"{below}, by both {'together' if step.shared else 'apart'}"
        rows.append([step.layers, how, *(f"{each:.2f}" for each in (*medians, total)), f"{found[-1][1]:.5f}"])
    table(
        f"A policy step on {jax.devices()[0].device_kind}: {prompts} × {samples} responses, {prompt_length} + "
        f"{response_length} tokens, adapters of rank {rank}",
        ["layers with adapters", "layers below, read", "sample s", "score s", "update s", "step s", "last loss"],
        rows,
    )
    say("Of one number of layers, both ways must end in the same loss but for rounding.")


if __name__ == "__main__":
    tyro.cli(main)
