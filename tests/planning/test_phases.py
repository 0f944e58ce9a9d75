import dataclasses
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ctrl_jax.config import (
    ActorCritic,
    Calibration,
    Data,
    Dpo,
    Experiment,
    Lora,
    Model,
    Policy,
    PpoClip,
    Regression,
    RewardModel,
    Supervised,
    Validation,
)
from ctrl_jax.devices import parameters
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs, networks
from ctrl_jax.pipeline import assembly, optimizers, rollouts
from ctrl_jax.pipeline.stages import made_by
from ctrl_jax.planning import memory, phases, sizes
from ctrl_jax.types import Prompts
from tests.pipeline import fakes
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


# By kind of experiment: one of tests/pipeline/fakes.py, and what is changed about it.
KINDS = {
    "a model and a reward that are trained": ("trained", {}),
    "a pretrained model and a classifier": ("classifier", {}),
    "a pretrained model, fine-tuned, and a function": ("function", {}),
    "a judge that is a function": ("function", {"judge": "rewards:reward_too"}),
    "a judge that is a network": ("function", {"judge": "classifier"}),
    "several updates a batch": ("function", {"policy": PpoClip}),
    "preference pairs": ("trained", {"policy": Dpo}),
    "a critic": ("trained", {"policy": ActorCritic}),
}


def test_points_along_the_training_cost_an_evaluation_each_without_a_judge():
    def evaluation(**options):
        return replace(SMALL, evaluation=replace(SMALL.evaluation, **options))

    *before, along = phases.stages(evaluation(along=3, along_responses=16), 1)
    assert before == phases.stages(SMALL, 1)
    alone = phases.stages(evaluation(responses_per_prompt=16), 1)[-1]
    assert along == alone._replace(name="along", times=3 * alone.times)
    assert phases.stages(evaluation(along=2), 1)[-1].times == 2 * before[-1].times


def kind_of(base, *, judge=None, policy=Policy):
    experiment = fakes.EXPERIMENTS[base]
    given = {field.name: getattr(experiment.policy, field.name) for field in dataclasses.fields(Policy)}
    if policy is Dpo:
        given = {name: value for name, value in given.items() if name not in ("transform", "beta")}
    evaluation = replace(experiment.evaluation, judge=judge)
    return replace(experiment, policy=policy(**given), evaluation=evaluation)


def made_on_disk(work_dir):
    """The stages that are done, by what is on disk."""
    shared = {path.parent.name.rpartition("-")[0] for path in Path("runs/stages").glob("*/stage.json")}
    own = {"policy": "checkpoints", "evaluation": "results.json"}
    return shared | {stage for stage, file in own.items() if (Path(work_dir) / file).exists()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_are_those_that_a_run_makes(kind, fakes_of_runs, tmp_path, monkeypatch):
    base, changes = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    fakes.write_inputs(tmp_path)
    experiment = kind_of(base, **changes)
    fakes.train(fakes_of_runs, experiment)
    in_table = made_by(experiment)
    assert made_on_disk("runs/work") == {*in_table}
    planned = phases.stages(experiment, 1)
    by_functions = {"reference_judge"} if changes.get("judge") == "rewards:reward_too" else set()
    assert [stage.name for stage in planned] == [name for name in in_table if name not in {"data", *by_functions}]
    training = phases.policy_training(planned)
    scored = any(phase.name == "reward scores" for phase in training.phases)
    assert scored == (base != "function" and changes.get("policy") is not Dpo)
    assert ("reward model" in training.programs["update"]) == (base != "function")


def test_pairs_are_learned_from_without_a_sample():
    experiment = Experiment("pairs", policy=Dpo(prompts_per_step=16))
    training = phases.policy_training(phases.stages(experiment, 2))
    assert [*training.programs] == ["update"] and {phase.program for phase in training.phases} == {"update"}
    assert training.phases[0].name == "reference log-probs"
    # The reference reads 8 prompts, and two responses each.
    found, batch = sizes.sizes(experiment), costs.Batch(8, 2, experiment.data.prompt_length, 36)
    layers = costs.forward(found.policy, Lora(), batch, length=35).flops
    assert training.phases[0].work.flops == layers + costs.unembed(found.policy, 8 * 2 * 36).flops


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (1, 4), (2, 4)])
def test_several_updates_a_batch_cost_an_epoch_each_and_read_the_weights_each(epochs, minibatches):
    """A phase's work is (a + b B) for B prompts: E epochs of M updates by B / M cost E (M a + b B)."""

    def update(prompts, devices, policy=Policy, **options):
        experiment = replace(SMALL, policy=policy(prompts_per_step=prompts, micro_batches=1, **options))
        found = phases.policy_training(phases.stages(experiment, devices)).phases
        return {phase.name: phase for phase in found}

    several = update(32, 2, PpoClip, epochs=epochs, minibatches=minibatches)
    one, half = update(32, 2), update(16, 2)
    for name, phase in several.items():
        whole, less = one[name], half[name]
        if phase.program != "update":
            assert phase == whole  # responses are drawn and scored once
            continue
        assert phase.work.flops == pytest.approx(epochs * whole.work.flops)
        fixed = 2 * less.work.moved - whole.work.moved
        expected = epochs * (minibatches * fixed + whole.work.moved - fixed)
        # The output projection is read once a chunk of tokens, and the chunks of a part are rounded up.
        assert phase.work.moved == pytest.approx(expected, rel=0.01)
        assert phase.sent == epochs * minibatches * whole.sent
    assert several["optimiser"].work.moved == epochs * minibatches * one["optimiser"].work.moved
    assert several["optimiser"].sent > 0


