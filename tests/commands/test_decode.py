"""`decode`: a trained policy under decoders, as a user runs it, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.decoding import names
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.pipeline import align, assembly, decode, rollouts
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from tests.pipeline.test_train import contents

DECODERS = ("best_of_2", "blockwise_best_of_2(8)")


def test_it_compares_decoders_and_names_the_procedure_to_train_for(smoke):
    before = contents(smoke.work_dir)
    code, printed, errors = smoke.command_line.run("decode", "--runs", "2", "--decoders", *DECODERS, "--json")
    assert code == 0, errors
    trees = {tree["name"]: tree for tree in json.loads(printed)}
    assert tuple(trees) == DECODERS and contents(smoke.work_dir) == before
    assert trees["best_of_2"]["nearest"] is None and trees["best_of_2"]["scored"] == 2
    length = load_experiment("smoke").experiment().data.response_length
    assert trees[DECODERS[1]]["scored"] == 2 * -(-length // 8)
    assert names.parse(trees[DECODERS[1]]["nearest"]["procedure"])
    for tree in trees.values():
        assert 2 <= tree["tokens"]["policy"] <= 2 * length
        assert tree["win_rate"]["low"] <= tree["win_rate"]["mean"] <= tree["win_rate"]["high"]
        # Best of two, of the reference, against one: 2/3 in theory.
        assert 0.5 < tree["against_one"]["reference"]["mean"] < 0.85


def test_another_run_stands_beside_it_on_the_same_prompts_and_draws(smoke, tmp_path):
    """Of a run that shares all but its training, by a longer one of the same policy: what it is refused for, too."""
    short = ("--policy.steps", "4")
    code, _, errors = smoke.command_line.run("train", *short)
    assert code == 0, errors
    (other,) = (path for path in smoke.command_line.runs_dir.glob("smoke,*") if (path / "results.json").exists())
    given = ("--runs", "2", "--decoders", "best_of_2", "--json")
    code, printed, errors = smoke.command_line.run("decode", *given, "--beside", str(other))
    assert code == 0, errors
    (tree,) = json.loads(printed)
    code, printed, errors = smoke.command_line.run("decode", *short, *given)
    assert code == 0, errors
    (theirs,) = json.loads(printed)
    expected = tree["win_rate"]["mean"] - theirs["win_rate"]["mean"]
    assert expected != 0 and tree["difference"]["mean"] == pytest.approx(expected, abs=1e-6)
    code, _, errors = smoke.command_line.run("decode", *given, "--beside", str(smoke.work_dir))
    assert code == 2 and "the run itself" in " ".join(errors.split())
    code, _, errors = smoke.command_line.run("decode", *given, "--seed", "1", "--beside", str(other))
    assert code == 2 and "was trained with another reference" in " ".join(errors.split())
    unfinished = tmp_path / "unfinished"
    shutil.copytree(other, unfinished)
    (unfinished / "results.json").unlink()
    (unfinished / "evaluation.json").unlink()
    code, _, errors = smoke.command_line.run("decode", *given, "--beside", str(unfinished))
    assert code == 2 and "is not finished" in " ".join(errors.split())


def test_what_is_returned_is_the_same_in_any_batches(smoke, monkeypatch):
    experiment = load_experiment("smoke").experiment()
    workspace = Workspace(experiment, smoke.work_dir, smoke.stages_dir, make_mesh(1))
    with workspace.claimed():
        run = prepare(workspace)
        aligned = align.policy(run)
        prompts = run.corpus.prompts("test", 6)

        by = names.parse("tree_of_4(2,8)")
        made = assembly.decoder(
            run.models, run.mesh, by,
            max_length=experiment.data.response_length, eos_ids=run.corpus.tokenizer.eos_ids, temperature=1.0,
        )  # fmt: skip

        def picks(side="policy", params=aligned.policy):
            return decode.picks(run, side, params, aligned.reward.score, prompts, by, made, 2)

        whole = picks()
        monkeypatch.setattr(rollouts, "ROWS", 8)
        parts, others = picks(), picks("reference")
    np.testing.assert_allclose(whole.rewards, parts.rewards, atol=1e-6)
    np.testing.assert_array_equal(whole.sampled, parts.sampled)
    np.testing.assert_array_equal(whole.gold, parts.gold)
    assert whole.rewards.shape == (6, 2) and (whole.rewards[:, 0] != whole.rewards[:, 1]).any()
    assert (others.rewards != whole.rewards).any(), "sides draw independently"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--decoders", "best_of_2", "beam(4)"], "There is no decoder 'beam(4)'"),
        (["--decoders", "tree_of_8(3,4)"], "the number that is kept must divide the width"),
        (["--decoders", "blockwise_best_of_2(999)"], "segments of 999 tokens, and responses have at most"),
        (["--decoders"], "--decoders names none"),
        (["--decoders", "best_of_2000"], "draws 2000 responses; at most 1024 are drawn"),
        (
            ["--decoders", "tree_of_8(2,4)", "--calibration.quantiles", "4"],
            "quantiles are no sample of the reference's",
        ),
        (["--beside", "nowhere"], "nowhere/config.json cannot be read"),
        (["--runs", "1"], "--runs is 1"),
        (["--figure", "a.gif"], "names no kind of picture"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_any_work(tmp_path, capsys, options, told):
    try:
        code = command_line.main(["decode", "smoke", "--runs-dir", str(tmp_path / "runs"), *options])
    except SystemExit as exit:  # tyro's own way out
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2 and told in " ".join(printed.err.split())
    assert not (tmp_path / "runs").exists()
