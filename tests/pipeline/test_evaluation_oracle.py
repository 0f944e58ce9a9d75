"""From sampled tokens and their rewards to the calibration table and evaluation.json, beside NumPy and enumeration.

The whole path runs in process with the fakes of trainings and samplings; what they drew and scored is what is given.
"""

import itertools
import json
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ctrl_jax.config import Calibration, Evaluation
from tests import oracle
from tests.pipeline.fakes import EXPERIMENTS, train

PROMPTS, RESPONSES, REFERENCES, QUANTILES, RESAMPLES, SEED = 6, 6, 8, 3, 200, 4
PROCEDURES = ("sampling", "best_of_3", "worst_of_2")
EXPERIMENT = replace(
    EXPERIMENTS["trained"],
    seed=SEED,
    calibration=Calibration(prompts=PROMPTS, samples_per_prompt=REFERENCES, quantiles=QUANTILES),
    evaluation=Evaluation(
        prompts=PROMPTS, responses_per_prompt=RESPONSES, procedures=PROCEDURES, bootstrap_resamples=RESAMPLES,
        judge="opinions:judge",
    ),
)  # fmt: skip
OPINIONS = """
def judge(prompts, responses):
    return [float(sum(map(ord, response)) % 4) for response in responses]
"""


@pytest.fixture
def evaluated(fakes, tmp_path, monkeypatch):
    """(what was drawn and scored, evaluation.json, evaluation.npz) of a whole run."""
    monkeypatch.chdir(tmp_path)
    Path("opinions.py").write_text(OPINIONS)
    train(fakes, EXPERIMENT)
    with np.load("runs/work/evaluation.npz") as arrays:
        return fakes, json.loads(Path("runs/work/evaluation.json").read_text()), dict(arrays)


def sides(fakes) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens [B, M, T], lengths [B, M], raw rewards [B, M]) of policy and reference."""
    found = {}
    for side in ("policy", "reference"):
        rollouts, rewards = fakes.sampled[f"{side} responses"]
        found[side] = rollouts.responses.tokens, rollouts.responses.lengths, rewards
    return found


def picks(scores: np.ndarray, procedure: str) -> list[np.ndarray]:
    """Of one prompt's scores [M]: for every subset, the probability [M] of each response to be picked."""
    side, _, count = procedure.partition("_of_")
    chosen = []
    for subset in itertools.combinations(range(len(scores)), int(count or 1)):
        values = scores[list(subset)]
        best = values == (values.min() if side == "worst" else values.max())
        chosen.append(np.zeros(len(scores)))
        chosen[-1][np.array(subset)[best]] = 1 / best.sum()
    return chosen


def judged(scores, reference_scores, values, reference_values, procedure) -> np.ndarray:
    """[B] over all pairs of subsets: how often the judge prefers the policy's pick by the scores."""

    def one(a, b, g, h) -> float:
        wins = (g[:, None] > h[None]) + 0.5 * (g[:, None] == h[None])
        return float(np.mean([p @ wins @ q for p in picks(a, procedure) for q in picks(b, procedure)]))

    return np.array([one(*rows) for rows in zip(scores, reference_scores, values, reference_values, strict=True)])


def interval(per_prompt: np.ndarray, label: str, low: float, high: float) -> dict[str, float]:
    """Bootstrap-t: the mean less the spread times the quantiles of t = (m* − m) / s* over resamples of prompts."""
    key = jax.random.fold_in(jax.random.key(SEED), zlib.crc32(f"interval of {label}".encode()))
    drawn = per_prompt[np.asarray(jax.random.randint(key, (RESAMPLES, PROMPTS), 0, PROMPTS))]
    mean, spread = per_prompt.mean(), per_prompt.std(ddof=1)
    t = (drawn.mean(axis=1) - mean) / np.maximum(drawn.std(axis=1, ddof=1), spread / 4)
    left, right = np.quantile(t, [0.025, 0.975])
    ends = np.clip([mean - spread * max(right, 0), mean - spread * min(left, 0)], low, high)
    return {"mean": mean, "low": ends[0], "high": ends[1]}


