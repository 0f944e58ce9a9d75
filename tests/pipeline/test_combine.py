"""The reward that several make: each prompt beside the reference's own responses to it, which are drawn once."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ctrl_jax.config import Combine
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import combine, rollouts
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.steps.combination import SmallestCalibrated
from ctrl_jax.types import Responses
from tests.pipeline.fakes import EXPERIMENTS

REFERENCE = Trained({"w": np.arange(3, dtype=np.float32)}, "reference")
EXPERIMENT = replace(EXPERIMENTS["combined"], combine=Combine(rewards=("rewards:reward",)))


def main_reward(prompts, responses):
    """Of the first token, and of the prompt."""
    tokens = np.asarray(responses.tokens)[..., 0].astype(np.float32)
    return tokens + np.asarray(prompts.tokens)[:, :1] % 7


MAIN = Reward(main_reward, "main")


@pytest.fixture
def run(prepared, fakes):
    prepared("combined")
    fakes.experiment = EXPERIMENT
    return prepare(Workspace(EXPERIMENT, Path("runs/work"), Path("runs/stages"), make_mesh(1)))


def some(prompts):
    tokens = np.random.default_rng(0).integers(97, 122, (len(prompts.ids), 4, 8)).astype(np.int32)
    return Responses(tokens, np.full(tokens.shape[:2], 8, np.int32))


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_prompt_is_compared_with_its_own_references_in_any_batch(run, fakes, split):
    reward = combine.run(run, REFERENCE, MAIN).reward
    prompts = run.corpus.prompts(split, 5).prompts
    responses = some(prompts)
    found = reward.score(prompts, responses)
    parts = [MAIN, *combine.others(run)]
    drawn, _ = fakes.sampling(run, combine.LABEL, REFERENCE.params, MAIN.score, 8)(prompts)
    expected = SmallestCalibrated()(
        combined.scores(parts, prompts, responses), combined.scores(parts, prompts, drawn.responses)
    )
    np.testing.assert_allclose(found, expected)
    assert len(np.unique(found)) >= 3
    back = jax.tree.map(lambda x: np.asarray(x)[::-1], (prompts, responses))
    np.testing.assert_array_equal(reward.score(*back), found[::-1])


def test_what_is_there_is_read_and_a_prompt_of_no_data_set_is_drawn_for(run, fakes):
    first = combine.run(run, REFERENCE, MAIN).reward
    fakes.sampled.clear()
    again = combine.run(run, REFERENCE, MAIN).reward
    prompts = run.corpus.prompts("test", 5).prompts
    responses = some(prompts)
    np.testing.assert_array_equal(again.score(prompts, responses), first.score(prompts, responses))
    assert again.fingerprint == first.fingerprint and combine.LABEL not in fakes.sampled
    others = run.corpus.prompts("validation", 2).prompts
    found = again.score(others, some(others))
    assert combine.LABEL in fakes.sampled
    fakes.sampled.clear()
    np.testing.assert_array_equal(again.score(others, some(others)), found)
    assert combine.LABEL not in fakes.sampled, "it was kept"
    other_reference = Trained({"w": np.ones(3, np.float32)}, "third")
    assert combine.run(run, other_reference, MAIN).reward.fingerprint != first.fingerprint


def test_a_reward_that_is_not_finite_is_refused_before_anything_is_written(run):
    def broken(prompts, responses):
        return np.full_like(main_reward(prompts, responses), np.nan)

    before = {*Path("runs/stages").rglob("rewards.npy")}
    with pytest.raises(InputError, match=r"reference rewards are not finite.*the reward broken is broken"):
        combine.run(run, REFERENCE, Reward(broken, "broken"))
    assert {*Path("runs/stages").rglob("rewards.npy")} == before


def test_a_reward_alone_stays_itself(run):
    alone = replace(run, experiment=replace(EXPERIMENT, combine=Combine()))
    assert combine.run(alone, REFERENCE, MAIN) == (MAIN, None, None)


def test_a_weighted_sum_draws_nothing(run, fakes):
    weighted = Combine(rewards=("rewards:reward",), by="weighted_sum", weights=(1.0, 0.5))
    reward = combine.run(replace(run, experiment=replace(EXPERIMENT, combine=weighted)), REFERENCE, MAIN).reward
    prompts = run.corpus.prompts("test", 5).prompts
    responses = some(prompts)
    values = combined.scores([MAIN, *combine.others(run)], prompts, responses)
    np.testing.assert_allclose(reward.score(prompts, responses), values[..., 0] + 0.5 * values[..., 1], rtol=1e-6)
    assert combine.LABEL not in fakes.sampled


def test_a_killed_drawing_goes_on_where_it_was(run, fakes, monkeypatch):
    whole = combine.run(run, REFERENCE, MAIN).reward
    monkeypatch.setattr(rollouts, "prompts_at_a_time", lambda *_: 2)
    drawn, killed = [], {"at": 4}

    def sampling(*arguments):
        both = fakes.sampling(*arguments)

        def of_batch(batch):
            drawn.append(np.asarray(batch.ids).tolist())
            if len(drawn) == killed["at"]:
                raise KeyboardInterrupt
            return both(batch)

        return of_batch

    monkeypatch.setattr(rollouts, "_sampling", sampling)
    elsewhere = replace(run, stages_dir=Path("runs/other_stages"))
    with pytest.raises(KeyboardInterrupt):
        combine.run(elsewhere, REFERENCE, MAIN)
    killed["at"] = 0
    again = combine.run(elsewhere, REFERENCE, MAIN).reward
    assert drawn[3] == drawn[4] and len(drawn) == 7, "three batches were kept, of six"
    assert again.fingerprint == whole.fingerprint


def test_another_evaluation_is_no_other_reward(run):
    fewer = replace(EXPERIMENT, evaluation=replace(EXPERIMENT.evaluation, prompts=4))
    first = combine.run(run, REFERENCE, MAIN).reward
    assert combine.run(replace(run, experiment=fewer), REFERENCE, MAIN).reward.fingerprint == first.fingerprint


def test_other_test_prompts_draw_nothing_for_those_of_training_and_have_their_own_references(run, fakes):
    first = combine.run(run, REFERENCE, MAIN).reward
    records = run.corpus.records
    moved = replace(run, corpus=replace(run.corpus, records={**records, "test": records["test"][::-1]}))
    prompts = moved.corpus.prompts("test", EXPERIMENT.evaluation.prompts).prompts
    fakes.sampled.clear()
    again = combine.run(moved, REFERENCE, MAIN).reward
    np.testing.assert_array_equal(fakes.sampled[combine.LABEL][0].prompts.ids, prompts.ids)
    np.testing.assert_allclose(again.score(prompts, some(prompts)), first.score(prompts, some(prompts)))


def test_log_sigmoids_make_another_reward_of_the_reward_models_alone(run, fakes):
    """r − q becomes log σ(r − q), q the quantile of the prompt's own references."""
    policy = replace(EXPERIMENT.policy, transform="raw")
    alone = replace(EXPERIMENT, combine=Combine(by="log_sigmoids(0.85)"), policy=policy)
    assert alone.combine.changes and alone.combine.compares
    assert not Combine().changes and not Combine().compares
    fakes.experiment = alone
    of_one = prepare(Workspace(alone, Path("runs/one"), Path("runs/stages"), make_mesh(1)))
    reward = combine.run(of_one, REFERENCE, MAIN).reward
    prompts = run.corpus.prompts("train", 5).prompts
    responses = some(prompts)
    drawn, _ = fakes.sampling(of_one, combine.LABEL, REFERENCE.params, MAIN.score, 8)(prompts)
    references = main_reward(prompts, drawn.responses)
    centred = main_reward(prompts, responses) - np.quantile(references, 0.85, axis=1, keepdims=True)
    # Where r − q is large, an error of it is a relative error of log σ; rewards near 100 have some 1e-5 in float32.
    np.testing.assert_allclose(reward.score(prompts, responses), -np.logaddexp(0, -centred), rtol=5e-5)
    assert combine.run(run, REFERENCE, MAIN).reward.fingerprint != reward.fingerprint != MAIN.fingerprint
