import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.config import Data, Dpo, Experiment, Lora, Model, Policy, RewardModel, Supervised
from ctrl_jax.devices import parameters
from ctrl_jax.devices.accelerators import KINDS, Accelerator
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs, networks
from ctrl_jax.models.costs import Work
from ctrl_jax.pipeline import assembly, optimizers, rollouts
from ctrl_jax.planning import plan
from ctrl_jax.types import Prompts
from tests.pipeline.pretrained import CLASSIFIER, CONFIG

ROOT = Path(__file__).parents[2]
SMALL = Experiment(name="small")
# A round device: 1 FLOP and 1 byte a microsecond.
DEVICE = Accelerator("round", 1e6, 1e6, 1e6, 1e6, 1e3)
FULL = plan.Efficiency(1.0, 1.0)


def config_only(folder, **changes):
    """A model directory as it is before its weights are fetched."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


@pytest.fixture
def large(tmp_path):
    """A model of 1.2 billion parameters, trained whole, on whole batches."""
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    path = config_only(tmp_path / "large", vocab_size=128_000, num_key_value_heads=8, **sizes)
    return replace(SMALL, model=Model(path=path), sft=Supervised(steps=0), policy=Policy(micro_batches=1))


def planned(capsys, *arguments, experiment="smoke"):
    command_line.main(["plan", experiment, *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_part_takes_the_longer_of_its_two_times():
    phases = (plan.Phase("a", (Work(3e6, 1e6), Work(1e6, 5e6))), plan.Phase("b", (Work(0, 0),), sent=2e3))
    expected = plan.expect(phases, DEVICE, "float32", FULL)
    assert (expected.compute, expected.bandwidth, expected.interconnect) == (3, 5, 2)
    assert (expected.seconds, expected.limit) == (10, "memory bandwidth")
    assert plan.expect(phases[:1], DEVICE, "float32", plan.Efficiency(0.5, 1.0)).compute == 6
    assert plan.expect(phases[1:], DEVICE, "float32", FULL).limit == "interconnect"


def test_the_step_has_the_phases_of_the_training():
    names = [phase.name for phase in plan.policy_training(plan.stages(SMALL, 1)).phases]
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
        return [stage.name for stage in plan.stages(experiment, 1)]

    all_stages = [
        "reference policy (sft)",
        "reward model",
        "calibration",
        "policy training",
        "reference evaluation",
        "policy evaluation",
    ]
    assert names(SMALL) == all_stages
    given = replace(
        SMALL,
        model=Model(path=config_only(tmp_path / "model")),
        sft=Supervised(steps=0),
        reward_model=RewardModel(function="rewards:brevity"),
    )
    assert names(given) == all_stages[2:]
    training = plan.policy_training(plan.stages(given, 1))
    assert "reward scores" not in [phase.name for phase in training.phases]
    assert "reward model" not in training.programs["update"]


def test_a_classifier_has_its_own_size(tmp_path):
    model = config_only(tmp_path / "model")
    classifier = config_only(tmp_path / "classifier", **CLASSIFIER, hidden_size=64, num_hidden_layers=4)
    experiment = replace(
        SMALL, model=Model(path=model), sft=Supervised(steps=0), reward_model=RewardModel(path=classifier)
    )
    found = plan.sizes(experiment)
    assert found.reward.width == 64 and found.policy.width == 32
    training = plan.policy_training(plan.stages(experiment, 1))
    assert training.programs["scoring"]["reward model"] == 4 * costs.parameters(found.reward)


def test_devices_share_the_work_and_exchange_gradients():
    one, four = (plan.policy_training(plan.stages(SMALL, devices)) for devices in (1, 4))
    for phase, share in zip(one.phases, four.phases, strict=True):
        # The optimiser's work is everyone's: parameters are replicated.
        assert share.work.flops == pytest.approx(phase.work.flops / 4)
        assert (phase.sent, share.sent) == (0, 0) or phase.name == "optimiser"
    # A ring all-reduce sends 2 (n − 1) / n of float32 gradients.
    parameters = costs.parameters(plan.sizes(SMALL).policy)
    assert four.phases[-1].sent == pytest.approx(2 * 3 / 4 * 4 * parameters)
    assert four.programs["update"]["moments"] == 4 * parameters


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (optimizers.supervised(Supervised()), plan.SUPERVISED_MOMENTS),
        (optimizers.policy(Policy()), plan.POLICY_MOMENTS),
    ],
)
def test_the_moments_are_what_the_optimisers_keep(optimizer, moments):
    kept = jax.eval_shape(optimizer.init, jnp.zeros(7))
    assert sum(leaf.shape == (7,) for leaf in jax.tree.leaves(kept)) == moments


def test_an_adapter_is_trained_alone(large):
    adapted = replace(large, model=replace(large.model, lora=Lora(rank=8), dtype="bfloat16"))
    memory = plan.policy_training(plan.stages(adapted, 1)).programs["update"]
    found = plan.sizes(adapted)
    assert memory["moments"] == 4 * costs.adapter_parameters(found.policy, adapted.model.lora)
    assert memory["reference"] == 2 * costs.parameters(found.policy)
    # Of which all of the float32 parts together are less than a tenth.
    assert memory["policy, float32"] + memory["moments"] < 0.1 * memory["reference"]


def test_micro_batches_hold_a_slice_and_one_more_copy_of_the_gradient(large):
    def update(micro_batches):
        given = replace(large, policy=replace(large.policy, micro_batches=micro_batches))
        return plan.policy_training(plan.stages(given, 1)).programs["update"]

    trained = costs.parameters(plan.sizes(large).policy)
    whole, quarter, left_out = update(1), update(4), update(None)
    assert quarter["activations"] == pytest.approx(whole["activations"] / 4)
    assert quarter["gradients and updates"] - whole["gradients and updates"] == 4 * trained
    assert whole["activations"] > 2**32 > 2**31 >= left_out["activations"]


def test_model_flops_leave_out_what_is_computed_twice():
    plain = plan.policy_training(plan.stages(SMALL, 1))
    again = plan.policy_training(plan.stages(replace(SMALL, model=replace(SMALL.model, rematerialize=True)), 1))
    assert plan.model_flops(again) == plan.model_flops(plain)
    assert sum(phase.work.flops for phase in again.phases) > sum(phase.work.flops for phase in plain.phases)


def applied(experiment, remedy):
    """The experiment and devices that a remedy's options ask for, as the command line reads them."""
    arguments = shlex.split(remedy.options)
    options = tyro.cli(plan.Options, default=plan.Options(experiment), args=arguments)
    return options.experiment, options.devices


