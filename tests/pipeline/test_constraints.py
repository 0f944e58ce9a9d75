"""Rewards at floors, from the experiment to evaluation.json: ranked beside the reference's own responses, and never
mixed into the reward that is climbed."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ctrl_jax.config import Combine
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import align, combine
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from tests import oracle
from tests.pipeline.fakes import EXPERIMENTS, train
from tests.pipeline.test_combine import MAIN, REFERENCE

FLOORS = (0.5, 0.4)
NAMES = ("rewards:reward", "rewards:reward_too")
BASE = EXPERIMENTS["classifier"]
POLICY = replace(BASE.policy, floors=FLOORS)
EXPERIMENT = replace(BASE, combine=Combine(rewards=NAMES), policy=POLICY)


@pytest.fixture
def run(prepared, fakes):
    prepared("classifier")
    fakes.experiment = EXPERIMENT
    return prepare(Workspace(EXPERIMENT, Path("runs/constrained"), Path("runs/stages"), make_mesh(1)))


@pytest.mark.parametrize("kl", [0.3, 1.0])
def test_a_floor_that_no_policy_reaches_within_the_budget_is_refused_before_any_work(kl):
    """The highest mean rank at a KL is that of the identity's ideal policy: a density ∝ exp(u / β)."""
    u = (np.arange(10_000) + 0.5) / 10_000
    low, high = 0.01, 10.0
    for _ in range(60):
        beta = (low * high) ** 0.5
        density = np.exp(u / beta) / np.exp(u / beta).mean()
        low, high = (beta, high) if (density * np.log(density)).mean() > kl else (low, beta)
    highest = (density * u).mean()
    assert highest < 0.95
    align.check_budget(replace(EXPERIMENT, policy=replace(POLICY, kl_budget=kl, floors=(0.5, highest - 0.002))))
    with pytest.raises(InputError) as caught:
        align.check_budget(replace(EXPERIMENT, policy=replace(POLICY, kl_budget=kl, floors=(0.5, highest + 0.002))))
    for part in (f"at a KL of {kl:g} no policy has a mean rank above {highest:.3f}", "raise `policy.kl_budget`"):
        assert part in str(caught.value)
    assert caught.value.field == "policy.floors"
    without_budget = replace(POLICY, kl_budget=1000 * kl, beta=0.1, floors=(0.5, 0.95))
    align.check_budget(replace(EXPERIMENT, policy=without_budget))


@pytest.mark.parametrize("split", ["train", "test"])
def test_ranks_are_those_among_the_prompts_own_references_in_any_batch(run, fakes, split):
    found = combine.run(run, REFERENCE, MAIN)
    assert found.reward == MAIN, "what is climbed stays itself"
    assert found.constraints.names == NAMES
    prompts = run.corpus.prompts(split, 5).prompts
    responses = fakes.sampling(run, "others", REFERENCE.params, MAIN.score, 4)(prompts)[0].responses
    ranks = found.constraints.rank(prompts, responses)
    drawn, _ = fakes.sampling(run, combine.LABEL, REFERENCE.params, MAIN.score, 8)(prompts)
    for place, part in enumerate(combine.others(run)):
        expected = oracle.calibrated(part.score(prompts, responses), part.score(prompts, drawn.responses))
        np.testing.assert_allclose(ranks[..., place], expected, atol=1e-6)
    assert ranks.shape == (5, 4, 2) and len(np.unique(ranks)) >= 3
    back = jax.tree.map(lambda x: np.asarray(x)[::-1], (prompts, responses))
    np.testing.assert_array_equal(found.constraints.rank(*back), ranks[::-1])


def test_the_evaluation_says_the_mean_rank_by_each_with_its_interval(prepared, fakes):
    prepared("classifier")
    train(fakes, EXPERIMENT, "runs/constrained")
    evaluation = json.loads(Path("runs/constrained/evaluation.json").read_text())
    rollouts, _ = fakes.sampled["policy responses"]
    prompts = rollouts.prompts
    run = prepare(Workspace(EXPERIMENT, Path("runs/constrained"), Path("runs/stages"), make_mesh(1)))
    test = np.load(next(Path("runs/stages").glob("combine_test-*/rewards.npy")))
    assert evaluation["floors"].keys() == set(NAMES)
    for place, (name, part) in enumerate(zip(NAMES, combine.others(run), strict=True)):
        ranks = oracle.calibrated(part.score(prompts, rollouts.responses), test[:, :, place])
        found = evaluation["floors"][name]
        assert found["floor"] == FLOORS[place]
        mean, low, high = (found["mean_rank"][end] for end in ("mean", "low", "high"))
        assert mean == pytest.approx(ranks.mean(), abs=1e-6)
        assert low <= mean <= high and low < high
    assert evaluation["judged_by"].startswith("the classifier classifier")


def test_it_shares_all_but_its_training_with_the_experiment_without_constraints(prepared, fakes):
    prepared("classifier")
    train(fakes, EXPERIMENT, "runs/constrained")
    assert fakes.made == ["policy"]
    for stage in ("calibration", "reference_evaluation"):
        assert len([*Path("runs/stages").glob(f"{stage}-*")]) == 1
    before = Path("runs/constrained/evaluation.json").read_text()
    fakes.sampled.clear()
    train(fakes, EXPERIMENT, "runs/constrained")
    assert Path("runs/constrained/evaluation.json").read_text() == before
    assert "policy responses" not in fakes.sampled, "nothing is made twice"


@pytest.mark.parametrize(("file", "old", "new"), [("rewards.py", "% 97", "% 89"), ("scale.json", "1.0", "-1.0")])
def test_another_answer_of_a_constrained_reward_makes_the_policy_anew(prepared, fakes, file, old, new):
    prepared("classifier")
    train(fakes, EXPERIMENT, "runs/constrained")
    Path(file).write_text(Path(file).read_text().replace(old, new))
    fakes.sampled.clear()
    train(fakes, EXPERIMENT, "runs/constrained")
    assert fakes.made == ["policy"]
    assert combine.LABEL in fakes.sampled and "calibration" not in fakes.sampled
