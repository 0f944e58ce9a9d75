"""What a second run reuses and what it makes anew where one input changed in between: the table of docs/stages.md.

Whatever is reused, the second run has to end in what a run from nothing ends in. `WRITE_TABLE=1` writes the table.
"""

import dataclasses
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline.stages import TABLE
from tests.pipeline.fakes import EXPERIMENTS, Fakes, results, train

DOCUMENT = Path(__file__).parents[2] / "docs" / "stages.md"
STAGES = [stage.name for stage in TABLE if stage.name != "reference_judge"]  # it has a row of its own

Change = Callable[[Path, Experiment], Experiment | None]
"""Changes the files in a folder, or gives another experiment."""


# What changes.


def text(name: str, old: str, new: str) -> Change:
    def change(folder: Path, experiment: Experiment) -> None:
        contents = (folder / name).read_text()
        assert contents.count(old) >= 1
        (folder / name).write_text(contents.replace(old, new, 1))

    return change


def added(name: str, contents: str) -> Change:
    def change(folder: Path, experiment: Experiment) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(contents)

    return change


def weight(name: str, file: str = "model.safetensors") -> Change:
    """One bit of one number, in the middle of the largest tensor."""

    def change(folder: Path, experiment: Experiment) -> None:
        tensors = load_file(folder / name / file)
        largest = max(tensors.values(), key=lambda tensor: tensor.size).reshape(-1).view(np.uint32)
        largest[largest.size // 3] ^= 1
        save_file(tensors, folder / name / file, {"format": "pt"})

    return change


def moved(option: str, name: str, value: Callable[[str], Any] = str) -> Change:
    def change(folder: Path, experiment: Experiment) -> Experiment:
        (folder / name).rename(folder / "elsewhere")
        return with_option(experiment, option, value("elsewhere"))

    return change


def option(name: str, new: Any) -> Change:
    return lambda folder, experiment: with_option(experiment, name, new)


def with_option(experiment: Experiment, name: str, new: Any) -> Experiment:
    *path, last = name.split(".")
    parts = [experiment]
    for part in path:
        parts.append(getattr(parts[-1], part))
    changed = dataclasses.replace(parts.pop(), **{last: new})
    for part, owner in zip(reversed(path), reversed(parts), strict=True):
        changed = dataclasses.replace(owner, **{part: changed})
    return changed


def nothing(folder: Path, experiment: Experiment) -> None:
    pass


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
CHANGES: dict[str, tuple[str, Change]] = {
    "nothing": ("function", nothing),
    "nothing (trained reward)": ("trained", nothing),
    "nothing (classifier)": ("classifier", nothing),
    "nothing (a start)": ("start", nothing),
    "nothing (two rewards)": ("combined", nothing),
    "a row of train.jsonl": ("function", text("data/train.jsonl", "What is 3", "What was 3")),
    "a row of validation.jsonl": ("function", text("data/validation.jsonl", "What is", "What was")),
    "a row of test.jsonl": ("function", text("data/test.jsonl", "What is", "What was")),
    "white space in train.jsonl": ("function", text("data/train.jsonl", ": ", ":  ")),
    "the data moved": ("function", moved("data.path", "data")),
    "a weight of the model": ("function", weight("model")),
    "config.json of the model": (
        "function",
        text("model/config.json", "1e-05", "1e-06"),
    ),
    "generation_config.json": ("function", added("model/generation_config.json", '{"eos_token_id": [257, 10]}')),
    "tokenizer.json": (
        "function",
        text("model/tokenizer.json", 'space": false', 'space": true'),
    ),
    "tokenizer_config.json": ("function", text("model/tokenizer_config.json", "\\n", " ")),
    "special_tokens_map.json": ("function", added("model/special_tokens_map.json", '{"unk_token": "<|pad|>"}')),
    "chat_template.jinja": ("function", added("model/chat_template.jinja", TEMPLATE)),
    "a README beside the model": ("function", added("model/README.md", "A model.")),
    "the model moved": ("function", moved("model.path", "model")),
    "the adapter's weights": ("function", weight("adapter", "adapter_model.safetensors")),
    "the adapter moved": ("function", moved("model.adapter", "adapter")),
    "the reward's module": ("function", text("rewards.py", "% 97", "% 89")),
    "a module that it imports": ("function", text("helpers.py", "1", "-1")),
    "one that a function of it imports": ("function", text("lazily.py", "1", "2")),
    "a file that it reads": ("function", text("scale.json", "1.0", "-1.0")),
    "a file that it reads (a start)": ("start", text("scale.json", "1.0", "-1.0")),
    "a row of test.jsonl (two rewards)": ("combined", text("data/test.jsonl", "What is", "What was")),
    "the module of a second reward": ("combined", text("rewards.py", "% 97", "% 89")),
    "a file that a second reward reads": ("combined", text("scale.json", "1.0", "-1.0")),
    "a weight of the first": ("combined", weight("classifier")),
    "a weight of a third": ("combined", weight("second")),
    "a third reward moved": ("combined", moved("combine.rewards", "second", lambda to: ("rewards:reward", f"./{to}"))),
    "a module beside it": ("function", text("unused.py", "1", "2")),
    "a weight of the classifier": ("classifier", weight("classifier")),
    "the classifier's chat template": ("classifier", added("classifier/chat_template.jinja", TEMPLATE)),
    "the classifier moved": ("classifier", moved("reward_model.path", "classifier")),
    **{
        f"--{name.replace('_', '-')}": (base, option(name, new))
        for base, options in {
            "function": {
                "name": "another",
                "seed": 1,
                "data.prompt_length": 81,
                "data.long_prompts": "truncate",
                "data.response_length": 9,
                "model.adapter": None,
                "model.dtype": "bfloat16",
                "model.lora.rank": 2,
                "model.rematerialize": True,
                "sft.steps": 5,
                "sft.batch_size": 5,
                "sft.micro_batches": 2,
                "sft.learning_rate": 0.5,
                "sft.warmup_steps": 2,
                "sft.checkpoint_every": 3,
                "reward_model.function": "rewards:reward_too",
                "calibration.prompts": 7,
                "calibration.samples_per_prompt": 9,
                "calibration.quantiles": 4,
                "calibration.keep_responses": True,
                "policy.transform": "identity",
                "policy.procedure": "best_of_3",
                "policy.kl_budget": 0.5,
                "policy.beta": 0.5,
                "policy.beta_share": 0.5,
                "policy.kl_limit": 5.0,
                "policy.steps": 5,
                "policy.prompts_per_step": 5,
                "policy.samples_per_prompt": 5,
                "policy.micro_batches": 2,
                "policy.learning_rate": 0.5,
                "policy.warmup_steps": 2,
                "policy.max_gradient_norm": 2.0,
                "policy.temperature": 0.5,
                "policy.checkpoint_every": 3,
                "evaluation.prompts": 6,
                "evaluation.responses_per_prompt": 7,
                "evaluation.procedures": ("sampling",),
                "evaluation.bootstrap_resamples": 121,
                "evaluation.judge": "rewards:reward_too",
                "evaluation.along": 2,
                "evaluation.along_responses": 3,
                "data.columns": ("response=chosen", "chosen=response"),
                "data.demonstrations": "chosen",
                "data.format": "plain",
            },
            "start": {"start.steps": 5, "start": None},
            "combined": {
                "combine.rewards": ("rewards:reward_too", "./second"),
                "combine.by": "log_sigmoids(0.5)",
                "policy.floors": (0.25, 0.25),
            },
            "members": {"combine.ensemble": "min"},
            "trained": {
                "data.source": "dialogues/harmless",
                "data.seed": 1,
                "data.dialogues": 310,
                "data.vocabulary_size": 301,
                "data.corrupted": 0.5,
                "model.width": 64,
                "model.layers": 1,
                "model.heads": 2,
                "model.kv_heads": 4,
                "model.mlp_width": 64,
                "model.tied_embeddings": False,
                "model.rope_theta": 1e3,
                "model.norm_epsilon": 1e-6,
                "reward_model.steps": 5,
                "reward_model.batch_size": 5,
                "reward_model.micro_batches": 2,
                "reward_model.learning_rate": 0.5,
                "reward_model.warmup_steps": 2,
                "reward_model.checkpoint_every": 3,
                "reward_model.long_prompts": "truncate",
                "reward_model.validation.every": 2,
                "reward_model.members": 2,
                "reward_model.linear": True,
            },
        }.items()
        for name, new in options.items()
    },
}
SETTINGS = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
}
ELSEWHERE = {
    "data.path": "the data moved", "model.path": "the model moved", "reward_model.path": "the classifier moved",
    "model.lora.alpha": "--model.lora.rank", "model.lora.targets": "--model.lora.rank",
    "model.lora.last_layers": "--model.lora.rank",
    "combine.weights": "--combine.by",
    "data.corrupted_prefers": "--data.corrupted",
    "reward_model.validation.pairs": "--reward-model.validation.every",
    "reward_model.validation.patience": "--reward-model.validation.every",
}  # fmt: skip
"""Options that have no row of their own, and the row that has what they do."""