def test_remedies_are_options_that_do_make_it_fit(large):
    stage = "policy training"
    needed = plan.peak(plan.policy_training(plan.stages(large, 1)))
    capacity = 0.7 * needed
    found = plan.remedies(large, 1, capacity, stage)
    assert {remedy.options.split()[0] for remedy in found} >= {"--model.rematerialize", "--policy.prompts-per-step"}
    for remedy in found:
        experiment, devices = applied(large, remedy)
        held = plan.peak(plan.policy_training(plan.stages(experiment, devices)))
        assert held == remedy.held <= capacity
    # The mildest: twice as many prompts would not fit.
    [batch] = [applied(large, remedy)[0] for remedy in found if "per-step" in remedy.options]
    twice = replace(batch, policy=replace(batch.policy, prompts_per_step=2 * batch.policy.prompts_per_step))
    assert plan.peak(plan.policy_training(plan.stages(twice, 1))) > capacity


def test_where_no_change_helps_alone_they_are_put_together(large):
    # Its float32 reference, policy, moments and reward model alone are 4 × 4 bytes a parameter.
    capacity = 8.0 * costs.parameters(plan.sizes(large).policy)
    [together] = plan.remedies(large, 1, capacity, "policy training")
    assert together.options.count("--") > 1
    experiment, devices = applied(large, together)
    assert plan.peak(plan.policy_training(plan.stages(experiment, devices))) == together.held <= capacity
    # The plan splits no parameters: less than their bfloat16 copy is never enough.
    assert plan.remedies(large, 1, capacity / 8, "policy training") == []


