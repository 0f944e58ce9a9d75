"""Who judges a run, and what the evaluation says of its reward and its responses."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ctrl_jax import config
from ctrl_jax.commands import report, summary
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.config import Experiment, RewardModel
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate, Lengths, RewardQuality
from ctrl_jax.pipeline import align, evaluate, reward_model
from ctrl_jax.pipeline.run import Run, prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.stages import read_arrays, write_json
from ctrl_jax.steps import win_rate
from ctrl_jax.types import Prompts, Responses

pytestmark = pytest.mark.usefixtures("compile_fast")

OPINIONS = """
def longest(prompts, responses):
    return [float(len(response)) for response in responses]

def shortest(prompts, responses):
    return [-float(len(response)) for response in responses]
"""


@pytest.fixture
def finished(smoke, tmp_path, monkeypatch):
    """(a copy of the work directory of `train smoke`, what runs it with a judge)"""
    work_dir = shutil.copytree(smoke.work_dir, tmp_path / "smoke")
    (tmp_path / "opinions.py").write_text(OPINIONS)
    experiment = load_experiment("smoke").experiment()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def with_judge(judge: str | None) -> Run:
        chosen = replace(experiment, evaluation=replace(experiment.evaluation, judge=judge))
        return prepare(Workspace(chosen, work_dir, smoke.stages_dir, make_mesh(1)))

    return work_dir, with_judge


def picked(scores: np.ndarray, n: int) -> np.ndarray:
    """The best of every n of the scores, as indices."""
    return np.array([max(subset, key=lambda i: scores[i]) for subset in itertools.combinations(range(len(scores)), n)])


def judged(arrays: dict[str, np.ndarray], judge: str, n: int) -> float:
    """Win rate by a judge of what best-of-n by the rewards picks, over all pairs of subsets."""
    rates = []
    for prompt in range(4):  # few prompts of few responses: all subsets are enumerated
        values = {}
        for side in ("policy", "reference"):
            own = arrays[f"{side}_{judge}"][prompt, :8]
            values[side] = own[picked(arrays[f"{side}_rewards"][prompt, :8], n)]
        ours, theirs = values["policy"][:, None], values["reference"][None, :]
        rates.append(((ours > theirs) + 0.5 * (ours == theirs)).mean())
    return float(np.mean(rates))


def test_an_independent_judge_judges_the_picks_of_the_training_reward(finished, smoke, capsys):
    work_dir, with_judge = finished
    before = sorted(path.name for path in smoke.stages_dir.iterdir() if "judge" not in path.name)
    run = with_judge("opinions:longest")
    with run.claimed():
        assert evaluate.read(run) is None, "what is there knows no such judge"
        evaluation = evaluate.run(run, align.policy(run))
        assert evaluate.read(run) == evaluation, "and now it does"
    assert evaluation.judge == "opinions:longest"
    assert evaluation.judged_by == "the reward model that the policy was trained on"
    arrays = read_arrays(work_dir / "evaluation.npz")
    assert arrays["policy_judge"].shape == arrays["policy_rewards"].shape == arrays["policy_lengths"].shape
    for judge in ("judge", "gold"):
        rates = getattr(evaluation, f"{judge}_win_rates")
        assert set(rates) == set(evaluation.win_rates)
        ours, theirs = arrays[f"policy_{judge}"][:, :, None], arrays[f"reference_{judge}"][:, None, :]
        sampling = ((ours > theirs) + 0.5 * (ours == theirs)).mean()
        assert rates["sampling"].mean == pytest.approx(sampling, abs=1e-5)
        few = [jnp.asarray(arrays[f"{side}_{kind}"][:4, :8]) for kind in ("rewards", judge)
               for side in ("policy", "reference")]  # fmt: skip
        measured = win_rate.judged_win_rate(*few, evaluate.procedures.parse("best_of_4"))
        assert float(measured.mean()) == pytest.approx(judged(arrays, judge, 4), abs=1e-5)
        everything = [jnp.asarray(arrays[f"{side}_{kind}"]) for kind in ("rewards", judge)
                      for side in ("policy", "reference")]  # fmt: skip
        measured = win_rate.judged_win_rate(*everything, evaluate.procedures.parse("best_of_4"))
        assert rates["best_of_4"].mean == pytest.approx(float(measured.mean()), abs=1e-5)
    # The samples carry the judge's values of the picks.
    rows = [json.loads(line) for line in (work_dir / "samples.jsonl").read_text().splitlines()]
    assert all(row[side]["judge"] == len(row[side]["text"]) for row in rows for side in ("policy", "reference"))

    page = report.write(work_dir).read_text()
    assert "opinions:longest" in page and "by longest" in page
    summary.print_run(run, evaluation, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert "judged by the reward model that the policy was trained on" in printed
    assert "the independent judge opinions:longest" in printed and "best_of_4 win rate, longest" in printed

    # Another judge scores the reference's responses, and no other stage is made anew or again.
    assert sorted(path.name for path in smoke.stages_dir.iterdir() if "judge" not in path.name) == before
    responses = next(smoke.stages_dir.glob("reference_evaluation-*/responses.npz"))
    written = responses.stat().st_mtime_ns
    other = with_judge("opinions:shortest")
    with other.claimed():
        assert evaluate.read(other) is None
        turned = evaluate.run(other, align.policy(other))
    assert responses.stat().st_mtime_ns == written
    assert len(list(smoke.stages_dir.glob("reference_judge-*"))) == 2
    assert turned.win_rates == evaluation.win_rates
    for name, rate in turned.judge_win_rates.items():
        assert rate.mean == pytest.approx(1 - evaluation.judge_win_rates[name].mean, abs=1e-5)
    # Who asks for no judge is served by what there is.
    assert evaluate.read(with_judge(None)) == turned


@pytest.mark.parametrize("damage", ["{", "[]", '{"kl": 1}', '{"a": ' * 100_000])
def test_a_damaged_evaluation_is_made_anew_and_nothing_is_to_be_deleted(finished, capsys, damage):
    work_dir, with_judge = finished
    (work_dir / "evaluation.json").write_text(damage)
    assert evaluate.read(with_judge(None)) is None
    printed = capsys.readouterr().out
    assert "The evaluation is made anew" in printed and "elete" not in printed


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("nowhere", "neither a directory here nor module:name"),
        ("nowhere:near", r"evaluation\.judge is 'nowhere:near', and the module 'nowhere' cannot be imported"),
        ("opinions:none", r"evaluation\.judge is .*has no function 'none'"),
        (".", r"config\.json"),
    ],
)
def test_a_judge_that_is_none_is_refused_before_any_work(finished, judge, message):
    _, with_judge = finished
    with pytest.raises(InputError, match=message) as caught:
        evaluate.read(with_judge(judge))
    assert "reward_model" not in str(caught.value)


def test_the_reward_that_is_trained_on_is_no_independent_judge():
    with pytest.raises(InputError, match=r"rewards:x.*trained on"):
        Experiment("a", reward_model=RewardModel(function="rewards:x"), evaluation=config.Evaluation(judge="rewards:x"))


def quality(monkeypatch, config: RewardModel, margins: list[float]) -> tuple[RewardQuality, dict[str, Any]]:
    """What is said of a reward that prefers the chosen responses of held-out pairs by these margins."""
    rewards = np.array([[margin, 0.0] for margin in margins], np.float32)
    monkeypatch.setattr(evaluate, "score", lambda *_: rewards)
    lengths = np.array([[9 + round(margin), 9] for margin in margins])
    pairs = SimpleNamespace(examples=SimpleNamespace(prompts=None, responses=SimpleNamespace(lengths=lengths)))
    monkeypatch.setattr(evaluate.data, "pairs", lambda corpus, split, long_prompts: pairs)
    corpus = SimpleNamespace(has_pairs=lambda split, long_prompts: True)
    run: Any = SimpleNamespace(experiment=Experiment("a", reward_model=config), corpus=corpus)
    return evaluate._reward_quality(run, reward_model.Reward(lambda *_: None, "stage"))


MARGINS = [1.0, 2.0, -1.0, 0.0, 3.0, 0.5, -0.2, 1.5]


def test_a_reward_model_has_accuracy_with_its_interval_and_calibration(monkeypatch):
    found, arrays = quality(monkeypatch, RewardModel(), MARGINS)
    assert (found.pairs, found.accuracy) == (8, pytest.approx(5.5 / 8))
    high, low = (stats.binomtest(count, 8).proportion_ci(0.95, method="wilson") for count in (6, 5))
    assert low.low < found.accuracy_low < high.low and low.high < found.accuracy_high < high.high
    assert 0 < found.ece < 1 and set(arrays) == {"margins", *evaluate.RELIABILITY_ARRAYS}
    np.testing.assert_array_equal(arrays["margins"], np.float32(MARGINS))
    assert found.brier == pytest.approx(np.mean((1 / (1 + np.exp(-np.array(MARGINS))) - 1) ** 2))
    both = [[*x, *(-one for one in x)] for x in (MARGINS, [round(margin) for margin in MARGINS])]
    first, second = summary.quality(found)
    assert f"Brier score {found.brier:.3f} (a guess has 0.250)" in first
    assert f"with length: {found.margin_length_correlation:.3f}." in second
    assert found.margin_length_correlation == pytest.approx(stats.spearmanr(*both).statistic, abs=1e-6)


def test_a_function_is_no_model_of_preferences(monkeypatch):
    found, arrays = quality(monkeypatch, RewardModel(function="rewards:x"), MARGINS)
    assert (found, arrays) == (RewardQuality(pairs=8, agreements=5, equal=1), {})
    [line] = summary.quality(found)
    assert (
        line
        == "The reward function ranks 5 of 8 held-out pairs as their labels do, and gives 1 of them two equal rewards."
    )


def test_a_classifier_has_no_calibration(monkeypatch):
    found, arrays = quality(monkeypatch, RewardModel(path="folder"), MARGINS)
    given = {name for name, value in found._asdict().items() if value is not None}
    assert given == {"pairs", "accuracy", "accuracy_low", "accuracy_high", "margin_length_correlation"}
    assert set(arrays) == {"margins"}


def test_lengths_and_the_share_that_never_ends():
    eos, pad = 2, 7
    tokens = jnp.array([[[5, eos, pad, pad], [5, 5, 5, 5]], [[eos, pad, pad, pad], [5, 5, 3, eos]]])
    responses = Responses(tokens, jnp.array([[2, 4], [1, 4]]))
    run: Any = SimpleNamespace(corpus=SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(eos, 9))))
    found = evaluate._lengths(run, {"policy": responses})
    assert found["unfinished"] == {"policy": 0.25}
    expected = {name: np.quantile([2, 4, 1, 4], q) for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    assert found["response_length"] == {"policy": pytest.approx(Lengths(mean=11 / 4, **expected))}


def test_one_prompt_has_no_interval_and_no_standard_error(monkeypatch):
    nothing = win_rate.Interval(jnp.array(0.4), jnp.array(jnp.nan), jnp.array(jnp.nan))
    monkeypatch.setattr(win_rate, "interval", lambda *_, **__: nothing)
    run: Any = SimpleNamespace(experiment=Experiment("a"))
    found = evaluate._kl(run, np.array([0.4]))
    assert set(found) == {"kl", "kl_budget"}
    assert found["kl"] == (pytest.approx(0.4), None, None)
    assert evaluate._kl(run, np.array([0.3, 0.5]))["kl_standard_error"] == pytest.approx(0.1)
    assert str(Estimate(0.4, None, None)) == f"{Estimate(0.4, None, None)}" == "0.400 (no interval)"
    assert f"{Estimate(0.4, -0.1, 0.9):+.2f}" == "+0.40 [-0.10, +0.90]"


def test_a_judge_scores_the_responses_that_are_kept(tmp_path, monkeypatch):
    """The stage of the judge: written once, by the judge's own fingerprint."""
    calls = []

    def score(run: Any, scorer: Any, prompts: Any, responses: Responses) -> np.ndarray:
        calls.append(scorer)
        return np.asarray(responses.lengths, np.float32)

    monkeypatch.setattr(evaluate, "score", score)
    run = Workspace(Experiment("a"), tmp_path / "a", tmp_path / "stages", make_mesh(1))
    reference = run.stage("reference_evaluation", corpus="c", reference="r", reward_model="m")
    write_json(reference.directory / "x.json", {})
    prompts: Any = SimpleNamespace(prompts=Prompts(jnp.ones((1, 1)), jnp.ones(1), jnp.ones(1)))
    responses = Responses(jnp.ones((1, 2, 3)), jnp.array([[1, 3]]))
    for stage in ("one", "one", "two"):
        judge = reward_model.Reward(lambda *_: None, stage)
        values, seconds = evaluate._reference_judge(run, judge, reference, prompts, responses)
        np.testing.assert_array_equal(values, [[1, 3]])
        assert seconds >= 0
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "judge"),
    [
        ({}, "the reward model"),
        ({"reward_model": RewardModel(function="a:b")}, "the function a:b"),
        (
            {"combine": config.Combine(by="log_sigmoids(0.85)"), "policy": config.Policy(transform="raw")},
            "log_sigmoids(0.85) of the reward model,",
        ),
        (
            {"combine": config.Combine(rewards=("a:b", "c:d"))},
            "smallest_calibrated of the reward model and a:b and c:d,",
        ),
        (
            {"combine": config.Combine(rewards=("a:b",)), "policy": config.Policy(floors=(0.5,))},
            "the reward model",
        ),
    ],
)
def test_who_judged_says_what_its_reward_is_made_of(options: dict[str, Any], judge: str) -> None:
    run: Any = SimpleNamespace(experiment=Experiment("a", **options))
    assert evaluate._training_reward(run) == f"{judge} that the policy was trained on"
