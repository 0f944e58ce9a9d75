"""The graph of stages, in one table: keys, versions, order and timings follow from it.

A stage's key is what its results depend on: the options that it reads, without those that change no result; its inputs
by their content (of another stage what that holds, however it came to be; of a file what it says, wherever it is); the
code, by its version; and how jax draws. Not in it are the devices and the versions of libraries that draw alike: they
change results by rounding alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ctrl_jax import config
from ctrl_jax.config import Experiment
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.results import without_neutral
from ctrl_jax.runtime import stages
from ctrl_jax.runtime.stages import plain


@dataclass(frozen=True)
class Stage:
    name: str
    version: int
    """Raise it when the code behind the stage gives other results, so that what older code left on disk is not used."""
    needs: Mapping[str, str]
    """Its inputs: by their name in the key, the stage that makes them, or `files` where they come from outside."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """The options that its results depend on: by their name in the key, the field of the experiment."""
    wanted: Callable[[Experiment], bool] = lambda _: True
    """Whether a run of an experiment makes it."""
    timing: str | None = None
    """Its name among the timings of evaluation.json; by default its own."""
    draws: bool = True
    """Whether it draws random numbers with jax."""
    shared: bool = True
    """Whether experiments share it, below `runs/stages`; else it is in the work directory."""
    younger: bool = False
    """Whether it came after the first results on disk: a run that does not make it has it in no key or config.json."""


_REFERENCE_AND_REWARD = {"corpus": "data", "reference": "sft", "reward_model": "reward_model"}
_REFERENCE_AND_REWARDS = {"corpus": "data", "reference": "sft", "rewards": "reward_model"}
_COMPARED_WITH = {"samples": "calibration.samples_per_prompt", "temperature": "policy.temperature", "seed": "seed"}
TABLE = (
    Stage(
        "data", 3,
        needs={"tokenizer": "files"},
        reads={option.name: f"data.{option.name}" for option in fields(config.Data)},
        draws=False,
    ),
    Stage(
        "sft", 3,
        needs={"corpus": "data", "vocabulary_size": "data"},
        reads={"demonstrations": "data.demonstrations", "model": "model", "sft": "sft", "seed": "seed"},
        wanted=lambda experiment: experiment.sft.steps > 0,
    ),
    Stage(
        "reward_model", 3,
        needs={"corpus": "data", "reference": "sft"},
        reads={"lora": "model.lora", "reward_model": "reward_model", "seed": "seed"},
        wanted=lambda experiment: experiment.reward_model.trained,
    ),
    Stage(
        "combine", 1,
        needs=_REFERENCE_AND_REWARDS,
        reads={"prompts": "calibration.prompts", **_COMPARED_WITH},
        wanted=lambda experiment: experiment.combine.compares,
        younger=True,
    ),
    Stage(
        "combine_test", 1,
        needs=_REFERENCE_AND_REWARDS,
        reads={"prompts": "evaluation.prompts", **_COMPARED_WITH},
        wanted=lambda experiment: experiment.combine.compares,
        younger=True,
    ),
    Stage(
        "calibration", 4,
        needs=_REFERENCE_AND_REWARD,
        reads={"calibration": "calibration", "temperature": "policy.temperature", "seed": "seed"},
        wanted=assembly.is_calibrated,
        timing="calibrate",
    ),
    Stage(
        "start", 1,
        needs={"corpus": "data", "reference": "sft", "calibration": "calibration"},
        reads={"start": "start", "lora": "model.lora", "seed": "seed"},
        wanted=lambda experiment: experiment.start is not None,
        younger=True,
    ),
    Stage(
        "reference_evaluation", 3,
        needs=_REFERENCE_AND_REWARD,
        reads={
            "prompts": "evaluation.prompts", "responses_per_prompt": "evaluation.responses_per_prompt",
            "temperature": "policy.temperature", "seed": "seed",
        },
    ),
    Stage(
        "reference_judge", 1,
        needs={"reference_evaluation": "reference_evaluation", "judge": "files"},
        wanted=lambda experiment: experiment.evaluation.judge is not None,
    ),
    Stage(
        "policy", 8,
        needs={**_REFERENCE_AND_REWARD, "calibration": "calibration", "start": "start", "constraints": "combine"},
        reads={"policy": "policy", "lora": "model.lora", "table": "calibration", "seed": "seed"},
        timing="train",
        shared=False,
    ),
    Stage(
        "evaluation", 3,
        # Its seal has the whole configuration (results.py): it reads all options.
        needs={"policy": "policy", "reference": "reference_evaluation", "judge": "reference_judge"},
        timing="evaluate",
        shared=False,
    ),
)  # fmt: skip
"""In an order in which they can be made."""

VERSIONS = {stage.name: stage.version for stage in TABLE}

YOUNGER: dict[str, Any] = {
    "data.corrupted": 0.0,
    "data.corrupted_prefers": "length",
    "data.format": "chat",
    "evaluation.along": 0,
    "evaluation.along_responses": None,
    "start": None,
    "combine": {"ensemble": "mean", "rewards": [], "by": "smallest_calibrated", "weights": []},
    "model.lora.last_layers": None,
    "policy.beta_share": None,
    "policy.floors": [],
    "reward_model.long_prompts": None,
    "reward_model.linear": False,
    "reward_model.members": 1,
    "reward_model.validation": {"every": 0, "pairs": 256, "patience": 3},
}
"""Options that came after the first results on disk, and the value that gives those results: an option that has it is
in no key and in no config.json, so that what was made before is found."""


def named(name: str) -> Stage:
    return next(stage for stage in TABLE if stage.name == name)


def made_by(experiment: Experiment) -> list[str]:
    """The stages that a run of the experiment makes, in the order of the table."""
    return [stage.name for stage in TABLE if stage.wanted(experiment)]


def inputs_key(name: str, inputs: Mapping[str, Any], draws: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage depends on besides its options, in clear."""
    stage = named(name)
    optional = {of for of, maker in stage.needs.items() if maker != "files" and named(maker).younger}
    if not stage.needs.keys() - optional <= inputs.keys() <= stage.needs.keys():
        raise ValueError(f"The stage {name} needs {sorted(stage.needs)}, and was given {sorted(inputs)}.")
    drawn = {"draws": dict(draws)} if stage.draws else {}
    return {"version": VERSIONS[name], **drawn, **inputs}


