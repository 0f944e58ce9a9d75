"""A policy and its reference under decoders: what they return to test prompts, with rewards and cost."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.data.pipelines import PromptSet
from ctrl_jax.decoding.decoder import Decoded
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.evaluation import Picks
from ctrl_jax.pipeline import assembly, evaluate, randomness
from ctrl_jax.pipeline.rollouts import in_batches
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.rewards import gold
from ctrl_jax.runtime.console import say
from ctrl_jax.steps import calibration
from ctrl_jax.theory.nearest import Nearest, nearest
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Params, Prompts, Responses, Score

Decode = Callable[[Params, Prompts, jax.Array, Score], Decoded]


class Compared(NamedTuple):
    """A decoder's name and what it returned."""

    name: str
    sides: dict[str, Picks]
    """Of `policy` and `reference`, and of the policy `beside` where there is one, on the same test prompts."""
    one: np.ndarray
    """[B, M] raw rewards of the reference's plain responses."""
    is_search: bool
    nearest: Nearest | None
    """The procedure that a search comes near, where the run has a calibration table to know it by."""


def run(
    run: Run, aligned: Aligned, decoders: Sequence[Procedure | Tree], runs: int, beside: Params | None = None
) -> list[Compared]:
    """R = `runs` responses of each decoder to each test prompt: by policy and reference, and by a policy `beside` them
    with the draws of the policy."""
    experiment = run.experiment
    test = run.corpus.prompts("test", experiment.evaluation.prompts)
    one = evaluate.reference_side(run, aligned, test)[0].rewards
    params = {"policy": aligned.policy, "reference": aligned.reference.params}
    draws = {"policy": "policy", "reference": "reference", "beside": "policy"}
    params |= {} if beside is None else {"beside": beside}
    if aligned.table is None and any(isinstance(by, Tree) for by in decoders):
        say("Without a calibration table no procedure is looked for that comes near a search: train by CTRL for one.")
    found = []
    for by in decoders:
        decode = assembly.decoder(
            run.models, run.mesh, by,
            max_length=experiment.data.response_length,
            eos_ids=run.corpus.tokenizer.eos_ids,
            temperature=experiment.policy.temperature,
        )  # fmt: skip
        score, is_search = aligned.reward.score, isinstance(by, Tree)
        near = _nearest(run, aligned, by, decode, runs) if is_search and aligned.table is not None else None
        sides = {side: picks(run, draws[side], those, score, test, by, decode, runs) for side, those in params.items()}
        found.append(Compared(by.name, sides, one, is_search, near))
    return found


def _nearest(run: Run, aligned: Aligned, by: Procedure | Tree, decode: Decode, runs: int) -> Nearest:
    """By runs on the reference, for training prompts: the test prompts choose no transform."""
    assert aligned.table is not None, "run asks for it"
    experiment, table = run.experiment, jnp.asarray(aligned.table)
    prompts = run.corpus.prompts("train", experiment.calibration.prompts)
    params, score = aligned.reference.params, aligned.reward.score
    found = picks(run, "training", params, score, prompts, by, decode, runs)
    below, not_above = calibration.ranks(jnp.asarray(found.rewards), table)
    most = experiment.evaluation.responses_per_prompt
    return nearest(np.asarray(below), np.asarray(not_above), table.shape[1], most=most)


def picks(
    run: Run,
    side: str,
    params: Params,
    score: Score,
    prompts: PromptSet,
    by: Procedure | Tree,
    decode: Decode,
    runs: int,
) -> Picks:
    """`side` names the random draws, with the decoder: two sides draw independently."""
    experiment = run.experiment
    key = randomness.stage_key(experiment.seed, f"decode {side} by {by.name}")
    scored = 0

    def several(batch: Prompts) -> tuple[Responses, jax.Array, jax.Array]:
        nonlocal scored
        found = [decode(params, batch, jax.random.fold_in(key, place), score) for place in range(runs)]
        scored = found[0].scored
        responses = jax.tree.map(lambda *one: jnp.concatenate(one, axis=1), *(one.responses for one in found))
        return responses, score(batch, responses), jnp.stack([one.sampled for one in found], axis=1)

    responses, rewards, sampled = in_batches(
        run, f"{side} by {by.name}", several, prompts.prompts, rows_per_prompt=max(by.num_samples, runs)
    )
    golden = gold.reward(run.corpus).score(prompts.prompts, responses) if experiment.data.generated else None
    return Picks(np.asarray(rewards), golden, np.asarray(sampled).mean(axis=1), scored)
