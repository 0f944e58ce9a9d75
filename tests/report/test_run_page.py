import copy
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ctrl_jax.evaluation import Estimate, Evaluation, Floor, RewardQuality, RewardSignal, RewardTraining
from ctrl_jax.report import glossary, html, run_page, sweep_page
from ctrl_jax.report.measurements import Run, floor_warnings
from ctrl_jax.report.statistics import lift_share
from ctrl_jax.report.status import Status
from tests.report.pages import links, visible


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def test_the_page_is_self_contained(run: Run) -> None:
    text = run_page.render(run)
    found = links(text)
    assert {link for link in found.found if not link.startswith("#")} == {"data:,"}
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert not found.tags & {"script", "iframe", "object", "embed", "img"}
    assert len(text.encode()) < 1_500_000
    assert len(re.findall("<svg ", text)) == 16


def another(parent: dict[str, Any], key: str) -> Any:
    """Another value that the file may have there."""
    value = parent[key]
    match value:
        case str():
            return f"{value} anew"
        case int():
            return value + 1
        case _ if key == "mean" and "low" in parent:
            return (value + parent["high"]) / 2
        case _:
            return value * (1.005 if key == "high" else 0.9)


def test_every_number_of_the_evaluation_reaches_the_page(words_only: None, run: Run, finished: pathlib.Path) -> None:
    tree = json.loads((finished / "evaluation.json").read_text())
    before = visible(run_page.render(run))
    paths = list(leaves(tree))
    assert len(paths) > 40
    # The judge's fingerprint is for programs.
    for path in [path for path in paths if path[-1] != "fingerprint"]:
        changed = copy.deepcopy(tree)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = another(parent, path[-1])
        evaluation = Evaluation.from_json(changed, source="", remedy="")
        assert visible(run_page.render(dataclasses.replace(run, evaluation=evaluation))) != before, path


def test_every_field_of_the_configuration_reaches_the_page(words_only: None, run: Run) -> None:
    text = visible(run_page.render(run))
    for path in leaves(run.config):
        assert ".".join(path) in text
    assert "policy.beta –" in text
    assert "evaluation.procedures sampling, best_of_2, best_of_4" in text


def test_drawings_follow_the_arrays_and_the_metrics(run: Run) -> None:
    def drawings(changed: Run) -> list[str]:
        return re.findall(r"<svg.*?</svg>", run_page.render(changed), flags=re.DOTALL)

    before = drawings(run)
    arrays = {name: array if array.ndim < 2 else array[::, ::2] for name, array in run.arrays.items()}
    metrics = {name: column if name == "step" else 1.1 * column for name, column in run.metrics.items()}
    after = drawings(dataclasses.replace(run, arrays=arrays, metrics=metrics))
    same = [old == new for old, new in zip(before, after, strict=True)]
    # Frontier (its path), calibration, six curves, gold by proxy and lengths are new; the others draw evaluation.json.
    assert same == [False, False, True, True, *[False] * 6, *[True] * 4, False, False]


def test_headline_numbers_are_those_of_the_files(words_only: None, run: Run) -> None:
    text = visible(run_page.render(run))
    measured, ideal = run.evaluation.win_rates["best_of_4"], run.evaluation.ideal["best_of_4"]
    assert ideal.transform is not None and ideal.identity is not None
    share = lift_share(measured.mean, ideal.transform)
    assert share is not None
    assert f"{100 * measured.mean:.1f} % [{100 * measured.low:.1f}, {100 * measured.high:.1f}]" in text
    assert f"ideal at this KL {100 * ideal.transform:.1f} %; {100 * share:.0f} % of its lift" in text
    assert f"{100 * (ideal.identity - measured.mean):.1f} points below the {100 * ideal.identity:.1f} %" in text or (
        f"{100 * (measured.mean - ideal.identity):.1f} points above the {100 * ideal.identity:.1f} %" in text
    )
    assert "0.730 [0.709, 0.751] 0.020 under the budget of 0.75 (−2.7 %)" in text
    assert "74.3 %" in text and "expected calibration error 2.2 points" in text


def test_a_held_beta_is_said(words_only: None, run: Run) -> None:
    policy = {**run.config["policy"], "beta": 0.06}
    text = visible(run_page.render(dataclasses.replace(run, config={**run.config, "policy": policy})))
    assert "with β held at 0.06" in text


