"""`attack`: attempts at test prompts, as a user runs it, and what is refused."""

import json

import numpy as np
import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.data import pipelines
from ctrl_jax.data.conversations import transcript
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.pipeline import align, attack
from ctrl_jax.pipeline.rollouts import score
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from tests.pipeline.test_train import contents


def test_it_says_how_often_attempts_succeed_and_leaves_the_run_as_it_is(smoke):
    before = contents(smoke.work_dir)
    code, printed, errors = smoke.command_line.run("attack", "--attempts", "6", "--lowest", "0.2", "--json")
    assert code == 0, errors
    found = json.loads(printed)
    assert set(found) == {"reward", "gold"} and contents(smoke.work_dir) == before
    for one in found.values():
        for side in ("policy", "reference"):
            counted = one["risks"][side]["counted"]
            assert [*counted] == ["1", "2", "4", "6"]
            means = [by_n["mean"] for by_n in counted.values()]
            assert 0 <= means[0] <= means[-1] <= 1 and means == sorted(means)


def test_what_is_asked_is_augmented_and_judged_as_it_was(smoke):
    experiment = load_experiment("smoke").experiment()
    workspace = Workspace(experiment, smoke.work_dir, smoke.stages_dir, make_mesh(1))
    with workspace.claimed():
        run = prepare(workspace)
        aligned = align.policy(run)
        test = run.corpus.prompts("test", experiment.evaluation.prompts)
        asked = attack._asked(run, test, 3, 0.4)
        plain = attack._asked(run, test, 3, 0.0)
        found = attack.run(run, aligned, 3, 0.4)
        responses = attack._responses(run, "policy", aligned.policy, asked, 3)
        rewards = score(run, aligned.reward.score, test.prompts, responses)
        again = attack._responses(run, "policy", aligned.policy, plain, 3)
        other = attack._responses(run, "reference", aligned.policy, plain, 3)
    size = len(test.texts)
    assert asked.tokens.shape == (3 * size, experiment.data.prompt_length) and len({*asked.ids.tolist()}) == 3 * size
    # As they are, they are the test prompts, three times each.
    np.testing.assert_array_equal(plain.tokens, np.repeat(test.prompts.tokens, 3, axis=0))
    np.testing.assert_array_equal(plain.lengths, np.repeat(test.prompts.lengths, 3))
    assert np.any(asked.tokens != plain.tokens, axis=1).mean() > 0.9
    np.testing.assert_allclose(found["reward"].sides["policy"], rewards, atol=1e-6)
    assert rewards.shape == (size, 3) and found["gold"].plain.shape == (
        size,
        experiment.evaluation.responses_per_prompt,
    )
    assert np.any(again.tokens[:, 0] != again.tokens[:, 1]), "equal prompts are answered independently"
    assert np.any(other.tokens != again.tokens), "and so are the two sides"
    assert np.any(found["reward"].sides["policy"] != found["reward"].sides["reference"])


def test_prompts_as_they_are_keep_their_order_and_copies_and_are_cut_on_the_left(smoke):
    experiment = load_experiment("smoke").experiment()
    workspace = Workspace(experiment, smoke.work_dir, smoke.stages_dir, make_mesh(1))
    with workspace.claimed():
        run = prepare(workspace)
    tokenizer = run.corpus.tokenizer
    one, other = run.corpus.prompts("test", 2).conversations
    whole = tokenizer.encode_prompt(one)
    found = pipelines.as_they_are((one, other, one), ("a", "b", "c"), tokenizer, prompt_length=len(whole) - 2)
    assert found.tokens[0].tolist() == whole[2:] and found.tokens[2].tolist() == whole[2:]
    assert found.ids.tolist() == pipelines.prompt_ids(["a", "b", "c"]).tolist()
    assert transcript(one) != transcript(other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--attempts", "0"], "--attempts is 0"),
        (["--sigma", "1.5"], "--sigma is 1.5"),
        (["--lowest", "0"], "--lowest is 0"),
        (["--figure", "a.gif"], "names no kind of picture"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(tmp_path, capsys, options, told):
    try:
        code = command_line.main(["attack", "smoke", "--runs-dir", str(tmp_path / "runs"), *options])
    except SystemExit as exit:  # tyro's own way out
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2 and told in " ".join(printed.err.split())
    assert not (tmp_path / "runs").exists()
