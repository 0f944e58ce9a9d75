"""A run draws and measures at the experiment's temperature, and each stage on its own: a tiny network, no fakes."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.models import networks
from ctrl_jax.pipeline import evaluate, rollouts
from ctrl_jax.pipeline.run import Run
from ctrl_jax.types import Prompts, Responses

B, N, P, T, V, EOS, TEMPERATURE = 3, 4, 5, 6, 24, 1, 0.5
MODEL = config.Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16)


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture
def run(tmp_path):
    experiment = config.Experiment(
        "any", model=MODEL, data=config.Data(prompt_length=P, response_length=T),
        policy=config.Policy(temperature=TEMPERATURE),
    )  # fmt: skip
    corpus: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocabulary_size=V, eos_ids=(EOS,)))
    models = networks.create(MODEL.architecture(V), MODEL.lora)
    places = {"work_dir": tmp_path / "work", "stages_dir": tmp_path / "stages"}
    return Run(experiment=experiment, **places, mesh=make_mesh(1), corpus=corpus, models=models, fingerprints={})


def prompts() -> Prompts:
    tokens = np.random.default_rng(0).integers(2, V, (B, P)).astype(np.int32)
    return Prompts(tokens, np.array([5, 2, 3], np.int32), np.arange(B, dtype=np.uint32))


def params(run: Run, seed: int):
    """Of a network whose next-token laws are far from uniform."""
    responses = Responses(np.zeros((B, 1, T), np.int32), np.ones((B, 1), np.int32))
    variables = jax.jit(run.models.decoder.init)(jax.random.key(seed), prompts(), responses)
    return {"params": jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, variables["params"])}


def laws(run: Run, params, responses: Responses) -> np.ndarray:
    """[B, N, T, V] log softmax(logits / temperature), by the definition."""
    policy = run.models.policy
    logits = np.asarray(policy.unembed(params, policy.apply(params, prompts(), responses)), np.float64) / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def drawn(run: Run, stage: str, params):
    sampled, rewards = rollouts.respond(run, stage, params, lambda _, responses: responses.lengths, prompts(), N)
    np.testing.assert_array_equal(rewards, sampled.responses.lengths)
    return sampled


def real(responses: Responses) -> np.ndarray:
    return np.arange(T) < np.asarray(responses.lengths)[..., None]


def test_log_probs_of_responses_are_of_the_law_at_the_experiments_temperature(run):
    policy = params(run, 1)
    sampled = drawn(run, "policy responses", policy)
    law = laws(run, policy, sampled.responses)
    chosen = np.take_along_axis(law, np.asarray(sampled.responses.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampled.log_probs, np.where(real(sampled.responses), chosen, 0), atol=1e-4)


def test_every_stage_draws_its_own_responses(run):
    policy = params(run, 1)
    first, again, other = (drawn(run, f"{side} responses", policy) for side in ("policy", "policy", "reference"))
    np.testing.assert_array_equal(first.responses.tokens, again.responses.tokens)
    assert (first.responses.tokens != other.responses.tokens).any(axis=(1, 2)).all()


def test_the_kl_of_an_evaluation_is_the_policys_to_the_reference_by_prompt(run):
    policy, reference = params(run, 1), params(run, 2)
    sampled = drawn(run, "policy responses", policy)
    ours, theirs = laws(run, policy, sampled.responses), laws(run, reference, sampled.responses)
    per_token = (np.exp(ours) * (ours - theirs)).sum(axis=-1)
    expected = np.where(real(sampled.responses), per_token, 0).sum(axis=-1).mean(axis=1)
    aligned = SimpleNamespace(policy=policy, reference=SimpleNamespace(params=reference))
    np.testing.assert_allclose(evaluate._kl_by_prompt(run, aligned, sampled), expected, rtol=1e-4)
