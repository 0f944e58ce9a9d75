"""Responses to a set of prompts with their raw rewards, for calibration and evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ctrl_jax.config import Data
from ctrl_jax.devices.mesh import batch_parts, shard
from ctrl_jax.models import costs
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.pipeline import assembly, randomness
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime import hosts, preemption
from ctrl_jax.runtime.console import progress
from ctrl_jax.types import Params, Prompts, Responses, Rollouts, Score

ROWS = 2048
"""Responses a device reads at a time, at most: enough to fill it."""
BYTES = 2**30
"""Their caches, their prompts', and their logits, at most; fewer responses where a model's are large."""


def respond(
    run: Run, stage: str, params: Params, score: Score, prompts: Prompts, num_samples: int
) -> tuple[Rollouts, np.ndarray]:
    """N responses a prompt and their raw rewards [B, N], in host memory.

    `stage` names the random draws, as well as the progress bar; prompt and sample are folded into its key. So neither
    the batches nor the devices change a response, and two stages draw independently, as a win rate's estimate needs.
    """
    both = _sampling(run, stage, params, score, num_samples)
    rollouts, rewards = in_batches(run, stage, both, prompts, rows_per_prompt=num_samples)
    return rollouts, np.asarray(rewards)


def scored(
    run: Run, stage: str, params: Params, score: Score, prompts: Prompts, num_samples: int, *,
    done: int = 0, log_probs: bool = False,
) -> Iterator[tuple[Responses, np.ndarray, np.ndarray | None]]:  # fmt: skip
    """The responses of `respond` and their raw rewards [b, N], by batches from prompt `done` on.

    With `log_probs` also those of whole responses [b, N], nats, by the program with which training scores them. The
    sampler rounds otherwise, in bfloat16 by far: a policy that still is the reference would have a log-ratio to it.
    """
    both = _sampling(run, stage, params, score, num_samples)
    measure = assembly.log_probs(run.models, run.mesh, temperature=run.experiment.policy.temperature)

    def without_rollouts(batch: Prompts) -> tuple[Responses, Any, Any]:
        rollouts, rewards = both(batch)
        return rollouts.responses, rewards, measure(params, batch, rollouts.responses) if log_probs else None

    together = _together(run, prompts, num_samples)
    yield from batches(run, stage, without_rollouts, prompts, together=together, done=done)


def _sampling(
    run: Run, stage: str, params: Params, score: Score, num_samples: int
) -> Callable[[Prompts], tuple[Rollouts, Any]]:
    experiment = run.experiment
    sampler = assembly.sampler(
        run.models,
        run.mesh,
        num_samples=num_samples,
        max_length=experiment.data.response_length,
        eos_ids=run.corpus.tokenizer.eos_ids,
        temperature=experiment.policy.temperature,
    )
    key = randomness.stage_key(experiment.seed, stage)

    def both(batch: Prompts) -> tuple[Rollouts, Any]:
        rollouts = sampler(params, batch, key)
        return rollouts, score(batch, rollouts.responses)

    return both


def score(run: Run, reward: Score, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Raw rewards [B, N] of given responses."""
    return in_batches(
        run,
        "rewards",
        lambda batch: reward(*batch),
        (prompts, responses),
        rows_per_prompt=responses.tokens.shape[1],
    )


def at_once(run: Run, function: Callable[[Any], Any], tree: Any) -> np.ndarray:
    """What `function` makes of a tree of host arrays that lead with B, in one batch, in host memory.

    A batch that does not divide by the devices is filled up with its first prompts.
    """
    count, parts = len(jax.tree.leaves(tree)[0]), batch_parts(run.mesh)
    index = np.arange(-(-count // parts) * parts) % count
    batch = shard(run.mesh, jax.tree.map(lambda x: np.asarray(x)[index], tree))
    return np.asarray(hosts.fetch(function(batch)))[:count]


def in_batches(run: Run, label: str, function: Callable[[Any], Any], tree: Any, *, rows_per_prompt: int) -> Any:
    """`function` over batches of a tree of host arrays that lead with B; the results, joined again in host memory."""
    results = [*batches(run, label, function, tree, together=_together(run, tree, rows_per_prompt))]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def batches(
    run: Run, label: str, function: Callable[[Any], Any], tree: Any, *, together: int, done: int = 0
) -> Iterator[Any]:
    """What `function` makes of each batch of a tree of host arrays that lead with B, in host memory.

    It starts at row `done`. All batches have `together` rows, so that it compiles once; the last is filled up by
    repeating its last row.

    Raises:
      Preempted: on SIGTERM; on all of several processes, when it came to one, after a batch was taken.
    """
    size = len(jax.tree.leaves(tree)[0])
    with progress(label, size, start=done) as bar:
        for start in range(done, size, together):
            index = np.minimum(np.arange(start, start + together), size - 1)
            batch = shard(run.mesh, jax.tree.map(lambda x, index=index: np.asarray(x)[index], tree))
            result = hosts.fetch(function(batch))
            preemption.check()  # a reward function that catches everything has returned something else
            yield jax.tree.map(lambda x, real=size - start: np.asarray(x)[:real], result)
            bar.update(min(start + together, size))
            preemption.stop_together()


def _together(run: Run, tree: Any, rows_per_prompt: int) -> int:
    """Prompts that all devices take at a time, of a tree that leads with B of them."""
    devices, size = batch_parts(run.mesh), len(jax.tree.leaves(tree)[0])
    most = prompts_at_a_time(run.architecture, run.experiment.data, rows_per_prompt)
    return devices * min(most, -(-size // devices))


def prompts_at_a_time(sizes: Architecture, data: Data, rows_per_prompt: int) -> int:
    """Prompts whose responses a device reads at a time: what their keys and values, and four copies of a token's
    float32 logits for each response, leave room for; at least one, whatever its responses take."""
    one = costs.Batch(1, rows_per_prompt, data.prompt_length, data.response_length)
    caches = costs.prompt_cache(sizes, one) + costs.response_cache(sizes, one)
    held = caches + costs.logits(sizes, one.responses, copies=4)
    return max(1, min(ROWS // rows_per_prompt, BYTES // held))
