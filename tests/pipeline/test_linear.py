"""A linear reward: the stage that fits it, on networks of few parameters."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import optimize

from ctrl_jax.config import Calibration, Data, Evaluation, Experiment, Model, Policy, RewardModel, Supervised
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import networks
from ctrl_jax.pipeline import assembly, linear, reward_model
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.steps import ensemble
from ctrl_jax.types import Responses

pytestmark = pytest.mark.usefixtures("compile_fast")

EXPERIMENT = Experiment(
    "linear",
    data=Data(dialogues=200, vocabulary_size=300, prompt_length=48, response_length=32),
    model=Model(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16),
    sft=Supervised(steps=1, warmup_steps=0),
    reward_model=RewardModel(linear=True, steps=5, batch_size=16, warmup_steps=0),
    calibration=Calibration(prompts=8, samples_per_prompt=4),
    policy=Policy(prompts_per_step=8, samples_per_prompt=4),
    evaluation=Evaluation(prompts=8, responses_per_prompt=16),
)


def prepared(folder: Path, devices: int = 1, **options):
    experiment = replace(EXPERIMENT, reward_model=replace(EXPERIMENT.reward_model, **options))
    run = prepare(Workspace(experiment, folder / "work", folder / "stages", make_mesh(devices)))
    return run, Trained(networks.initial(run.models, jax.random.key(1)), "reference")


def of_means(run, reference, pairs) -> np.ndarray:
    """[n, 2, D]: each response's mean of the hidden states that have read its tokens, one response at a time.

    `policy` gives those from which each token is predicted, which have read the tokens before it: behind one more token
    it gives the last too.
    """
    tokens = np.pad(pairs.responses.tokens, ((0, 0), (0, 0), (0, 1)))
    longer = Responses(tokens, np.asarray(pairs.responses.lengths) + 1)
    states = np.asarray(run.models.policy.apply(reference.params, pairs.prompts, longer), np.float64)
    lengths = np.asarray(pairs.responses.lengths)
    rows = zip(states, lengths, strict=True)
    return np.array([[s[1 : n + 1].mean(axis=0) for s, n in zip(*row, strict=True)] for row in rows])


def fitted(x: np.ndarray, strength: float, counts: np.ndarray) -> np.ndarray:
    """Newton's method, by its definition."""

    def loss(w):
        return counts @ np.logaddexp(0, -x @ w) / counts.sum() + strength / 2 * w @ w

    return optimize.minimize(loss, np.zeros(x.shape[1]), options={"gtol": 1e-8}).x


def test_the_reward_is_the_penalised_likelihoods_own(tmp_path, capsys):
    run, reference = prepared(tmp_path)
    rewarded = reward_model.run(run, reference)
    said = " ".join(capsys.readouterr().out.split())
    assert "fitted to 80 pairs with a penalty of" in said and "nats a pair, where guessing has 0.693" in said
    assert rewarded.training is not None and rewarded.training.pairs == 80
    pairs = run.corpus.pairs("train", count=80).examples
    features = of_means(run, reference, pairs)
    spread = features.reshape(160, -1).std(axis=0)
    x = (features[:, 0] - features[:, 1]) / spread
    found = linear.fit(run, reference)
    strength = run.stage("reward_model", corpus=linear.data.key(run.corpus, "train"), reference="reference").summary[
        "strength"
    ]
    weights = fitted(x, strength, np.ones(80)) / spread
    expected = features @ weights
    scores = np.asarray(rewarded.reward.score(pairs.prompts, pairs.responses))
    np.testing.assert_allclose(scores, expected, atol=2e-3 * np.abs(expected).max())
    assert found.pairs.examples.prompts.ids.shape == (80,)


def test_members_are_fitted_to_their_own_bootstrap_samples(tmp_path):
    run, reference = prepared(tmp_path, members=3)
    pairs = run.corpus.pairs("train", count=80).examples
    found = linear.fit(run, reference)
    kernel = np.asarray(found.params["params"]["heads"]["kernel"])
    features = of_means(run, reference, pairs)
    spread = features.reshape(160, -1).std(axis=0)
    counts = np.asarray(ensemble.bootstrap_weights(pairs.prompts.ids, jax.random.key(run.experiment.seed), 3))
    stage = run.stage("reward_model", corpus=linear.data.key(run.corpus, "train"), reference="reference")
    x = (features[:, 0] - features[:, 1]) / spread
    expected = [fitted(x, stage.summary["strength"], counts[:, member]) / spread for member in range(3)]
    np.testing.assert_allclose(kernel, np.stack(expected, axis=-1), atol=2e-3 * np.abs(kernel).max())
    reward = reward_model.run(run, reference).reward
    scores = np.asarray(reward.score(pairs.prompts, pairs.responses))
    np.testing.assert_allclose(scores, (features @ kernel).mean(axis=-1), atol=1e-4 * np.abs(scores).max())


def test_what_stands_behind_a_response_changes_no_feature(tmp_path):
    run, reference = prepared(tmp_path)
    pairs = run.corpus.pairs("train", count=16).examples
    before = run.models.features(reference.params, pairs.prompts, pairs.responses)
    behind = np.arange(32) >= np.asarray(pairs.responses.lengths)[..., None]
    other = Responses(np.where(behind, 7, pairs.responses.tokens), pairs.responses.lengths)
    np.testing.assert_array_equal(run.models.features(reference.params, pairs.prompts, other), before)
    np.testing.assert_allclose(before, of_means(run, reference, pairs), atol=1e-5)


def test_a_killed_fit_goes_on_and_ends_alike(tmp_path, monkeypatch):
    whole = linear.fit(*prepared(tmp_path / "whole"))
    run, reference = prepared(tmp_path / "killed")
    real, rows = assembly.reward_features, []

    def killed(models, mesh):
        features = real(models, mesh)

        def counted(params, prompts, responses):
            rows.append(len(prompts.ids))
            if len(rows) == 3:
                raise KeyboardInterrupt
            return features(params, prompts, responses)

        return counted

    monkeypatch.setattr(assembly, "reward_features", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.fit(run, reference)
    found = linear.fit(run, reference)
    assert rows == [16] * 6, "two of the five batches were there"
    assert found.stage == whole.stage
    linear.fit(run, reference)
    assert len(rows) == 6, "what is done is read"


def test_eight_devices_fit_the_same(tmp_path):
    one, eight = (linear.fit(*prepared(tmp_path / str(devices), devices)) for devices in (1, 8))
    kernels = [np.asarray(found.params["params"]["head"]["kernel"]) for found in (one, eight)]
    np.testing.assert_allclose(*kernels, atol=1e-4 * np.abs(kernels[0]).max())


def test_pairs_of_too_few_prompts_are_refused_before_anything_is_made(tmp_path):
    experiment = replace(EXPERIMENT, reward_model=RewardModel(linear=True, steps=1, batch_size=8, warmup_steps=0))
    workspace = Workspace(experiment, tmp_path / "work", tmp_path / "stages", make_mesh(1))
    with pytest.raises(InputError, match=r"have [1-8] prompts, and a linear reward \(`reward_model.linear`\) needs"):
        prepare(workspace)