def test_a_minibatch_has_a_share_of_the_activations(large):
    def held(policy, **options):
        given = replace(large, policy=policy(prompts_per_step=32, micro_batches=1, **options))
        return phases.policy_training(phases.stages(given, 1)).programs["update"]

    whole, several = held(Policy), held(PpoClip, epochs=2, minibatches=4)
    assert several["activations"] == pytest.approx(whole["activations"] / 4)
    # Where an update is not finite, the state before the first of them stays: what is trained, and a moment of each.
    more = {name: size for name, size in several.items() if name not in whole}
    assert [*more.values()] == [2 * 4 * costs.parameters(sizes.sizes(large).policy)]


def test_the_policy_lives_on_without_its_moments_while_it_is_evaluated(tmp_path):
    judge = config_only(tmp_path / "judge", **CLASSIFIER, hidden_size=64, num_hidden_layers=4)
    experiment = replace(SMALL, evaluation=replace(SMALL.evaluation, judge=judge))
    made = {stage.name: stage for stage in phases.stages(experiment, 1)}
    found = sizes.sizes(experiment)
    for name, lives in (("calibration", False), ("reference_evaluation", True), ("evaluation", True)):
        for held in made[name].programs.values():
            assert held.get("policy, float32", 0) == lives * 4 * costs.parameters(found.policy)
            assert held.get("judge", 0) == lives * 4 * costs.parameters(found.judge)
            assert "moments" not in held
    [judging] = made["reference_judge"].phases
    assert judging in made["evaluation"].phases
    batch = costs.Batch(32, 64, 20, 36)  # 2048 responses at a time
    assert judging.work == costs.forward(found.judge, Lora(), batch, length=36)
    assert made["reference_judge"].times == made["evaluation"].times == 8


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


def test_a_validation_keeps_a_copy_of_the_best():
    def held(options: RewardModel) -> memory.Memory:
        made = phases.stages(replace(SMALL, reward_model=options), 1)
        return next(stage for stage in made if stage.name == "reward_model").programs["update"]

    with_one = held(replace(SMALL.reward_model, validation=Validation(every=5)))
    without = held(SMALL.reward_model)
    assert with_one.pop("best so far, float32") == with_one["trained, float32"] == without["trained, float32"]
    assert with_one == without


def test_an_adapter_is_trained_alone(large):
    adapted = replace(large, model=replace(large.model, lora=Lora(rank=8), dtype="bfloat16"))
    memory = phases.policy_training(phases.stages(adapted, 1)).programs["update"]
    found = sizes.sizes(adapted)
    assert memory["moments"] == 4 * costs.adapter_parameters(found.policy, adapted.model.lora)
    assert memory["reference"] == 2 * costs.parameters(found.policy)
    # Of which all of the float32 parts together are less than a tenth.
    assert memory["policy, float32"] + memory["moments"] < 0.1 * memory["reference"]


def test_layers_without_an_adapter_are_read_once_and_have_no_backward_pass(large):
    def training(last_layers):
        model = replace(large.model, lora=Lora(rank=8, last_layers=last_layers))
        training = phases.policy_training(phases.stages(replace(large, model=model), 1))
        return {phase.name: phase.parts[0].flops for phase in training.phases}, training.programs["update"]

    (whole, memory), (flops, less) = training(None), training(4)
    # Of 16 layers 12 are read once, and 4 by both networks.
    assert "layers that are not trained" not in whole
    assert flops["layers that are not trained"] == pytest.approx(12 / 16 * whole["reference log-probs"])
    for name in ("reference log-probs", "policy log-probs", "backward"):
        assert flops[name] == pytest.approx(4 / 16 * whole[name]), name
    assert less["moments"] == 4 / 16 * memory["moments"]
    # Activations of the layers that have a gradient, of one more for the gradient itself, and both networks' features.
    found, batch = sizes.sizes(large).policy, phases.policy_batch(large, 1)
    features = 2 * 4 * found.width * batch.responses * batch.response_length
    assert less["activations"] - features == pytest.approx(5 / 17 * (memory["activations"] - features))


def test_a_slice_is_larger_where_fewer_layers_keep_activations(large):
    found = replace(sizes.sizes(large), lora=Lora(rank=8), device_memory=2**34)
    batch = phases.policy_batch(large, 1)
    last = replace(found, lora=Lora(rank=8, last_layers=2))
    assert memory.micro_batches(None, last, batch, False) < memory.micro_batches(None, found, batch, False)


def test_more_adapted_layers_than_there_are_are_refused(tmp_path):
    model = Model(path=config_only(tmp_path / "model"), lora=Lora(rank=2, last_layers=3))
    with pytest.raises(InputError, match="last_layers is 3, and the model has 2 layers") as caught:
        phases.stages(replace(SMALL, model=model, sft=Supervised(steps=0)), 1)
    assert caught.value.field == "model.lora.last_layers"


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
    _, programs = phases._sampling(sizes.Sizes(model, Lora(), None, Lora(), 0, None, None), batch)
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


def test_stored_responses_are_learned_from_without_drawing_or_the_reference():
    """A start is a stage of its own; alone, it is the policy's training."""
    kept = replace(SMALL, calibration=Calibration(keep_responses=True))
    plain = phases.stages(SMALL, 1)
    begun = phases.stages(replace(kept, start=Regression(samples_per_prompt=16)), 1)
    names = [stage.name for stage in plain]
    assert [stage.name for stage in begun] == [*names[:3], "start", *names[3:]]
    alone = phases.policy_training(phases.stages(replace(kept, policy=Regression()), 1))
    for stage in (begun[3], alone):
        assert [phase.name for phase in stage.phases] == ["policy log-probs", "recomputation", "backward", "optimiser"]
        assert (stage.times, list(stage.programs)) == (Regression().steps, ["update"])
    assert [phase.name for phase in begun[2].phases] == [*(phase.name for phase in plain[2].phases), "log-probs"]