def test_who_judges_is_said(words_only: None, run: Run) -> None:
    text = visible(run_page.render(run))
    assert "The judge is the reward model that the policy was trained on." in text
    gold, judge = (table["best_of_4"] for table in (run.evaluation.gold_win_rates, run.evaluation.judge_win_rates))
    assert f"it wins {100 * gold.mean:.1f} % by gold and {100 * judge.mean:.1f} % by second_opinion." in text
    assert "The independent judge is rewards:second_opinion." in text
    for estimate in (gold, judge):
        assert f"{100 * estimate.mean:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" in text
    assert "Reward model accuracy 74.3 % [71.8, 76.7] on 1210 held-out pairs" in text


@pytest.mark.parametrize(("rank", "kept"), [(Estimate(0.512, 0.498, 0.526), True), (Estimate(0.45, 0.44, 0.46), False)])
def test_a_reward_at_a_floor_has_its_mean_rank_and_what_is_not_kept_is_said(words_only, run, rank, kept) -> None:
    evaluation = dataclasses.replace(run.evaluation, floors={"rewards:brevity": Floor(rank, 0.5)})
    text = visible(run_page.render(dataclasses.replace(run, evaluation=evaluation)))
    numbers = f"{100 * rank.mean:.1f} % [{100 * rank.low:.1f}, {100 * rank.high:.1f}]"
    assert f"Mean rank by rewards:brevity {numbers} of single responses; the floor is 50 %" in text
    said = floor_warnings(evaluation)
    assert len(said) == (not kept)
    if not kept:
        assert (
            "does not keep rewards:brevity at its floor: mean rank 0.450 [0.440, 0.460], and 0.5 was asked" in said[0]
        )


def test_a_function_has_no_accuracy_and_a_classifier_no_calibration(words_only: None, run: Run) -> None:
    def words(quality: RewardQuality) -> str:
        kept = {name: array for name, array in run.arrays.items() if not re.match("reliability|validation", name)}
        arrays = {name: array for name, array in kept.items() if name != "margins" or quality.accuracy is not None}
        evaluation = dataclasses.replace(run.evaluation, reward_model=quality, reward_training=None)
        return visible(run_page.render(dataclasses.replace(run, evaluation=evaluation, arrays=arrays)))

    function = words(RewardQuality(pairs=20, agreements=12, equal=3))
    assert "Held-out pairs that the function ranks as their labels do 12 of 20" in function
    assert "gives 3 of them two equal rewards" in function
    assert "Left out: a function is no model of preferences" in function
    assert "Reward model accuracy" not in function and "calibration error" not in function
    classifier = words(RewardQuality(pairs=20, accuracy=0.6, accuracy_low=0.39, accuracy_high=0.78))
    assert "Reward model accuracy 60.0 % [39.0, 78.0] on 20 held-out pairs" in classifier
    assert "calibration error" not in classifier and "Of its training" not in classifier
    assert "A margin is how much higher" in classifier and "Left out: whether a classifier" not in classifier
    assert "Brier score 0.174" in words(run.evaluation.reward_model)
    assert "points. A margin is how much higher" in visible(run_page.render(run))
    assert "is: 0.31. Of its training" in visible(run_page.render(run))