def options_key(name: str, experiment: Experiment, contents: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a stage reads, without those that change no result. A path enters by the contents of its files.

    Args:
      name: of the stage.
      experiment: has the options.
      contents: of the files that the experiment names (workspace.contents).
    """
    tree = as_tree(experiment)
    for section, option in (("data", "path"), ("model", "path"), ("model", "adapter")):
        found = contents[section if option == "path" else option]
        tree[section][option] = found["weights"] if (section, option) == ("model", "path") and found else found
    places = {key: _place(tree, path) for key, path in named(name).reads.items()}
    return {key: without_neutral(options[name]) for key, (options, name) in places.items() if name in options}


def as_tree(experiment: Experiment) -> dict[str, Any]:
    """The experiment in JSON, with the names of its algorithms, and without `YOUNGER` options that change nothing."""
    tree: dict[str, Any] = plain(experiment)
    for section, training in experiment.trainings.items():
        tree[section] |= training.named_algorithm
    for path, before in YOUNGER.items():
        options, name = _place(tree, path)
        if options[name] == before:
            del options[name]
    if experiment.start is not None:
        del tree["start"]["floors"]  # younger too, and a start has none
    return tree


def versions(experiment: Experiment) -> dict[str, int]:
    """Of all stages, but the younger ones that a run of the experiment does not make."""
    without = {stage.name for stage in TABLE if stage.younger and not stage.wanted(experiment)}
    return {name: version for name, version in VERSIONS.items() if name not in without}


def open_stage(
    root: Path, name: str, experiment: Experiment, contents: Mapping[str, Any], draws: Mapping[str, Any], **inputs: Any
) -> stages.Stage:
    """The folder of a stage that experiments share, below `root`, by its key."""
    key = {**inputs_key(name, inputs, draws), **options_key(name, experiment, contents)}
    return stages.Stage.open(root, name, key)


def timings(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage as evaluation.json has them, in the order of the table."""
    return {stage.timing or stage.name: seconds[stage.name] for stage in TABLE if stage.name in seconds}


def _place(tree: Any, path: str) -> tuple[dict[str, Any], str]:
    """The part of the tree that an option is in, and the option's name there."""
    *sections, name = path.split(".")
    for section in sections:
        tree = tree[section]
    return tree, name
