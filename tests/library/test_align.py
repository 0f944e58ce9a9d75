"""Alignment of a tiny model with a reward of the test, from one call to a report and an export."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import ctrl_jax as cj

pytestmark = pytest.mark.usefixtures("compile_fast")

PROMPTS = [f"What is {i}?" for i in range(12)]
TEST_PROMPTS = [f"How is {i}?" for i in range(6)]
OBJECTIVE = cj.Objective(cj.exponential(5), cj.best_of(2), kl_budget=0.5)


def ascii_share(prompts, responses):
    return [sum(letter.isascii() for letter in text) + 0.01 * len(set(text)) for text in responses]


def shortness(prompts, responses):
    return [-float(len(text)) for text in responses]


def align(model, work_dir, prompts=PROMPTS, **changes):
    options = {
        "reward": ascii_share, "objective": OBJECTIVE, "steps": 3, "prompts_per_step": 8, "samples_per_prompt": 4,
        "references_per_prompt": 8, "max_length": 8, "learning_rate": 1e-2, "lora_rank": 2,
    }  # fmt: skip
    return cj.align(model, prompts, work_dir=work_dir, **(options | changes))


@pytest.fixture(scope="module")
def aligned(model, tmp_path_factory):
    return align(model, tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def evaluation(aligned):
    return aligned.evaluate(TEST_PROMPTS, responses_per_prompt=8)


def test_the_evaluation_is_of_the_test_prompts(aligned, evaluation):
    estimate = evaluation.win_rates["best_of_2"]
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
    assert set(evaluation.win_rates) == {
        "sampling",
        *(f"{side}_of_{n}" for side in ("best", "worst") for n in (2, 4, 8)),
    }
    assert evaluation.kl.mean > 0 and evaluation.kl_budget == 0.5
    with np.load(aligned.work_dir / "evaluation.npz") as arrays:
        ours, theirs = arrays["policy_rewards"], arrays["reference_rewards"]
    assert ours.shape == (6, 8)
    # The library's own win rate of the rewards on disk.
    expected = cj.win_rate(ours, theirs, cj.best_of(2)).mean()
    assert estimate.mean == pytest.approx(expected, abs=1e-5)
    rows = [json.loads(line) for line in (aligned.work_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"\n\nHuman: {prompt}\n\nAssistant:" for prompt in TEST_PROMPTS]


def test_the_report_is_what_the_command_line_writes(aligned, evaluation):
    page = aligned.report()
    assert page == aligned.work_dir / "report" / "index.html"
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert (page.parent / "figures" / "win_rate_vs_kl.png").exists()


def test_the_policy_and_the_reference_write(aligned, model):
    before, after = (cj.generate(one, ["Hi"], num_samples=4, max_length=8) for one in (model, aligned.policy))
    assert cj.generate(aligned.reference, ["Hi"], num_samples=4, max_length=8) == before
    assert after != before and aligned.generate(["Hi"], num_samples=4, max_length=8) == after


def test_the_export_is_a_model(aligned, tmp_path, folder):
    output = aligned.export(tmp_path / "out")
    exported = cj.load_model(output, devices=1)
    texts = aligned.generate(["Hi"], num_samples=4, max_length=8)
    assert cj.generate(exported, ["Hi"], num_samples=4, max_length=8) == texts
    old, new = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert old.keys() == new.keys() and any(not np.array_equal(old[name], new[name]) for name in old)
    with pytest.raises(cj.InputError, match="out"):
        aligned.export(output)


def test_the_same_call_reads_what_is_there(aligned, evaluation, model, monkeypatch):
    files = {path: path.read_bytes() for path in aligned.work_dir.glob("*.json*")}
    monkeypatch.setattr("ctrl_jax.library.align.evaluate.run", None)  # nothing is sampled
    again = align(model, aligned.work_dir)
    assert again.evaluate(TEST_PROMPTS, responses_per_prompt=8) == evaluation
    assert {path: path.read_bytes() for path in aligned.work_dir.glob("*.json*")} == files
    assert not list(aligned.work_dir.glob("superseded*"))


def test_another_run_is_refused_in_its_directory(aligned, model):
    for change in (
        {"objective": cj.Objective(cj.identity(), cj.best_of(2), kl_budget=0.5)},
        {"objective": cj.Objective(lambda u: u**2, cj.best_of(2), kl_budget=0.5)},
        {"reward": lambda prompts, responses: [float(len(text)) for text in responses]},
        {"seed": 1},
    ):
        with pytest.raises(cj.InputError, match="belongs to another"):
            align(model, aligned.work_dir, **change)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "Hello"}, "prompts is one text"),
        ({"prompts": [*PROMPTS, ""]}, r"prompts\[12\]"),
        ({"prompts_per_step": 99}, "prompts_per_step is 99, and there are 12"),
        ({"prompt_length": 4}, "prompt_length is 4"),
        ({"max_length": 1}, "1"),
        ({"lora_last_layers": 99}, r"last_layers is 99, and the model has \d+ layers"),
        ({"samples_per_prompt": 1}, "at least 2"),
        ({"references_per_prompt": 1}, "at least 2"),
        ({"objective": "best_of_4"}, "objective is 'best_of_4'"),
        ({"objective": cj.Objective(cj.exponential(5), cj.best_of(2), kl_budget=9)}, "9"),
        ({"reward": "length"}, "'length'"),
        ({"reward": len}, "reward"),
        ({"reward": lambda prompts, responses: [1.0, 2.0]}, "shape"),
        ({"reward": lambda prompts, responses: 1 / 0}, "ZeroDivisionError"),
        ({"constraints": [0.5]}, r"constraints\[0\] is 0.5"),
        ({"constraints": cj.Constraint(shortness)}, "constraints is Constraint.*give a list"),
        ({"constraints": (one for one in [cj.Constraint(shortness)])}, "constraints is .*generator"),
        ({"constraints": [cj.Constraint(ascii_share)]}, r"constraints\[0\] is named .*ascii_share"),
        ({"constraints": [cj.Constraint(shortness), cj.Constraint(shortness, 0.4)]}, r"constraints\[1\] is named"),
        ({"constraints": [cj.Constraint(shortness, floor=0.99)]}, r"0\.99.* no policy has a mean rank above"),
        ({"constraints": [cj.Constraint(lambda prompts, responses: [1.0, 2.0])]}, "shape"),
    ],
)
def test_bad_input_leaves_nothing_behind(model, tmp_path, changes, match):
    with pytest.raises(cj.InputError, match=match):
        align(model, tmp_path / "runs" / "bad", **changes)
    assert not list(tmp_path.iterdir())


def test_a_model_is_needed(tmp_path):
    with pytest.raises(cj.InputError, match="give what load_model returns"):
        align("models/tiny", tmp_path / "bad")


def test_other_rewards_stay_at_floors(model, tmp_path):
    seen = []

    def vowels(prompts, responses):
        seen.append((prompts, responses))
        return [float(sum(letter in "aeiou" for letter in text)) for text in responses]

    constraints = [cj.Constraint(vowels, floor=0.45), cj.Constraint(shortness)]
    made = align(model, tmp_path / "runs" / "kept", constraints=constraints)
    metrics = [json.loads(line) for line in (made.work_dir / "metrics.jsonl").read_text().splitlines()]
    assert all({"above_floors", "multiplier"} <= row.keys() for row in metrics)
    assert {prompt for prompts, _ in seen for prompt in prompts} == set(PROMPTS)

    seen.clear()
    evaluation = made.evaluate(TEST_PROMPTS, responses_per_prompt=8)
    # Of the prompts that were trained on, a few kept responses are scored again, and no reference is drawn anew.
    assert all(len(responses) <= 16 for prompts, responses in seen if prompts[0] in PROMPTS)
    # The reference answers each test prompt 8 times, then the policy does.
    of_all = [asked for asked in seen if asked[0][0] in TEST_PROMPTS and len(asked[1]) == 48]
    assert len(of_all) == 2
    references, own = (np.reshape(vowels(*asked), (6, 8)) for asked in of_all)
    expected = cj.calibrate(own, references).mean()
    floors = {name.rpartition(":")[2]: floor for name, floor in evaluation.floors.items()}
    assert floors["vowels"].mean_rank.mean == pytest.approx(expected, abs=1e-6)
    assert {name: floor.floor for name, floor in floors.items()} == {"vowels": 0.45, "shortness": 0.5}
    assert "shortness" in made.report().read_text()

    files = {path: path.read_bytes() for path in made.work_dir.glob("*.npz")}
    again = align(model, made.work_dir, constraints=constraints)
    assert again.evaluate(TEST_PROMPTS, responses_per_prompt=8) == evaluation
    assert {path: path.read_bytes() for path in made.work_dir.glob("*.npz")} == files
    with pytest.raises(cj.InputError, match="belongs to another"):
        align(model, made.work_dir, constraints=[cj.Constraint(vowels), cj.Constraint(shortness)])


def test_a_floor_is_a_rank():
    with pytest.raises(cj.InputError, match=r"floor is 50.*between 0 and 1"):
        cj.Constraint(shortness, floor=50)
    with pytest.raises(cj.InputError, match=r"name is 'tone/short'.*a word"):
        cj.Constraint(shortness, name="tone/short")


def test_a_transform_and_messages_of_ones_own(model, tmp_path):
    """Any increasing function serves; the reward gets the prompts as they were given, in a step each of them once."""
    prompts = [[{"role": "user", "content": f"Count to {i}."}] for i in range(12)]
    seen = []

    def reward(prompts, responses):
        seen.append(prompts)
        return [float(len(set(text))) for text in responses]

    objective = cj.Objective(lambda u: u**3, cj.best_of(2), kl_budget=0.5)
    made = align(model, tmp_path / "runs" / "cube", prompts, reward=reward, objective=objective, steps=3)
    with pytest.raises(cj.InputError, match="call evaluate"):
        made.report()
    assert all(one in prompts for asked in seen for one in asked)
    for asked in seen[-3:]:  # 8 of 12 prompts a step, 4 responses to each
        assert len(asked) == 32 and len({str(prompt) for prompt in asked}) == 8
    config = json.loads((made.work_dir / "config.json").read_text())
    assert config["policy"]["transform"].startswith("<lambda>-")
    evaluation = made.evaluate(prompts[:5], responses_per_prompt=4)
    expected = objective.ideal(evaluation.kl.mean).win_rates["best_of_2"]
    assert evaluation.ideal["best_of_2"].transform == pytest.approx(expected, abs=1e-6)
    assert made.report().exists()
    # The reward's source is known: the same call again trains nothing.
    assert align(model, made.work_dir, prompts, reward=reward, objective=objective, steps=3)