def test_what_the_reward_model_learned_from_and_whether_it_is_worth_climbing_is_said(
    words_only: None, run: Run
) -> None:
    def words(**changes: Any) -> str:
        evaluation = dataclasses.replace(run.evaluation, **changes)
        return visible(run_page.render(dataclasses.replace(run, evaluation=evaluation)))

    sure = words()
    assert (
        "The reward model was trained on 1500 pairs, 400 with the beginning of their prompt cut off. Of its 60 steps "
        "that of step 40 is used, the best by the likelihood of 250 validation pairs."
    ) in sure
    assert "It ranks 74.3 % [71.8, 76.7] of 1210 held-out pairs as their labels do" in sure
    assert "and the interval leaves that out" in sure
    assert "no better than chance" not in sure and "say little" not in sure
    few = words(reward_model=RewardQuality(66, 0.591, 0.47, 0.70), reward_training=RewardTraining(447, 0, 1123))
    assert "trained on 447 pairs, 1123 more left out, for their prompt is too long." in few
    assert "the reward model is no better than chance" in few and "leaves that out" not in few
    assert "judged on 66 held-out pairs; fewer than 200 say little" in few


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (0.41, 0.36, 0.46, "0.410 [0.360, 0.460]: go, a policy can climb this reward."),
        (0.12, 0.05, 0.19, "0.120 [0.050, 0.190]: a policy can climb this reward a little; from 0.3 on it is a go."),
        (
            0.02,
            -0.05,
            0.09,
            "0.020 [-0.050, 0.090]: the interval reaches 0, and a policy will hardly climb this reward.",
        ),
    ],
)
def test_whether_a_policy_can_climb_the_reward_is_said(
    words_only: None, run: Run, mean: float, low: float, high: float, said: str
) -> None:
    signal = RewardSignal(learnability=Estimate(mean, low, high))
    text = visible(run_page.render(dataclasses.replace(
        run, evaluation=dataclasses.replace(run.evaluation, reward_signal=signal)
    )))  # fmt: skip
    assert f"on prompts that it was not fitted on: {said}" in text
    assert "reward and length" not in text


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (0.5, 0.4, 0.6, "longer responses have higher rewards, and a policy that climbs the reward will mostly change"),
        (-0.1, -0.15, -0.05, "shorter responses have higher rewards."),
        (0.05, -0.1, 0.2, "it does not show that the reward follows length."),
    ],
)
def test_whether_the_reward_follows_length_is_said(
    words_only: None, run: Run, mean: float, low: float, high: float, said: str
) -> None:
    signal = RewardSignal(length_correlation=Estimate(mean, low, high))
    text = visible(run_page.render(dataclasses.replace(
        run, evaluation=dataclasses.replace(run.evaluation, reward_signal=signal)
    )))  # fmt: skip
    assert f"reward and length within a prompt: {mean:.3f} [{low:.3f}, {high:.3f}]: {said}" in text


def test_responses_that_never_end_are_a_warning_with_the_fix(words_only: None, run: Run) -> None:
    def words(policy: float, reference: float) -> str:
        shares = {"policy": policy, "reference": reference}
        return visible(run_page.render(dataclasses.replace(run, evaluation=dataclasses.replace(
            run.evaluation, unfinished=shares
        ))))  # fmt: skip

    assert "do not end" not in words(0.021, 0.017)
    some = words(0.12, 0.1)
    assert "12.0% of the policy" in some and "10.0% of the reference" in some
    assert "do not end within 40 tokens: they are cut off, and rewarded as they stand." in some
    assert "Raise `data.response_length`." in some and "end-of-turn" not in some
    assert "end-of-turn token" in words(0.97, 1.0)


def test_one_prompt_has_no_interval(words_only: None, run: Run) -> None:
    alone = {name: Estimate(value.mean, None, None) for name, value in run.evaluation.win_rates.items()}
    evaluation = dataclasses.replace(
        run.evaluation, win_rates=alone, gold_win_rates=alone, kl=Estimate(run.evaluation.kl.mean, None, None)
    )
    arrays = {
        name: array if re.match("reliability|margins|validation", name) else array[:1]
        for name, array in run.arrays.items()
    }
    bare = dataclasses.replace(run, evaluation=evaluation, arrays=arrays)
    text = visible(run_page.render(bare))
    assert "tested on 1 prompt ×" in text
    assert f"{run.evaluation.kl.mean:.3f} no interval: 1 prompt" in text
    assert f"{100 * alone['sampling'].mean:.1f} % no interval: 1 prompt" in text
    point = Status("a", "identity", "best_of_4", 0.75, "done", evaluation=evaluation)
    assert "no interval: 1 prompt" in visible(sweep_page.render("bon", [point]))


def test_words_are_explained_where_they_stand_and_once_for_readers_of_lists(words_only: None, run: Run) -> None:
    text = run_page.render(run)
    terms = re.findall(r'<span class="term" tabindex="0" aria-describedby="([^"]+)" data-tip="([^"]+)">([^<]+)<', text)
    assert {"KL", "nats", "ties", "lift", "gold", "accuracy"} <= {word.lower() if word != "KL" else word
                                                                 for _, _, word in terms}  # fmt: skip
    listed = dict(re.findall(r'<dd id="([^"]+)">([^<]+)</dd>', text))
    assert {(identifier, tip) for identifier, tip, _ in terms} == set(listed.items())
    assert all(texts.endswith(".") for texts in glossary.TERMS.values())


