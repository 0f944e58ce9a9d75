import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands import plan
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.config import Dpo, Experiment, PpoClip
from ctrl_jax.devices.accelerators import KINDS
from ctrl_jax.errors import InputError
from ctrl_jax.planning import expectation, phases, tables
from tests.planning.models import SMALL, config_only

ROOT = Path(__file__).parents[2]


def planned(capsys, *arguments, experiment="smoke"):
    command_line.main(["plan", experiment, *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_json(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = planned(capsys, "--devices", "4", "--device-kind", "v5e")
    training = found["stages"]["policy"]
    assert found["device"]["kind"] == "v5e" and found["devices"] == 4
    assert training["times"] == 10
    assert training["seconds"] == pytest.approx(sum(phase["seconds"] for phase in training["phases"].values()))
    assert training["fits"] and found["remedies"] == {}
    fast = planned(capsys, "--devices", "4", "--device-kind", "v5e", "--efficiency.bandwidth", "0.4")
    slowest = {phase["limit"] for phase in fast["stages"]["policy"]["phases"].values()}
    assert slowest <= {"memory bandwidth", "interconnect"}  # smoke is too small for anything else
    assert fast["stages"]["policy"]["seconds"] == pytest.approx(2 * training["seconds"])


def test_the_tables_say_what_does_not_fit_and_what_would(large, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert plan.run(plan.Options(large, device_kind="v5e")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("policy does not fit", "`model.lora.rank=16`", "does not fit", "0.5 of the peak", "v5e"):
        assert text in printed


@pytest.mark.parametrize(
    "file",
    [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("rivals/*.py")],
    ids=lambda file: file.stem,
)
def test_every_experiment_can_be_planned(file, tmp_path):
    experiment = load_experiment(str(file)).experiment()
    if experiment.model.path is not None:
        path = config_only(tmp_path / "model", max_position_embeddings=4096, num_hidden_layers=12)
        experiment = replace(experiment, model=replace(experiment.model, path=path))
    found = tables.as_json(experiment, 2, expectation.Efficiency(), phases.stages(experiment, 2), KINDS["H100"])
    assert all(stage["seconds"] > 0 and math.isfinite(stage["seconds"]) for stage in found["stages"].values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(device_kind="v9"), "'v9'"),
        (dict(device_kind="v5e", devices=0), "`devices` is 0; ask for"),
        (dict(devices=2), "measured of this whole machine"),
        (dict(device_kind="v5e", devices=24), "do not divide by the 24 devices. Give `sft.batch_size=72`"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(InputError, match=told):
        plan.run(plan.Options(SMALL, **options))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (5, "B", "5 B"),
        (999, "B", "999 B"),
        (999.9, "B", "1 kB"),
        (1234, "", "1.23 k"),
        (123_456_789, "B", "123 MB"),
        (1e21, "", "1000 E"),
    ],
)
def test_quantities(value, unit, text):
    assert tables.quantity(value, unit) == text


def test_several_updates_and_pairs_are_said(capsys):
    policies = {
        PpoClip(epochs=2, minibatches=4): "for 8 updates by 8 prompts each",
        Dpo(): "32 prompts of 20 tokens, with 2 responses",
    }
    for policy, said in policies.items():
        assert plan.run(plan.Options(Experiment("some", policy=policy), device_kind="H100")) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert said in printed and ("new tokens/s" in printed) == (type(policy) is PpoClip)


def test_the_command_line_spells_what_would_make_it_fit(tmp_path, capsys, monkeypatch):
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    path = config_only(tmp_path / "large", vocab_size=128_000, num_key_value_heads=8, **sizes)
    monkeypatch.chdir(ROOT)
    options = ["--model.path", path, "--sft.steps", "0", "--device-kind", "v5e"]
    assert command_line.main(["plan", "smoke", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--model.lora.rank 16 brings it to" in printed and "(--efficiency.matmul, --eff" in printed
    found = planned(capsys, *options)
    [remedy, *_] = [one for one in found["remedies"]["policy"] if "model.lora.rank" in one["options"]]
    assert remedy["options"] == {"model.lora.rank": 16} and remedy["held"] <= found["capacity"]
