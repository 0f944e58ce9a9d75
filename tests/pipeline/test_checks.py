"""What the data cannot give is said before anything is trained: all of it, with options that mend it."""

import json
import re
from dataclasses import replace

import pytest

from ctrl_jax.config import Calibration, Data, Dpo, Evaluation, Experiment, Policy, RewardModel, Supervised, Validation
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import checks
from ctrl_jax.pipeline import data as data_stage
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace

PAIRS = [
    {"prompt": f"What is {i} plus 1?", "chosen": f"{i} plus 1 is {i + 1}.", "rejected": f"No idea, {i} times."}
    for i in range(40)
]


def corpus(tmp_path, rows, devices=1, **fields):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(Data(source="files", path=str(path)), **fields.pop("data", {}))
    experiment = Experiment("mine", data=data, **fields)
    return prepare(Workspace(experiment, tmp_path / "work", tmp_path / "stages", make_mesh(devices))).corpus


def sizes(tmp_path, rows):
    """Train and test prompts of the rows."""
    path = tmp_path / "sized.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from ctrl_jax.data import files

    loaded = files.load(path).records
    return len(loaded["train"]), len(loaded["test"])


def options(message):
    """The options of the last line, as fields: {"calibration": {"prompts": 32}}."""
    found = {}
    for named in message.splitlines()[-1].split():
        option, value = named.strip("`").split("=")
        section, field = option.split(".")
        found.setdefault(section, {})[field] = int(value) if value.isdigit() else value
    return found


SECTIONS = {
    "calibration": Calibration(), "policy": Policy(), "evaluation": Evaluation(),
    "sft": Supervised(), "reward_model": RewardModel(),
}  # fmt: skip


def mended(message, **fields):
    """The experiment's sections with the options that a message proposes."""
    found = options(message)
    data = fields.pop("data", {}) | found.pop("data", {})
    return {"data": data} | {name: replace(SECTIONS[name], **values) for name, values in found.items()} | fields


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_forty_pairs_take_one_wrong_turn(tmp_path, devices):
    train, test = sizes(tmp_path, PAIRS)
    with pytest.raises(InputError) as caught:
        corpus(tmp_path, PAIRS, devices)
    message = str(caught.value)
    for words in (
        f"{6 if train < 32 else 5} problems with the data",
        f"40 rows gave {train} records to train on, {40 - train - test} for validation and {test} to test on",
        "mine.jsonl: cut into 80, 10 and 10 % by a hash",
        f"256 train prompts are asked for (`calibration.prompts`), and there are {train}",
        f"256 test prompts are asked for (`evaluation.prompts`), and there are {test}",
        "no row has a 'response'",
        "`data.demonstrations=chosen`",
        f"64 demonstrations (`sft.batch_size`), and there are {train}",
        f"64 preference pairs (`reward_model.batch_size`), and there are {train}",
    ):
        assert words in message
    fitting = train // devices * devices
    expected = {"calibration": {"prompts": train}, "evaluation": {"prompts": test}, "sft": {"batch_size": fitting},
                "data": {"demonstrations": "chosen"}, "reward_model": {"batch_size": fitting}}  # fmt: skip
    if train < 32:
        expected["policy"] = {"prompts_per_step": fitting}
    assert options(message) == expected
    found = corpus(tmp_path, PAIRS, devices, **mended(message))
    assert found.demonstrations("chosen").examples.prompts.ids.size == train
    assert found.tokenizer.vocabulary_size < 512


def test_every_problem_is_named_and_mended_together(tmp_path):
    rows = [
        {"prompt": f"What is {i} plus 1? " + "Please! " * (i % 2 * 20), "response": f"It is {i}."} for i in range(40)
    ]
    reward = RewardModel(function="no_such_module:reward")
    with pytest.raises(InputError) as caught:
        corpus(tmp_path, rows, 2, data={"vocabulary_size": 400}, reward_model=reward)
    message = str(caught.value)
    assert re.search(r"1\. A vocabulary of 400 pieces is more than these texts have; .* at most \d+", message)
    assert re.search(r"of at most 20 tokens; \d+ are longer, up to \d+: let them in \(`data.prompt_length`\)", message)
    assert "'no_such_module' cannot be imported" in message
    fields = mended(message, reward_model=replace(RewardModel(), function="textwrap:fill"))
    assert {"vocabulary_size", "prompt_length"} <= fields["data"].keys()
    with pytest.raises(InputError, match=r"One problem .*\n  1\. The reward textwrap:fill failed with") as caught:
        corpus(tmp_path, rows, 2, **fields)
    assert "All options together" not in str(caught.value)