def test_win_rates_are_those_of_all_pairs_of_subsets(evaluated):
    fakes, evaluation, _ = evaluated
    (_, _, policy), (_, _, reference) = sides(fakes).values()
    assert set(evaluation["win_rates"]) == {*PROCEDURES, "best_of_2"}  # the last is what the policy was trained for
    for name, found in evaluation["win_rates"].items():
        per_prompt = judged(policy, reference, policy, reference, name)
        np.testing.assert_allclose(per_prompt, oracle.win_rate(policy, reference, name))
        assert found == pytest.approx(interval(per_prompt, name, 0, 1), rel=1e-4, abs=1e-5)
    assert np.mean(policy[:, :, None] == reference[:, None]) > 0.03


@pytest.mark.parametrize("judge", ["gold", "judge"])
def test_a_second_judge_judges_what_the_training_reward_picks(evaluated, judge):
    fakes, evaluation, arrays = evaluated
    (_, _, policy), (_, _, reference) = sides(fakes).values()
    values = arrays[f"policy_{judge}"], arrays[f"reference_{judge}"]
    for name, found in evaluation[f"{judge}_win_rates"].items():
        per_prompt = judged(policy, reference, *values, name)
        assert found == pytest.approx(interval(per_prompt, name, 0, 1), rel=1e-4, abs=1e-5)
        if name != "sampling":  # where it is another number than if the judge picked too
            other = interval(judged(*values, *values, name), name, 0, 1)
            assert found != pytest.approx(other, rel=1e-4, abs=1e-5)
            assert np.abs(per_prompt - judged(*values, *values, name)).max() > 0.05
    assert set(evaluation[f"{judge}_win_rates"]) == set(evaluation["win_rates"])


def test_samples_are_the_procedures_picks_with_their_values(evaluated):
    _, _, arrays = evaluated
    rows = [json.loads(line) for line in Path("runs/work/samples.jsonl").read_text().splitlines()]
    assert len(rows) == PROMPTS
    for i, row in enumerate(rows):
        for side in ("policy", "reference"):
            pick = int(np.argmax(arrays[f"{side}_rewards"][i, :2]))
            shown = row[side]
            assert shown["reward"] == pytest.approx(arrays[f"{side}_rewards"][i, pick])
            assert shown["gold"] == pytest.approx(arrays[f"{side}_gold"][i, pick])
            assert shown["judge"] == arrays[f"{side}_judge"][i, pick] == sum(map(ord, shown["text"])) % 4
            assert shown["calibrated"] == pytest.approx(arrays[f"{side}_calibrated"][i, pick])


def test_policy_and_reference_draw_by_their_own_parameters(evaluated):
    by = evaluated[0].sampled_by
    assert by["policy responses"] != by["reference responses"] == by["calibration"]


def test_arrays_are_what_was_drawn_and_its_ranks(evaluated):
    fakes, _, arrays = evaluated
    given = sides(fakes)
    for side, (_, lengths, rewards) in given.items():
        np.testing.assert_array_equal(arrays[f"{side}_rewards"], rewards)
        np.testing.assert_array_equal(arrays[f"{side}_lengths"], lengths)
    policy, reference = given["policy"][2], given["reference"][2]
    np.testing.assert_allclose(arrays["policy_calibrated"], oracle.calibrated(policy, reference), atol=1e-6)
    others = [np.delete(reference, m, axis=1) for m in range(RESPONSES)]  # a response is none of its own rivals
    own = [oracle.calibrated(reference[:, m : m + 1], rivals) for m, rivals in enumerate(others)]
    np.testing.assert_allclose(arrays["reference_calibrated"], np.concatenate(own, axis=1), atol=1e-6)


def test_kl_ties_and_lengths_are_their_definitions(evaluated):
    fakes, evaluation, _ = evaluated
    kls = 1.0 + np.arange(PROMPTS)  # of the fake measurement
    assert evaluation["kl"] == pytest.approx(interval(kls, "kl", 0, np.inf), rel=1e-4)
    assert evaluation["kl_standard_error"] == pytest.approx(kls.std(ddof=1) / np.sqrt(PROMPTS))
    given = sides(fakes)
    equal = given["policy"][2][:, :, None] == given["reference"][2][:, None]
    assert evaluation["ties"] == pytest.approx(equal.mean())
    for side, (tokens, lengths, _) in given.items():
        expected = {"mean": lengths.mean(), "median": np.median(lengths), "p10": np.quantile(lengths, 0.1),
                    "p90": np.quantile(lengths, 0.9)}  # fmt: skip
        assert evaluation["response_length"][side] == pytest.approx(expected)
        last = np.array([[row[length - 1] for row, length in zip(*one, strict=True)]
                         for one in zip(tokens, lengths, strict=True)])  # fmt: skip
        eos = tokens[lengths < tokens.shape[-1]][0, -1]
        assert evaluation["unfinished"][side] == pytest.approx(np.mean(last != eos))
        assert 0 < evaluation["unfinished"][side] < 1


