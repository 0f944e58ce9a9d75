"""The table of stages: keys, order, versions, and the results that a version stands for."""

from dataclasses import fields, replace
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path

import pytest

from ctrl_jax.config import Calibration, Combine, Data, Experiment, Lora, Model, Policy, PpoClip, Regression, Supervised
from ctrl_jax.pipeline.stages import (
    TABLE,
    VERSIONS,
    YOUNGER,
    as_tree,
    inputs_key,
    open_stage,
    options_key,
    timings,
    versions,
)
from ctrl_jax.runtime.stages import fingerprint, plain, read_json
from tests.pipeline import golden

DOCUMENT = Path(__file__).parents[2] / "docs" / "stages.md"
CONTENTS = {"data": None, "model": None, "adapter": None}
EXPERIMENT = Experiment("example")


def test_every_stage_comes_after_what_it_needs():
    known = {"files"}
    for stage in TABLE:
        assert set(stage.needs.values()) <= known, stage.name
        known.add(stage.name)


def test_a_key_is_the_options_that_a_stage_reads_with_its_inputs_version_and_draws(tmp_path):
    stage = open_stage(
        tmp_path, "calibration", EXPERIMENT, CONTENTS, {"drawn": 1}, corpus="c", reference="r", reward_model="m"
    )
    options = {name: value for name, value in plain(EXPERIMENT.calibration).items() if name != "keep_responses"}
    expected = {
        "version": VERSIONS["calibration"], "draws": {"drawn": 1}, "corpus": "c", "reference": "r", "reward_model": "m",
        "calibration": options, "temperature": EXPERIMENT.policy.temperature, "seed": 0,
    }  # fmt: skip
    assert read_json(stage.directory / "stage.json") == expected
    assert stage.directory == tmp_path / f"calibration-{fingerprint(expected)}"


def test_a_path_enters_by_its_contents_and_what_changes_no_result_does_not_enter():
    model = Model(path="somewhere", adapter="elsewhere", rematerialize=True)
    given = replace(EXPERIMENT, model=model, sft=Supervised(steps=5, warmup_steps=1, checkpoint_every=7))
    contents = {**CONTENTS, "model": {"weights": "w", "tokenizer.json": "t"}, "adapter": "a"}
    found = options_key("sft", given, contents)
    assert (found["model"]["path"], found["model"]["adapter"]) == ("w", "a")
    assert "rematerialize" not in found["model"] and "checkpoint_every" not in found["sft"]
    moved = replace(given, model=replace(model, path="moved", rematerialize=False))
    assert options_key("sft", moved, contents) == found
    mine = replace(EXPERIMENT, data=Data(source="files", path="rows.jsonl"))
    assert options_key("data", mine, {**CONTENTS, "data": "d"})["path"] == "d"


def test_the_algorithm_is_part_of_the_policys_key():
    """It is no option, but the type of the options."""
    same = {field.name: getattr(EXPERIMENT.policy, field.name) for field in fields(Policy)}
    found = options_key("policy", replace(EXPERIMENT, policy=PpoClip(**same)), CONTENTS)["policy"]
    assert found["algorithm"] == PpoClip.algorithm
    assert "algorithm" not in options_key("policy", EXPERIMENT, CONTENTS)["policy"], "as before there was another"


def test_a_younger_option_is_in_no_key_until_it_changes_something():
    for path, before in YOUNGER.items():
        section, _, name = path.rpartition(".")
        tree = as_tree(EXPERIMENT)
        assert name not in (reduce(getitem, section.split("."), tree) if section else tree), path
        assert plain(attrgetter(path)(EXPERIMENT)) == before, "the default leaves results as they were"
    mine = replace(EXPERIMENT, data=Data(source="files", path="rows.jsonl"))
    plain_rows = replace(mine, data=replace(mine.data, format="plain"))
    assert "format" not in options_key("data", mine, CONTENTS)
    assert options_key("data", plain_rows, CONTENTS) == {**options_key("data", mine, CONTENTS), "format": "plain"}
    last = replace(EXPERIMENT, model=Model(path="somewhere", lora=Lora(rank=2, last_layers=1)))
    assert options_key("policy", last, CONTENTS)["lora"]["last_layers"] == 1


def test_inputs_are_those_of_the_table():
    with pytest.raises(ValueError, match=r"sft needs \['corpus', 'vocabulary_size'\], and was given \['corpus'\]"):
        inputs_key("sft", {"corpus": "c"}, {})


