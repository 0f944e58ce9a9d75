import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctrl_jax.config import Calibration, Data, Evaluation, Experiment, Lora, Model, Policy, RewardModel, Supervised
from ctrl_jax.data import sources
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, lora, peft, weights
from ctrl_jax.pipeline import stages
from ctrl_jax.pipeline.directories import pretrained_architecture
from ctrl_jax.pipeline.divisible import cpu_devices
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.stages import fingerprint
from tests.pipeline.pretrained import CLASSIFIER, write_model


def test_what_older_code_left_is_not_taken_for_its_own(tmp_path, mesh, monkeypatch):
    run = Workspace(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh)
    run.claim()
    run.claim()
    stage = run.stage("sft", corpus="c", vocabulary_size=7)
    before = stages.VERSIONS["sft"]
    monkeypatch.setitem(stages.VERSIONS, "sft", 99)
    assert run.stage("sft", corpus="c", vocabulary_size=7).directory != stage.directory
    with pytest.raises(InputError, match=rf"versions\.sft: {before} → 99"):
        run.claim()


def test_a_claim_removes_what_a_kill_left_of_files_in_the_making(tmp_path, mesh):
    left = tmp_path / "work" / f".metrics.jsonl.{'0' * 32}.tmp"
    left.parent.mkdir()
    left.write_text("")
    os.utime(left, (left.stat().st_mtime - 7200,) * 2)
    with Workspace(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh).claimed():
        assert not left.exists()


def test_the_environment_is_that_of_the_first_claim(tmp_path, mesh):
    run = Workspace(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh)
    run.claim()
    path = tmp_path / "work" / "environment.json"
    first = json.loads(path.read_text())
    path.write_text(json.dumps(first | {"command": ["another"]}))
    run.claim()
    assert json.loads(path.read_text())["command"] == ["another"]


def test_wandb_that_is_not_installed_is_told_at_once(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make setup EXTRA=wandb"):
        Workspace(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh, wandb=True)


def test_a_batch_that_does_not_divide_is_told_at_once(tmp_path, mesh):
    experiment = Experiment("example", policy=Policy(prompts_per_step=12))
    with pytest.raises(InputError, match=r"`policy.prompts_per_step` is 12.*8 devices. Make it 8 or 16"):
        Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh)


@pytest.mark.parametrize("section", ["sft", "reward_model", "policy"])
def test_micro_batches_that_do_not_divide_are_told_at_once(tmp_path, mesh, section):
    size = {"prompts_per_step": 48} if section == "policy" else {"batch_size": 48}
    experiment = Experiment("example")
    part = dataclasses.replace(getattr(experiment, section), micro_batches=4, **size)
    message = rf"`{section}\.micro_batches` is 4, .* 6 prompts .* 48 on 8 .* 1, 2, 3, 6\."
    with pytest.raises(InputError, match=message):
        Workspace(dataclasses.replace(experiment, **{section: part}), tmp_path / "work", tmp_path / "stages", mesh)
    part = dataclasses.replace(part, micro_batches=3)
    Workspace(dataclasses.replace(experiment, **{section: part}), tmp_path / "work", tmp_path / "stages", mesh)


def lines(path, count=40, **fields):
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?", **fields}) + "\n" for i in range(count)))
    return Data(source="jsonl", path=str(path), prompt_length=100)


def test_other_contents_of_its_files_are_said(tmp_path, mesh, capsys):
    data = lines(tmp_path / "rows.jsonl")
    Workspace(Experiment("example", data=data), tmp_path / "work", tmp_path / "stages", mesh).claim()
    before = (tmp_path / "work" / "config.json").read_bytes()
    lines(tmp_path / "rows.jsonl", count=41)
    Workspace(Experiment("example", data=data), tmp_path / "work", tmp_path / "stages", mesh).claim()
    printed = capsys.readouterr().out.replace("\n", "")
    assert "was made of other contents: contents.data: " in printed and "made anew" in printed
    assert (tmp_path / "work" / "config.json").read_bytes() == before, "what is there is still of the old"


def test_a_file_that_moved_is_the_same_and_another_file_is_not(tmp_path, mesh):
    def claim(path, count=40):
        experiment = Experiment("example", data=lines(tmp_path / path, count=count))
        Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh).claim()

    claim("rows.jsonl")
    claim("moved.jsonl")
    assert json.loads((tmp_path / "work" / "config.json").read_text())["data"]["path"] == str(tmp_path / "moved.jsonl")
    with pytest.raises(InputError, match=r"data\.path: .*moved.* → .*other"):
        claim("other.jsonl", count=41)