def test_json(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = planned(capsys, "--devices", "4", "--device-kind", "v5e")
    training = found["stages"]["policy training"]
    assert found["device"]["kind"] == "v5e" and found["devices"] == 4
    assert training["times"] == 10
    assert training["seconds"] == pytest.approx(sum(phase["seconds"] for phase in training["phases"].values()))
    assert training["fits"] and found["remedies"] == {}
    fast = planned(capsys, "--devices", "4", "--device-kind", "v5e", "--efficiency.bandwidth", "0.4")
    slowest = {phase["limit"] for phase in fast["stages"]["policy training"]["phases"].values()}
    assert slowest <= {"memory bandwidth", "interconnect"}  # smoke is too small for anything else
    assert fast["stages"]["policy training"]["seconds"] == pytest.approx(2 * training["seconds"])


def test_the_tables_say_what_does_not_fit_and_what_would(large, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert plan.run(plan.Options(large, device_kind="v5e")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("policy training does not fit", "--model.lora.rank 16", "does not fit", "0.5 of the peak", "v5e"):
        assert text in printed


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda file: file.stem)
def test_every_experiment_can_be_planned(file, tmp_path):
    experiment = load_experiment(str(file)).experiment()
    if experiment.model.path is not None:
        path = config_only(tmp_path / "model", max_position_embeddings=4096)
        experiment = replace(experiment, model=replace(experiment.model, path=path))
    options = plan.Options(experiment, device_kind="H100", devices=2)
    found = plan.as_json(options, plan.stages(experiment, 2), KINDS["H100"])
    assert all(stage["seconds"] > 0 and math.isfinite(stage["seconds"]) for stage in found["stages"].values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(device_kind="v9"), "'v9'"),
        (dict(device_kind="v5e", devices=0), "--devices is 0"),
        (dict(devices=2), "measured of this whole machine"),
        (dict(device_kind="v5e", devices=24), "do not divide by the 24 devices. Give --sft.batch-size 72"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(InputError, match=told):
        plan.run(plan.Options(SMALL, **options))


def test_bad_efficiency_and_missing_model():
    with pytest.raises(InputError, match=r"--efficiency\.matmul is 2"):
        plan.Efficiency(matmul=2)
    missing = replace(SMALL, model=Model(path="nowhere"), sft=Supervised(steps=0))
    with pytest.raises(InputError, match=r"nowhere.config\.json is missing"):
        plan.run(plan.Options(missing, device_kind="v5e"))


def test_a_context_that_is_too_short_is_told_as_in_training(tmp_path):
    path = config_only(tmp_path / "model", max_position_embeddings=32)
    with pytest.raises(InputError, match="max_position_embeddings"):
        plan.stages(replace(SMALL, model=Model(path=path), sft=Supervised(steps=0)), 1)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (5, "B", "5 B"),
        (999, "B", "999 B"),
        (999.9, "B", "1 kB"),
        (1234, "", "1.23 k"),
        (123_456_789, "B", "123 MB"),
        (1e21, "", "1000 E"),
    ],
)
def test_quantities(value, unit, text):
    assert plan.quantity(value, unit) == text


def test_policy_batches_are_those_of_the_configuration():
    experiment = replace(SMALL, policy=Policy(prompts_per_step=32, samples_per_prompt=8))
    half = replace(experiment, policy=replace(experiment.policy, prompts_per_step=16))
    whole, less = (plan.policy_training(plan.stages(one, 1)) for one in (experiment, half))
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
    _, programs = plan._sampling(plan.Sizes(model, Lora(), None, Lora(), 0, None), batch)
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


def test_an_algorithm_that_samples_nothing_is_refused():
    experiment = Experiment("pairs", policy=Dpo())
    with pytest.raises(InputError, match=r"`plan` takes .* Dpo samples nothing"):
        plan.run(plan.Options(experiment, device_kind="H100"))