@pytest.mark.parametrize("words", [20, 400])
def test_prompts_that_are_all_too_long_hide_no_demonstrations(tmp_path, words):
    rows = [row | {"prompt": row["prompt"] + " Please!" * (words + i)} for i, row in enumerate(PAIRS)]
    rows = [row | {"response": row["chosen"]} for row in rows]
    with pytest.raises(InputError) as caught:
        corpus(tmp_path, rows)
    message = str(caught.value)
    assert "and there are 0 of at most 20 tokens; " in message
    assert "no row has" not in message and "no preference pairs" not in message
    found = corpus(tmp_path, rows, **mended(message))
    train, _ = sizes(tmp_path, rows)
    learned = found.demonstrations("response"), found.pairs("train")
    assert [len(of_kind.examples.prompts.ids) for of_kind in learned] == [train, train]
    assert found.long_prompts == ("drop" if words == 20 else "truncate")


def test_pairs_of_long_prompts_may_serve_the_reward_model_alone(tmp_path, capsys):
    rows = [*PAIRS, *(row | {"prompt": row["prompt"] + " Please!" * 20} for row in PAIRS)]
    train, test = sizes(tmp_path, PAIRS)
    fields = {
        "data": {"demonstrations": "chosen", "prompt_length": 40},
        "calibration": Calibration(prompts=train), "policy": Policy(prompts_per_step=8),
        "evaluation": Evaluation(prompts=test), "sft": Supervised(batch_size=8),
    }  # fmt: skip
    of_all, _ = sizes(tmp_path, rows)
    with pytest.raises(InputError, match=rf"A batch has {of_all} preference pairs .* and there are \d+; make it"):
        corpus(tmp_path, rows, **fields, reward_model=RewardModel(batch_size=of_all))
    options = RewardModel(batch_size=of_all, long_prompts="truncate")
    found = corpus(tmp_path, rows, **fields, reward_model=options)
    capsys.readouterr()
    pairs = data_stage.pairs(found, "train", long_prompts=options.long_prompts)
    assert len(pairs.examples.prompts.ids) == of_all and 0 < pairs.cut < of_all
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{pairs.cut} of {of_all} train preference pairs" in said and "more than 40 tokens: its beginning" in said
    kept = len(found.pairs("train").examples.prompts.ids)
    assert kept == of_all - pairs.cut, "other uses of the data drop them"
    assert found.has_pairs("test", long_prompts="truncate")


def test_a_validation_needs_pairs(tmp_path):
    train, test = sizes(tmp_path, PAIRS)
    options = RewardModel(batch_size=8, validation=Validation(every=2))
    fields = {
        "data": {"demonstrations": "chosen", "prompt_length": 40},
        "calibration": Calibration(prompts=train), "policy": Policy(prompts_per_step=8),
        "evaluation": Evaluation(prompts=test), "sft": Supervised(batch_size=8), "reward_model": options,
    }  # fmt: skip
    found = corpus(tmp_path, PAIRS, **fields)
    bare = replace(found, records={**found.records, "validation": []})
    experiment = Experiment("any", **{**fields, "data": Data(source="files", path="x", prompt_length=40)})
    with pytest.raises(InputError, match=r"no pairs in the validation split.*`reward_model\.validation\.every=0`"):
        checks.check(experiment, bare, parts=1)