def test_the_reward_models_quality_is_that_of_its_pairs(evaluated):
    fakes, evaluation, _ = evaluated
    (rewards,) = (scores for scores in fakes.scored if scores.shape[1] == 2)
    margin, count = rewards[:, 0] - rewards[:, 1], len(rewards)
    share = np.mean((margin > 0) + 0.5 * (margin == 0))
    quality = evaluation["reward_model"]
    assert quality["pairs"] == count and quality["accuracy"] == pytest.approx(share)
    assert np.mean(margin == 0) > 0
    # Wilson: the shares p whose z-test at 1.96 standard errors, √(p (1 − p) / n), does not exclude the one observed.
    for end in (quality["accuracy_low"], quality["accuracy_high"]):
        observed = quality["accuracy"]  # the share, as float32 has it
        assert (end - observed) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count)
    assert quality["accuracy_low"] < share < quality["accuracy_high"]
    predicted = 1 / (1 + np.exp(-np.concatenate([margin, -margin])))
    happened = np.repeat([1.0, 0.0], count)
    ece = 0.0
    for left in np.arange(10) / 10:
        inside = (predicted >= left) & (predicted < left + 0.1)
        if inside.any():
            ece += inside.mean() * abs(predicted[inside].mean() - happened[inside].mean())
    assert quality["ece"] == pytest.approx(ece, abs=1e-5)


def ideal_win_rate(phi: np.ndarray, kl: float, procedure: str) -> float:
    """Of the density ∝ exp(Φ / β) on evenly spread ranks, at the β with this KL: 1 − ∫ T[F] dT[U]."""
    low, high = 1e-6, 1e3
    for _ in range(60):
        beta = np.sqrt(low * high)
        mass = np.exp((phi - phi.max()) / beta)
        mass /= mass.sum()
        real = mass > 0
        too_far = np.sum(mass[real] * np.log(mass[real] * len(mass))) > kl
        low, high = (beta, high) if too_far else (low, beta)
    side, _, count = procedure.partition("_of_")
    n = int(count or 1)
    picked = (lambda cdf: 1 - (1 - cdf) ** n) if side == "worst" else (lambda cdf: cdf**n)
    edges = np.concatenate([[0], np.cumsum(mass)])
    # Within a cell both are straight lines: where both picks fall into one, either wins half the time.
    mine, other = np.diff(picked(edges)), np.diff(picked(np.linspace(0, 1, len(mass) + 1)))
    return float(np.sum(mine * (np.cumsum(other) - other / 2)))


def test_ideals_are_those_of_the_measured_kl(evaluated):
    _, evaluation, _ = evaluated
    kl, cells = evaluation["kl"]["mean"], 100_000
    ranks = (np.arange(cells) + 0.5) / cells
    assert EXPERIMENT.policy.transform == "exponential(10)"
    for name, found in evaluation["ideal"].items():
        assert found["identity"] == pytest.approx(ideal_win_rate(ranks, kl, name), abs=1e-4)
        assert found["transform"] == pytest.approx(ideal_win_rate(np.exp(10 * (ranks - 1)), kl, name), abs=1e-4)
        assert found["optimal"] >= max(found["identity"], found["transform"]) - 1e-4
    assert set(evaluation["ideal"]) == set(evaluation["win_rates"])


def test_the_calibration_table_is_the_quantiles_of_the_references_rewards(evaluated):
    fakes, *_ = evaluated
    _, rewards = fakes.sampled["calibration"]
    assert rewards.shape == (PROMPTS, REFERENCES)
    (path,) = Path("runs/stages").glob("calibration*/rewards.npy")
    np.testing.assert_allclose(np.load(path), oracle.quantiles(rewards, QUANTILES), rtol=1e-6)
    pairs = [(row[i], row[j]) for row in rewards for i, j in itertools.permutations(range(REFERENCES), 2)]
    ties = np.mean([one == other for one, other in pairs])
    assert ties > 0
    summary = json.loads((path.parent / "done.json").read_text())["about"]["summary"]
    assert summary["ties"] == pytest.approx(ties)
    with np.load(path.parent / "ids.npz") as ids:
        np.testing.assert_array_equal(ids["ids"], fakes.sampled["calibration"][0].prompts.ids)