def test_what_an_experiment_does_not_use_changes_none_of_its_keys():
    """Neither options nor stages that were added later; of one that uses them all are there."""
    assert "start" not in as_tree(EXPERIMENT) and "start" not in versions(EXPERIMENT)
    inputs = {"corpus": "c", "reference": "r", "reward_model": "m", "calibration": "k"}
    assert "start" not in inputs_key("policy", inputs, {}) and "start" in inputs_key(
        "policy", {**inputs, "start": "s"}, {}
    )
    kept = replace(EXPERIMENT, calibration=Calibration(keep_responses=True), start=Regression())
    assert as_tree(kept)["start"]["algorithm"] == Regression.algorithm
    several = replace(kept, combine=Combine(rewards=("a:b",)))
    assert versions(several) == VERSIONS and "combine" not in versions(kept)
    assert options_key("reward_model", several, CONTENTS) == options_key("reward_model", EXPERIMENT, CONTENTS)
    assert options_key("calibration", kept, CONTENTS) == options_key("calibration", EXPERIMENT, CONTENTS)
    assert options_key("start", kept, CONTENTS)["start"]["algorithm"] == Regression.algorithm


def test_timings_have_the_order_of_the_table():
    seconds = {"evaluation": 5.0, "policy": 4.0, "sft": 1.0, "calibration": 3.0, "reward_model": 2.0}
    assert list(timings(seconds).items()) == [
        ("sft", 1.0), ("reward_model", 2.0), ("calibrate", 3.0), ("train", 4.0), ("evaluate", 5.0),
    ]  # fmt: skip


def described() -> str:
    """The table as docs/stages.md has it."""
    lines = ["| stage | needs | reads | is in |", "|---|---|---|---|"]
    for stage in TABLE:
        needs = ", ".join(dict.fromkeys(stage.needs.values()))
        sections = sorted({path.split(".")[0] for path in stage.reads.values()})
        whole = sorted(path for path in stage.reads.values() if path in sections)
        fields = sorted(path for path in stage.reads.values() if path.split(".")[0] not in whole)
        reads = ", ".join(f"`{path}`" for path in whole + fields) if stage.name != "data" else "`data`"
        place = "`runs/stages`" if stage.shared else "the work directory"
        lines.append(
            f"| {stage.name} | {needs} | {reads or ('all options' if stage.name == 'evaluation' else '–')} | {place} |"
        )
    return "\n".join(lines)


def test_the_documentation_has_the_table():
    """What to write there is `described()`."""
    assert described() in DOCUMENT.read_text(encoding="utf-8")


def test_a_stage_whose_results_change_has_another_version(smoke):
    """golden.py says what to do where this fails."""
    kept = read_json(golden.FILE)
    versions = {stage: numbers.pop("version") for stage, numbers in kept.items()}
    found = golden.outputs(smoke.work_dir, smoke.stages_dir)
    rows = {stage: golden.differing(stage, found[stage], kept[stage]) for stage in found}
    changed = {stage for stage, names in rows.items() if names}
    forgotten = golden.forgotten(changed, VERSIONS, versions)
    assert not forgotten, (
        f"raise the version in pipeline/stages.py of {forgotten}, whose {rows} changed; then golden.py"
    )
    assert not changed and versions == {stage: VERSIONS[stage] for stage in versions}, "renew golden.json: golden.py"


def test_the_golden_numbers_are_of_every_stage_that_the_run_has():
    younger = {"start", "combine", "combine_test"}
    assert set(read_json(golden.FILE)) == {stage.name for stage in TABLE} - {"reference_judge", *younger}


@pytest.mark.parametrize(
    ("changed", "raised", "forgotten"),
    [
        (set(), set(), []),
        ({"sft"}, set(), ["sft"]),
        ({"sft"}, {"sft"}, []),
        ({"sft", "reward_model", "calibration", "policy"}, {"sft"}, []),  # these have other inputs
        ({"calibration", "policy"}, set(), ["calibration"]),
        ({"evaluation"}, {"policy"}, ["evaluation"]),
    ],
)
def test_a_version_is_due_where_the_change_began(changed, raised, forgotten):
    versions = {name: version + (name in raised) for name, version in VERSIONS.items()}
    assert golden.forgotten(changed, versions, VERSIONS) == forgotten


def test_a_change_is_seen_and_rounding_is_not():
    rows = {"a": [1.0, -2.0], "b": [0.5]}
    assert golden.differing("sft", rows, rows) == []
    assert golden.differing("sft", {**rows, "a": [1.0 + 1e-4, -2.0]}, rows) == []
    assert golden.differing("sft", {**rows, "a": [1.01, -2.0]}, rows) == ["a"]
    assert golden.differing("sft", {"a": rows["a"]}, rows) == ["b"]
