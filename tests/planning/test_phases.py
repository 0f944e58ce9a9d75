from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ctrl_jax.config import Data, Lora, Model, Policy, RewardModel, Supervised
from ctrl_jax.devices import parameters
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs, networks
from ctrl_jax.pipeline import assembly, optimizers, rollouts
from ctrl_jax.planning import memory, phases, sizes
from ctrl_jax.types import Prompts
from tests.pipeline.pretrained import CLASSIFIER
from tests.planning.models import SMALL, config_only


def test_the_step_has_the_phases_of_the_training():
    names = [phase.name for phase in phases.policy_training(phases.stages(SMALL, 1)).phases]
    assert names == [
        "sampling: prompts",
        "sampling: responses",
        "reward scores",
        "reference log-probs",
        "policy log-probs",
        "recomputation",
        "backward",
        "optimiser",
    ]


def test_the_stages_are_those_that_train_would_run(tmp_path):
    def names(experiment):
        return [stage.name for stage in phases.stages(experiment, 1)]

    all_stages = [
        "reference policy (sft)",
        "reward model",
        "calibration",
        "policy training",
        "reference evaluation",
        "policy evaluation",
    ]
    assert names(SMALL) == all_stages
    along = replace(SMALL, evaluation=replace(SMALL.evaluation, along=3, along_responses=16))
    assert names(along) == [*all_stages, "evaluation along the training"]
    *_, last, more = phases.stages(along, 1)
    alone = replace(SMALL, evaluation=replace(SMALL.evaluation, responses_per_prompt=16))
    one = phases.stages(alone, 1)[-1]
    assert last == phases.stages(SMALL, 1)[-1] and more == one._replace(name=more.name, times=3 * one.times)
    given = replace(
        SMALL,
        model=Model(path=config_only(tmp_path / "model")),
        sft=Supervised(steps=0),
        reward_model=RewardModel(function="rewards:brevity"),
    )
    assert names(given) == all_stages[2:]
    training = phases.policy_training(phases.stages(given, 1))
    assert "reward scores" not in [phase.name for phase in training.phases]
    assert "reward model" not in training.programs["update"]


def test_a_classifier_has_its_own_size(tmp_path):
    model = config_only(tmp_path / "model")
    classifier = config_only(tmp_path / "classifier", **CLASSIFIER, hidden_size=64, num_hidden_layers=4)
    experiment = replace(
        SMALL, model=Model(path=model), sft=Supervised(steps=0), reward_model=RewardModel(path=classifier)
    )
    found = sizes.sizes(experiment)
    assert found.reward.width == 64 and found.policy.width == 32
    training = phases.policy_training(phases.stages(experiment, 1))
    assert training.programs["scoring"]["reward model"] == 4 * costs.parameters(found.reward)


def test_devices_share_the_work_and_exchange_gradients():
    one, four = (phases.policy_training(phases.stages(SMALL, devices)) for devices in (1, 4))
    for phase, share in zip(one.phases, four.phases, strict=True):
        # The optimiser's work is everyone's: parameters are replicated.
        assert share.work.flops == pytest.approx(phase.work.flops / 4)
        assert (phase.sent, share.sent) == (0, 0) or phase.name == "optimiser"
    # A ring all-reduce sends 2 (n − 1) / n of float32 gradients.
    parameters = costs.parameters(sizes.sizes(SMALL).policy)
    assert four.phases[-1].sent == pytest.approx(2 * 3 / 4 * 4 * parameters)
    assert four.programs["update"]["moments"] == 4 * parameters


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (optimizers.supervised(Supervised()), memory.SUPERVISED_MOMENTS),
        (optimizers.policy(Policy()), memory.POLICY_MOMENTS),
    ],
)
def test_the_moments_are_what_the_optimisers_keep(optimizer, moments):
    kept = jax.eval_shape(optimizer.init, jnp.zeros(7))
    assert sum(leaf.shape == (7,) for leaf in jax.tree.leaves(kept)) == moments


def test_an_adapter_is_trained_alone(large):
    adapted = replace(large, model=replace(large.model, lora=Lora(rank=8), dtype="bfloat16"))
    memory = phases.policy_training(phases.stages(adapted, 1)).programs["update"]
    found = sizes.sizes(adapted)
    assert memory["moments"] == 4 * costs.adapter_parameters(found.policy, adapted.model.lora)
    assert memory["reference"] == 2 * costs.parameters(found.policy)
    # Of which all of the float32 parts together are less than a tenth.
    assert memory["policy, float32"] + memory["moments"] < 0.1 * memory["reference"]