@pytest.mark.parametrize(
    "changes",
    [
        {"sft": Supervised(steps=600, learning_rate=1e-2, checkpoint_every=7)},
        {"model": Model(rematerialize=True)},
        {"policy": Policy(micro_batches=2)},
    ],
)
def test_options_that_change_no_result_may_change(tmp_path, mesh, changes):
    run = Workspace(Experiment("example"), tmp_path / "work", tmp_path / "stages", mesh)
    run.claim()
    changed = dataclasses.replace(run, experiment=Experiment("example", **changes))
    changed.claim()
    assert json.loads((tmp_path / "work" / "config.json").read_text()) == json.loads(json.dumps(changed.claimed_config))
    for name in ("sft", "reward_model", "policy"):
        assert len({fingerprint(stages.options_key(name, one.experiment, one.contents)) for one in (run, changed)}) == 1


def test_data_without_pairs_is_told_before_anything_is_trained(tmp_path, mesh):
    data = lines(tmp_path / "rows.jsonl", response="An answer.")
    experiment = Experiment(
        "example",
        data=dataclasses.replace(data, vocabulary_size=40),
        calibration=Calibration(prompts=8),
        policy=Policy(prompts_per_step=8),
        evaluation=Evaluation(prompts=1),
    )
    with pytest.raises(InputError, match=r"no preference pairs .*`reward_model.path` or `reward_model.function`"):
        prepare(Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh))


def test_a_context_that_the_model_does_not_have_is_told(tmp_path, mesh):
    write_model(tmp_path / "model", max_position_embeddings=64)
    experiment = Experiment(
        "example", data=Data(prompt_length=60, response_length=5), model=Model(path=str(tmp_path / "model"))
    )
    with pytest.raises(InputError, match=r"make 65 tokens, but .* was made for 64"):
        pretrained_architecture(experiment)


@pytest.mark.parametrize(
    ("cores", "fields", "devices"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (64, {}, 4),
        (64, {"policy": Policy(prompts_per_step=64)}, 8),
        (64, {"policy": Policy(prompts_per_step=256)}, 32),
        (2, {"policy": Policy(prompts_per_step=8)}, 1),
        (2, {"policy": Policy(prompts_per_step=17)}, 1),
        (4, {"policy": Policy(micro_batches=16)}, 2),
        (4, {"sft": Supervised(batch_size=6)}, 2),
        (64, {"model": Model(path="somewhere")}, 1),
    ],
)
def test_a_small_model_has_a_device_a_core_as_far_as_batches_divide(cores, fields, devices):
    experiment = Experiment("example", reward_model=RewardModel(batch_size=64), **fields)
    assert cpu_devices(experiment, cores) == devices


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_directories_that_do_not_fit_are_refused_before_anything_is_made(tmp_path, mesh):
    model, classifier = write_model(tmp_path / "model"), write_model(tmp_path / "classifier", **CLASSIFIER)
    architecture = huggingface.architecture(model, dtype="float32")
    adapters = lora.init(weights.load(model, architecture), Lora(rank=2), jax.random.key(0))
    peft.save(tmp_path / "adapter", adapters, architecture, Lora(rank=2), base=str(model))
    experiment = Experiment(
        "example",
        model=Model(path=str(model), adapter=str(tmp_path / "adapter")),
        reward_model=RewardModel(path=str(classifier)),
        data=Data(source="jsonl", path="rows.jsonl"),
        sft=Supervised(steps=0),
    )

    def refusal(pattern):
        with pytest.raises(InputError, match=pattern):
            Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh)

    Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh)
    spoil(classifier, lambda tensors: tensors.update({"score.weight": np.zeros((2, 32), np.float32)}))
    refusal(r"classifier/model\.safetensors: the tensor score\.weight .* classifier with 2 labels")
    spoil(classifier, lambda tensors: tensors.pop("score.weight"))
    refusal(r"classifier has no tensor score\.weight.*Give the directory of a sequence classifier")
    config = tmp_path / "adapter" / peft.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    refusal(r"adapter_config\.json has use_dora = True")
    spoil(model, lambda tensors: tensors.pop("model.norm.weight"))
    refusal(r"model has no tensor model\.norm\.weight")
    assert not (tmp_path / "work").exists() and not (tmp_path / "stages").exists()


def test_input_files_are_read_for_their_fingerprints_once(tmp_path, mesh, monkeypatch):
    """At the claim: a file that changes later is not taken for the one that config.json has."""
    data = lines(tmp_path / "rows.jsonl", response="Yes.", chosen="An answer.", rejected="No.")
    experiment = Experiment(
        "example",
        data=dataclasses.replace(data, vocabulary_size=60),
        sft=Supervised(batch_size=8),
        reward_model=RewardModel(batch_size=8),
        calibration=Calibration(prompts=8),
        policy=Policy(prompts_per_step=8),
        evaluation=Evaluation(prompts=1),
    )
    read = []
    fingerprint_of = sources.fingerprint
    monkeypatch.setattr(sources, "fingerprint", lambda data: read.append(data.path) or fingerprint_of(data))
    workspace = Workspace(experiment, tmp_path / "work", tmp_path / "stages", mesh)
    with workspace.claimed():
        run = prepare(workspace)
        (tmp_path / "rows.jsonl").write_text("{}")
        assert run.contents == workspace.contents
    assert len(read) == 1