def test_the_configuration_is_folded(words_only: None, run: Run) -> None:
    _, _, configuration = run_page.render(run).partition('<details class="configuration">')
    assert "policy.kl_budget" in configuration.partition("</details>")[0]
    assert "policy.kl_budget" not in run_page.render(run).partition('<details class="configuration">')[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb\u202cc", "a⟦U+202E⟧b⟦U+202C⟧c"),
        ("\x1b[2Jgone", "⟦U+001B⟧[2Jgone"),
        ("half \ud83d of a pair", "half ⟦U+D83D⟧ of a pair"),
        ("one\r\ntwo\tthree\n", "one\ntwo\tthree\n"),
        ("tag \U000e0041", "tag ⟦U+E0041⟧"),
        ("שלום 👋🏽 é", "שלום 👋🏽 é"),
    ],
)
def test_what_steers_the_screen_is_visible(words_only: None, run: Run, text: str, shown: str) -> None:
    assert html.visible(text) == shown
    sample = {"prompt": text, "policy": {"text": text, "reward": 1.0}, "reference": {"text": text}}
    written = run_page.render(dataclasses.replace(run, samples=[sample], config={**run.config, "name": text}))
    written.encode()
    assert written.count(shown.strip()) >= 4
    assert shown == text or text not in written


def test_what_is_missing_is_said_in_a_line(words_only: None, run: Run) -> None:
    bare = dataclasses.replace(
        run,
        arrays={
            name: array
            for name, array in run.arrays.items()
            if not re.search("gold|reliability|margins|validation|length", name)
        },
        metrics={},
        samples=[],
        evaluation=dataclasses.replace(
            run.evaluation, gold_win_rates={}, judge_win_rates={}, judge=None, timings={}, response_length={}
        ),
    )
    text = visible(run_page.render(bare))
    notes = (
        "no metrics.jsonl", "no reliability arrays", "no judge beside the training reward", "no samples.jsonl",
        "no timings", "no response lengths",
    )  # fmt: skip
    for note in notes:
        assert re.search(rf"Left out: .{{0,40}}{re.escape(note)}", text), note
    assert "by gold" not in text


def test_a_raw_reward_has_no_ideal(words_only: None, run: Run) -> None:
    ideal = {name: values._replace(transform=None) for name, values in run.evaluation.ideal.items()}
    raw = dataclasses.replace(
        run,
        config={**run.config, "policy": {**run.config["policy"], "transform": "raw"}},
        evaluation=dataclasses.replace(run.evaluation, ideal=ideal),
    )
    assert "a raw reward has no ideal" in visible(run_page.render(raw))


def test_text_of_models_data_and_users_is_escaped(words_only: None, run: Run) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    sample = {"prompt": bad, "policy": {"text": bad, "reward": 1.0}, "reference": {"text": bad, "gold": None}}
    config = {**run.config, "name": bad, "data": {"source": bad, bad: bad}}
    text = run_page.render(dataclasses.replace(run, samples=[sample], config=config))
    assert "<script" not in text and "<img" not in text
    assert text.count("&lt;script&gt;") >= 7


def test_rewards_out_of_range_are_left_out(words_only: None, run: Run) -> None:
    side = {"text": "a", "reward": 10**400, "calibrated": math.inf, "gold": "0.5", "judge": 0.25}
    text = visible(
        run_page.render(dataclasses.replace(run, samples=[{"prompt": "p", "policy": side, "reference": side}]))
    )
    assert "policy · judge 0.250 a" in text


def test_twenty_samples_are_shown_and_the_rest_unfolds(words_only: None, run: Run) -> None:
    shown, _, more = run_page.render(run).partition("<details><summary>12")
    assert (shown.count('class="pick"'), more.count('class="pick"')) == (20, 12)
    assert more.startswith(" more")
    assert all(f"basil number {index} " in shown for index in range(20))


def test_long_samples_are_cut_and_left_to_their_file(words_only: None, run: Run) -> None:
    long = {"prompt": "p", "policy": {"text": "w" * 50_000}, "reference": {"text": "r" * 50_000}}
    text = run_page.render(dataclasses.replace(run, samples=[long] * 100))
    kept = run_page.SAMPLES_CHARACTERS // (2 * html.TEXT_CHARACTERS + 1)
    assert text.count('class="pick"') == kept
    assert f"{100 - kept} more in samples.jsonl" in text
    assert "… (cut)" in text
    assert len(text) < 600_000


def test_durations_are_for_people() -> None:
    assert [run_page._duration(seconds) for seconds in (0.04, 59.94, 60, 125.6, 7384)] == [
        "0.0 s", "59.9 s", "1 min 00 s", "2 min 06 s", "2 h 03 min",
    ]  # fmt: skip