def test_micro_batches_hold_a_slice_and_one_more_copy_of_the_gradient(large):
    def update(micro_batches):
        given = replace(large, policy=replace(large.policy, micro_batches=micro_batches))
        return phases.policy_training(phases.stages(given, 1)).programs["update"]

    trained = costs.parameters(sizes.sizes(large).policy)
    whole, quarter, left_out = update(1), update(4), update(None)
    assert quarter["activations"] == pytest.approx(whole["activations"] / 4)
    assert quarter["gradients and updates"] - whole["gradients and updates"] == 4 * trained
    assert whole["activations"] > 2**32 > 2**31 >= left_out["activations"]


def test_model_flops_leave_out_what_is_computed_twice():
    plain = phases.policy_training(phases.stages(SMALL, 1))
    again = phases.policy_training(phases.stages(replace(SMALL, model=replace(SMALL.model, rematerialize=True)), 1))
    assert phases.model_flops(again) == phases.model_flops(plain)
    assert sum(phase.work.flops for phase in again.phases) > sum(phase.work.flops for phase in plain.phases)


def test_a_context_that_is_too_short_is_told_as_in_training(tmp_path):
    path = config_only(tmp_path / "model", max_position_embeddings=32)
    with pytest.raises(InputError, match="max_position_embeddings"):
        phases.stages(replace(SMALL, model=Model(path=path), sft=Supervised(steps=0)), 1)


def test_policy_batches_are_those_of_the_configuration():
    experiment = replace(SMALL, policy=Policy(prompts_per_step=32, samples_per_prompt=8))
    half = replace(experiment, policy=replace(experiment.policy, prompts_per_step=16))
    whole, less = (phases.policy_training(phases.stages(one, 1)) for one in (experiment, half))
    assert less.programs["decoding"]["caches"] == whole.programs["decoding"]["caches"] / 2


@pytest.mark.parametrize("shape", [(4, 16, 256, 16), (2, 8, 512, 16), (16, 8, 256, 64), (8, 16, 32, 32)])
def test_memory_of_sampling_is_about_xlas(shape):
    """With a prefill that takes more than the decoding, and less; with tails that copy prompts, and without."""
    batch = costs.Batch(*shape)
    model = Model(width=64, layers=3, heads=4, kv_heads=2, mlp_width=128).architecture(512)
    parts = networks.create(model, Lora())
    prompts = Prompts(
        jax.ShapeDtypeStruct((batch.prompts, batch.prompt_length), jnp.int32),
        *[jax.ShapeDtypeStruct((batch.prompts,), jnp.int32)] * 2,
    )
    params = jax.eval_shape(lambda: parameters.init_decoder(parts, make_mesh(1), jax.random.key(0)))
    sample = assembly.sampler(
        parts, make_mesh(1), num_samples=batch.samples, max_length=batch.response_length, eos_ids=(0,), temperature=1.0
    )
    held = sample.lower(params, prompts, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes
    _, programs = phases._sampling(sizes.Sizes(model, Lora(), None, Lora(), 0, None), batch)
    assert 0.9 * held < max(sum(memory.values()) for memory in programs.values()) < 1.5 * held


@pytest.mark.parametrize(("samples", "prompt_length"), [(128, 24), (2, 512), (4096, 8)])
def test_prompts_at_a_time_are_as_many_as_their_caches_and_logits_allow(monkeypatch, samples, prompt_length):
    model = Model(width=64, layers=3, heads=4, kv_heads=2, mlp_width=128).architecture(512)
    data = Data(prompt_length=prompt_length, response_length=16)
    monkeypatch.setattr(rollouts, "BYTES", 2**23)

    def held(prompts):
        batch = costs.Batch(prompts, samples, prompt_length, 16)
        caches = costs.prompt_cache(model, batch) + costs.response_cache(model, batch)
        return caches + costs.logits(model, batch.responses, copies=4)

    most = rollouts.prompts_at_a_time(model, data, samples)
    assert most == 1 or (held(most) <= 2**23 and most * samples <= rollouts.ROWS)
    assert held(most + 1) > 2**23 or (most + 1) * samples > rollouts.ROWS
