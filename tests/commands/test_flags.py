"""What messages name as fields, and a user of the command line reads as options."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import tyro

from ctrl_jax.commands import flags
from ctrl_jax.commands.flags import spelled
from ctrl_jax.commands.options import _run_name
from ctrl_jax.config import Combine, Evaluation, Experiment, Policy


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Lower `policy.kl_budget`, or raise it.", "Lower --policy.kl-budget, or raise it."),
        ("Lower policy.kl_budget.", "Lower --policy.kl-budget."),
        ("Give `data.source=files`.", "Give --data.source files."),
        ("Leave it out by `sft.steps=0`.", "Leave it out by --sft.steps 0."),
        ("Set `model.rematerialize=True`.", "Set --model.rematerialize."),
        ("`model.lora.rank` and (reward_model.path)", "--model.lora.rank and (--reward-model.path)"),
        ("Leave `devices` out of 8 devices.", "Leave --devices out of 8 devices."),
        ("Choose another `work_dir`.", "Choose another --work-dir."),
        # Not an option: no field, a part of a path, what is another class's notation, an option without backticks.
        (
            "`policy.kl` is `nothing.at_all` in model.safetensors",
            "`policy.kl` is `nothing.at_all` in model.safetensors",
        ),
        ("/home/data.path/x and x.data.path", "/home/data.path/x and x.data.path"),
        ("EXP=runs/a,policy.steps=4,sft.steps=0", "EXP=runs/a,policy.steps=4,sft.steps=0"),
        ("Policy.kl_budget is 3 nats", "Policy.kl_budget is 3 nats"),
        ("its seed, name and devices", "its seed, name and devices"),
    ],
)
def test_fields_are_spelled_as_options(message, expected):
    assert spelled(message) == expected


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "a"),
        ({"policy": Policy(kl_budget=0.5)}, "a,policy.kl_budget=0.5"),
        ({"evaluation": Evaluation(procedures=("sampling", "best_of_2"))},
         "a,evaluation.procedures=sampling+best_of_2"),
        ({"policy": Policy(floors=(0.25, 0.5)), "combine": Combine(rewards=("m:f", "m:g"))},
         "a,combine.rewards=m:f+m:g,policy.floors=0.25+0.5"),
    ],
)  # fmt: skip
def test_a_run_is_named_by_what_is_other(changes, name):
    base = Experiment("a")
    assert _run_name(base, replace(base, **changes)) == name


def test_a_name_that_could_be_anothers_is_a_fingerprint():
    """A mixture of procedures has a + of its own."""
    base = Experiment("a")
    mixed = replace(base, evaluation=Evaluation(procedures=("sampling", "0.5*best_of_2+0.5*best_of_4")))
    assert re.fullmatch("a,[0-9a-f]+", _run_name(base, mixed))


def test_every_field_is_an_option_of_that_name(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Experiment, default=flags.COMPLETE, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    printed = capsys.readouterr().out
    fields = [*flags._fields(flags.COMPLETE)]
    assert {"policy.kl_budget", "start.steps", "model.lora.rank", "seed", "data.columns"} < {*fields}
    sections = {name.rpartition(".")[0] for name in fields}
    for name in {*fields} - sections:
        assert spelled(f"`{name}`") in printed


@pytest.mark.parametrize("name", flags.OF_COMMANDS)
def test_every_other_option_is_one_of_a_command(name):
    helps = {
        "baseline": "sweep", "device_kind": "plan", "efficiency.bandwidth": "plan", "efficiency.matmul": "plan",
        "jobs": "sweep", "format": "export", "output": "export", "point": "sweep", "port": "sample", "steps": "profile",
        "transforms": "ideal",
        "write_jobs": "sweep",
    }  # fmt: skip
    command = importlib.import_module(f"ctrl_jax.commands.{helps[name]}")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        command.main(["smoke", "--help"])
    assert spelled(f"`{name}`") in "".join(printed)


def test_an_error_of_the_command_line_has_options_and_one_of_the_library_fields():
    program = (
        "from ctrl_jax.config import Calibration, Experiment, Policy\n"
        "Experiment('any', policy=Policy(kl_budget=9), calibration=Calibration(samples_per_prompt=16))"
    )
    library = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Lower `policy.kl_budget`" in library.stderr
    command = [sys.executable, "-m", "ctrl_jax", "train", "smoke", "--policy.kl-budget", "9"]
    line = subprocess.run(command, capture_output=True, text=True)
    assert "Lower --policy.kl-budget" in line.stderr
