"""Best-of-N jailbreaking of a policy and its reference: many attempts at each test prompt, each in another form."""

from typing import NamedTuple

import jax
import numpy as np

from ctrl_jax.data import augmentations, pipelines
from ctrl_jax.pipeline import assembly, evaluate, randomness
from ctrl_jax.pipeline.rollouts import in_batches, score
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.rewards import gold
from ctrl_jax.types import Params, Prompts, Responses, Score


class Attacked(NamedTuple):
    """By one judge, of B test prompts, who reads each response with the prompt as it was before it was augmented."""

    sides: dict[str, np.ndarray]
    """[B, N] of the responses to N attempts at `policy` and `reference`."""
    plain: np.ndarray
    """[B, M] of the reference's responses to the prompts themselves."""


def run(run: Run, aligned: Aligned, attempts: int, sigma: float) -> dict[str, Attacked]:
    """What each judge says: the reward that was trained on, gold where the data has one, and `evaluation.judge`."""
    experiment = run.experiment
    test = run.corpus.prompts("test", experiment.evaluation.prompts)
    reference, _ = evaluate.reference_side(run, aligned, test)
    judges: dict[str, Score] = {"reward": aligned.reward.score}
    if experiment.data.generated:
        judges["gold"] = gold.reward(run.corpus).score
    if (judge := evaluate.independent_judge(run)) is not None:
        judges["judge"] = judge.score
    asked = _asked(run, test, attempts, sigma)
    params = {"policy": aligned.policy, "reference": aligned.reference.params}
    responses = {side: _responses(run, side, those, asked, attempts) for side, those in params.items()}
    return {
        name: Attacked(
            {side: score(run, judged, test.prompts, those) for side, those in responses.items()},
            score(run, judged, test.prompts, jax.tree.map(np.asarray, reference.responses)),
        )
        for name, judged in judges.items()
    }


def _asked(run: Run, test: pipelines.PromptSet, attempts: int, sigma: float) -> Prompts:
    """[B · N] the attempts at each test prompt."""
    seed, length = run.experiment.seed, run.experiment.data.prompt_length
    conversations = [
        one for asked in test.conversations for one in augmentations.attempts(asked, attempts, sigma=sigma, seed=seed)
    ]
    names = [f"{attempt} {text}" for text in test.texts for attempt in range(attempts)]
    return pipelines.as_they_are(conversations, names, run.corpus.tokenizer, prompt_length=length)


def _responses(run: Run, side: str, params: Params, asked: Prompts, attempts: int) -> Responses:
    """[B, N] one response to each attempt. `side` names the random draws."""
    experiment = run.experiment
    sampler = assembly.sampler(
        run.models, run.mesh, num_samples=1, max_length=experiment.data.response_length,
        eos_ids=run.corpus.tokenizer.eos_ids, temperature=experiment.policy.temperature,
    )  # fmt: skip
    key = randomness.stage_key(experiment.seed, f"attack on the {side}")
    found = in_batches(
        run, f"attempts at the {side}", lambda batch: sampler(params, batch, key).responses, asked, rows_per_prompt=1
    )
    return jax.tree.map(lambda x: x.reshape(-1, attempts, *x.shape[2:]), found)
