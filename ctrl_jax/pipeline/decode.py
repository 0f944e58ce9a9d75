"""A policy and its reference under decoders: what they return to test prompts, with rewards and cost."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.data.pipelines import PromptSet
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.evaluation import Picks
from ctrl_jax.pipeline import assembly, calibrate, evaluate, randomness
from ctrl_jax.pipeline.rollouts import in_batches
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.rewards import gold
from ctrl_jax.steps import calibration
from ctrl_jax.theory.nearest import Nearest, nearest
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Params, Prompts, Responses, Score


class Compared(NamedTuple):
    """A decoder's name and what it returned."""

    name: str
    sides: dict[str, Picks]
    """Of `policy` and `reference`, and of the policy `beside` where there is one, on the same test prompts."""
    one: np.ndarray
    """[B, M] raw rewards of the reference's plain responses."""
    nearest: Nearest | None
    """The procedure that it comes near, where it is none."""


def run(
    run: Run, aligned: Aligned, decoders: Sequence[Procedure | Tree], runs: int, beside: Params | None = None
) -> list[Compared]:
    """R = `runs` responses of each decoder to each test prompt: by policy and reference, and by a policy `beside` them
    with the draws of the policy."""
    experiment, score = run.experiment, aligned.reward.score
    test = run.corpus.prompts("test", experiment.evaluation.prompts)
    one = evaluate.reference_side(run, aligned, test)[0].rewards
    params = {"policy": aligned.policy, "reference": aligned.reference.params}
    draws = {"policy": "policy", "reference": "reference", "beside": "policy"}
    params |= {} if beside is None else {"beside": beside}
    # By runs on the reference, for training prompts: the test prompts choose no transform.
    train = run.corpus.prompts("train", experiment.calibration.prompts)
    searches = any(isinstance(by, Tree) for by in decoders)
    table = calibrate.run(run, aligned.reference, aligned.reward).table.rewards if searches else None
    found = []
    for by in decoders:
        near = None
        if isinstance(by, Tree) and table is not None:
            tried = picks(run, "training", params["reference"], score, train, by, runs)
            ranks = calibration.calibrate_sorted(jnp.asarray(tried.rewards), jnp.asarray(table))
            near = nearest(np.asarray(ranks), table.shape[1])
        sides = {side: picks(run, draws[side], those, score, test, by, runs) for side, those in params.items()}
        found.append(Compared(by.name, sides, one, near))
    return found


def picks(
    run: Run, side: str, params: Params, score: Score, prompts: PromptSet, by: Procedure | Tree, runs: int
) -> Picks:
    """`side` names the random draws, with the decoder: two sides draw independently."""
    experiment = run.experiment
    decode = assembly.decoder(
        run.models, run.mesh, by,
        max_length=experiment.data.response_length,
        eos_ids=run.corpus.tokenizer.eos_ids,
        temperature=experiment.policy.temperature,
    )  # fmt: skip
    key = randomness.stage_key(experiment.seed, f"decode {side} by {by.name}")
    width = by.width if isinstance(by, Tree) else by.num_samples

    def several(batch: Prompts) -> tuple[Responses, jax.Array, jax.Array]:
        found = [decode(params, batch, jax.random.fold_in(key, place), score) for place in range(runs)]
        responses = jax.tree.map(lambda *one: jnp.concatenate(one, axis=1), *(one.responses for one in found))
        return responses, score(batch, responses), jnp.stack([one.sampled for one in found], axis=1)

    responses, rewards, sampled = in_batches(
        run, f"{side} by {by.name}", several, prompts.prompts, rows_per_prompt=max(width, runs)
    )
    golden = gold.reward(run.corpus).score(prompts.prompts, responses) if experiment.data.generated else None
    segments = -(-experiment.data.response_length // by.segment) if isinstance(by, Tree) else 1
    return Picks(np.asarray(rewards), golden, np.asarray(sampled).mean(axis=1), width * segments)
