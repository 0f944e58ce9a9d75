"""A Hugging Face directory and JSON lines, from one command to a report."""

from pathlib import Path

import numpy as np

from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.runtime.stages import read_arrays
from tests.pipeline.pretrained import CONFIG
from tests.pipeline.test_train import contents, parsed, rows, times


def test_every_file_is_there(pretrained):
    work_dir = pretrained.work_dir
    names = {"config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "evaluation.npz"}
    assert names <= {path.name for path in work_dir.iterdir()}
    assert parsed(work_dir / "config.json")["model"]["path"] == str(pretrained.base)
    assert (work_dir / "report" / "index.html").read_text().lstrip().lower().startswith("<!doctype html>")
    # Nothing is fine-tuned where sft.steps is 0.
    stages = {path.name.rpartition("-")[0] for path in pretrained.stages_dir.iterdir()}
    assert stages == {"data", "reward_model", "calibration", "reference_evaluation"}
    assert not list(pretrained.command_line.runs_dir.rglob("*.tmp"))


def test_the_evaluation_has_no_gold_reward(pretrained):
    evaluation = parsed(pretrained.work_dir / "evaluation.json")
    assert not evaluation.get("gold_win_rates")
    assert set(evaluation["win_rates"]) == set(evaluation["ideal"]) == {"sampling", "best_of_2"}
    for interval in [evaluation["kl"], *evaluation["win_rates"].values()]:
        assert 0 <= interval["low"] <= interval["mean"] <= interval["high"]
    assert 0 <= evaluation["reward_model"]["accuracy"] <= 1
    page = (pretrained.work_dir / "report" / "index.html").read_text()
    assert "Left out: there is no judge beside the training reward." in page
    assert "win rate by gold" not in page
    arrays = read_arrays(pretrained.work_dir / "evaluation.npz")
    assert arrays["policy_rewards"].shape == (8, 8)
    assert not [name for name in arrays if "gold" in name]


def test_the_policy_starts_as_the_model_and_leaves_it(pretrained):
    metrics = rows(pretrained.work_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    # An adapter of 0 beside the frozen weights.
    assert abs(metrics[0]["kl"]) < 1e-5
    assert metrics[-1]["kl"] > 0.01
    assert max(row["sampler_scorer_gap"] for row in metrics) < 1e-4
    assert parsed(pretrained.work_dir / "evaluation.json")["kl"]["mean"] > 0.01


def test_the_samples_answer_prompts_of_the_test_file(pretrained):
    data = parsed(pretrained.work_dir / "config.json")["data"]["path"]
    asked = [row["prompt"] for row in rows(Path(data) / "test.jsonl")]
    samples = rows(pretrained.work_dir / "samples.jsonl")
    assert [row["prompt"] for row in samples] == [f"\n\nHuman: {prompt}\n\nAssistant:" for prompt in asked[:8]]
    tokenizer = pretrained_tokenizers.load(pretrained.base, embedding_rows=CONFIG["vocab_size"])
    for row in samples:
        for side in ("policy", "reference"):
            assert "<|im_end|>" not in row[side]["text"]
            # A token is at most a byte here, of which at most three make the sign that stands for a broken one.
            assert len(tokenizer.encode_response(row[side]["text"])) <= 3 * 8 + 1


def test_the_same_command_again_changes_nothing(pretrained):
    def of_the_run():
        # As in test_train: the report is written again, and git may have moved on.
        files = contents(pretrained.work_dir)
        return {name: files[name] for name in files if name != "environment.json"}, times(pretrained.stages_dir)

    before = of_the_run()
    code, printed, errors = pretrained.command_line.run("train")
    assert code == 0, errors
    assert of_the_run() == before
    assert printed == pretrained.printed[pretrained.printed.index("pretrained, Φ") :], "nothing was trained or sampled"


def test_only_the_adapter_and_the_head_are_trained_and_kept(pretrained):
    """Neither checkpoint has a copy of the model."""
    import orbax.checkpoint as ocp

    def params(folder):
        with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
            restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        return {name: np.shape(leaf) for name, leaf in restored["state"].items() if name.startswith("params")}

    shapes = {"q_proj.a": (32, 2), "q_proj.b": (2, 32), "down_proj.a": (48, 2), "down_proj.b": (2, 32)}
    adapter = {f"layers_0.{name}": shape for name, shape in shapes.items()}
    assert params(pretrained.work_dir) == {f"params.lora.{name}": shape for name, shape in adapter.items()}
    (reward_model,) = pretrained.stages_dir.glob("reward_model-*")
    assert params(reward_model) == {
        **{f"params.lora.trunk.{name}": shape for name, shape in adapter.items()},
        "params.params.head.kernel": (32, 1),
        "params.params.head.bias": (1,),
    }