def fields(kind: type, prefix: str = "") -> list[str]:
    found, hints = [], typing.get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        nested = dataclasses.is_dataclass(hint)
        found += fields(hint, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


def test_every_option_has_a_row():
    """A new one needs a row: is it in the keys of what depends on it?"""
    rows = {name.removeprefix("--").replace("-", "_") for name in CHANGES} | set(ELSEWHERE)
    assert set(fields(Experiment)) - rows == set()


# Two runs, and what the second made.


def seals(pattern: str) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in Path().glob(pattern)}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def second(fakes: Fakes, experiment: Experiment) -> dict[str, str]:
    """What a run made that comes after another in the same place, by stage, and whose work directory it took."""
    before, work_dir = seals("runs/stages/*/done.json"), "runs/work"
    evaluated = seals("runs/*/results.json")
    try:
        train(fakes, experiment)
    except InputError as error:
        assert "belongs to another experiment" in str(error), error
        work_dir = "runs/another"
        train(fakes, experiment, work_dir)
    after = seals("runs/stages/*/done.json")
    made = {path.parent.name.rpartition("-")[0] for path in after if before.get(path) != after[path]}
    assert made & {"sft", "reward_model", "start"} == set(fakes.made) - {"policy"}
    made |= set(fakes.made)
    results = Path(work_dir) / "results.json"
    made |= {"evaluation"} if evaluated.get(results) != seals("runs/*/results.json")[results] else set()
    present = {path.parent.name.rpartition("-")[0] for path in after} | {"policy", "evaluation"}
    found = {stage: "**anew**" if stage in made else "kept" if stage in present else "–" for stage in STAGES}
    return {**found, "work directory": "kept" if work_dir == "runs/work" else "**another**"}