def test_a_policy_that_learns_from_pairs_needs_some(tmp_path):
    """Known before the reference is fine-tuned, also where the reward is no model that is trained on pairs."""
    rows = [{"prompt": f"How much is {i} plus 1?", "response": str(i + 1)} for i in range(40)]

    def refused(rows):
        train, test = sizes(tmp_path, rows)
        with pytest.raises(InputError) as caught:
            corpus(
                tmp_path, rows, data={"prompt_length": 40}, reward_model=RewardModel(function="textwrap:fill"),
                sft=Supervised(batch_size=8), policy=Dpo(prompts_per_step=16),
                calibration=Calibration(prompts=max(train, 16)),
                evaluation=Evaluation(prompts=test),
            )  # fmt: skip
        return " ".join(str(caught.value).split())

    assert re.search(r"no preference pairs, which Dpo learns from.*an algorithm that samples", refused(rows))
    train, _ = sizes(tmp_path, PAIRS[:14])
    doubled = refused(PAIRS[:14] + [{**row, "rejected": "None."} for row in PAIRS[:3]])
    assert doubled.count("(`policy.prompts_per_step`)") == 2
    assert f"`policy.prompts_per_step={train}`" in doubled.split("All options together")[1], "the smaller of two"
    few = refused(rows + PAIRS[:10])
    assert re.search(r"A batch has 16 preference pairs \(`policy.prompts_per_step`\), and there are \d;", few)
    assert "`policy.prompts_per_step=" in few.split("All options together")[1]


def test_prompts_alone_want_demonstrations_and_name_what_is_not_read(tmp_path):
    rows = [{"prompt": f"What is {i} plus 1?", "solution": str(i + 1)} for i in range(40)]
    with pytest.raises(
        InputError, match=r"no row has a 'response' \(columns that are not read: 'solution'; `data.columns` maps"
    ):
        corpus(tmp_path, rows, reward_model=RewardModel(function="textwrap:fill"))


def test_a_step_of_more_prompts_than_there_are_is_mended_too(tmp_path):
    rows = PAIRS[:12]
    train, _ = sizes(tmp_path, rows)
    with pytest.raises(InputError, match=rf"A step takes 32 of the {train} train prompts") as caught:
        corpus(tmp_path, rows)
    assert options(str(caught.value))["policy"] == {"prompts_per_step": train}


def test_what_fits_says_nothing_and_where_the_splits_come_from_once(tmp_path, capsys):
    train, test = sizes(tmp_path, PAIRS)
    fields = {
        "data": {"demonstrations": "chosen", "prompt_length": 40},
        "calibration": Calibration(prompts=train), "policy": Policy(prompts_per_step=8),
        "evaluation": Evaluation(prompts=test), "sft": Supervised(batch_size=8),
        "reward_model": RewardModel(batch_size=8),
    }  # fmt: skip
    found = corpus(tmp_path, PAIRS, **fields)
    printed = capsys.readouterr().out
    size = found.tokenizer.vocabulary_size
    assert f"The vocabulary has {size} pieces instead of 512: the data holds no more." in printed
    assert f"40 rows gave {train} records to train on" in printed
    assert found.has_pairs("train")
    again = corpus(tmp_path, PAIRS, **fields)
    assert capsys.readouterr().out == ""
    assert again.tokenizer.fingerprint == found.tokenizer.fingerprint
    # Words of the replies are in the vocabulary, although no row has a response.
    assert len(again.tokenizer.encode_response("No idea, 3 times.")) < 12


def test_what_is_left_out_and_cut_is_said(tmp_path, capsys):
    long = " and one".join(str(i) for i in range(12))
    replies = [{"response": f"{long} {i}", "chosen": f"{long} {i}", "rejected": f"{long}."} for i in range(40)]
    rows = [{"prompt": f"What is {i} plus 1?", **replies[i]} for i in range(40)]
    rows += [{"prompt": f"Who is {i}?", "response": "Me.", "chosen": "Me.", "rejected": long} for i in range(40)]
    train, test = sizes(tmp_path, rows)
    found = corpus(
        tmp_path, rows, data={"prompt_length": 40, "response_length": 6}, calibration=Calibration(prompts=train),
        policy=Policy(prompts_per_step=8), evaluation=Evaluation(prompts=test), sft=Supervised(batch_size=8),
        reward_model=RewardModel(batch_size=8),
    )  # fmt: skip
    capsys.readouterr()
    same = sum(record.chosen == record.response and record.chosen != "Me." for record in found.records["train"])
    assert 0 < same < train
    assert data_stage.pairs(found, "train").examples.prompts.ids.size == train - same
    assert f"{same} train preference pairs left out: their replies are equal in the first 6 tokens" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert data_stage.demonstrations(found, "response").prompts.ids.size == train
    share = f"{same} of {train} demonstrations ({same / train:.1%}) do not end within 6 tokens"
    assert share in capsys.readouterr().out
    only = replace(found, records={"test": [record for record in found.records["train"] if record.response != "Me."]})
    assert not only.has_pairs("test"), "all are equal in what is kept"