def row_of(fakes: Fakes, folder: Path, base: str, change: Change) -> dict[str, str]:
    experiment = EXPERIMENTS[base]
    experiment = change(folder, experiment) or experiment
    row = second(fakes, experiment)
    used = "runs/work" if row["work directory"] == "kept" else "runs/another"
    reused = results(used)
    train(fakes, experiment, "alone/work", "alone/stages")
    assert reused == results("alone/work"), "what was reused is not what a run from nothing makes"
    return row


HEADER = ["changed in between", *STAGES, "work directory"]


def documented() -> dict[str, dict[str, str]]:
    if not DOCUMENT.exists():
        return {}
    _, _, table = DOCUMENT.read_text().partition("<!-- the table -->\n")
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: dict(zip(HEADER[1:], cells, strict=True)) for name, *cells in lines}


FOUND: dict[str, dict[str, str]] = {}


FAST = [name for name in CHANGES if not name.startswith("--")]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in [*CHANGES, *SETTINGS]]
)
def test_what_is_reused_is_right_and_as_documented(prepared, fakes, name):
    base, change = CHANGES.get(name, ("function", nothing))
    folder = prepared(base)
    before = getattr(jax.config, name, None)
    try:
        if name in SETTINGS:
            jax.config.update(name, SETTINGS[name])
        FOUND[name] = row_of(fakes, folder, base, change)
    finally:
        if name in SETTINGS:
            jax.config.update(name, before)
    if os.environ.get("WRITE_TABLE"):
        write_table()
    assert documented().get(name) == FOUND[name]


def write_table() -> None:
    rows = {**documented(), **FOUND}
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for name in [*CHANGES, *SETTINGS]:
        if name in rows:
            lines.append("| " + " | ".join([name, *(rows[name][column] for column in HEADER[1:])]) + " |")
    before, _, after = DOCUMENT.read_text().partition("<!-- the table -->\n")
    after = after.partition("<!-- its end -->")[2]
    DOCUMENT.write_text(before + "<!-- the table -->\n" + "\n".join(lines) + "\n<!-- its end -->" + after)
