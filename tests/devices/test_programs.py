"""The mapped steps: any mesh computes what one device does, each step compiles once, and β starts at the budget."""

import collections
import dataclasses
import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from ctrl_jax import config
from ctrl_jax.devices import parameters, programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.models import costs, lora, networks
from ctrl_jax.pipeline import assembly, optimizers
from ctrl_jax.rewards.reward import scorer
from ctrl_jax.steps import kl_budget
from ctrl_jax.types import Examples, Experience, PolicyBatch, Prompts, Responses, Rollouts

VOCABULARY, P, T, EOS = 24, 5, 6, 1
GUARDED = ("raw_reward", "kl", "loss", "gradient_norm")
# All sizes divide by 8, but not the heads of keys and values.
MODEL = config.Model(width=32, layers=1, heads=8, kv_heads=2, mlp_width=8, tied_embeddings=False)
SIZES = dataclasses.replace(MODEL.architecture(VOCABULARY), qkv_bias=True, output_bias=True)
WHOLE, ADAPTED = networks.create(SIZES, config.Lora()), networks.create(SIZES, config.Lora(rank=2, alpha=4.0))
# Of two layers, the second of which is trained: read in two parts, and as a whole.
DEEP = dataclasses.replace(SIZES, layers=2 * SIZES.layers)
LAST = networks.create(DEEP, config.Lora(rank=2, alpha=4.0, last_layers=1))
LAST_AS_A_WHOLE = LAST._replace(policy=networks.create(DEEP, config.Lora(rank=2, alpha=4.0)).policy)
POLICY = config.Policy(steps=50, warmup_steps=0, samples_per_prompt=4, prompts_per_step=8, learning_rate=0.01)
SUPERVISED = config.Supervised(steps=50, warmup_steps=0, learning_rate=0.01, batch_size=8)


pytestmark = pytest.mark.usefixtures("compile_fast")


AXES = {1: (1, 1, 1), 8: (8, 1, 1), "4,2,1": (4, 2, 1), "2,2,2": (2, 2, 2), "1,1,8": (1, 1, 8)}
"""Meshes: devices along data, fsdp and model."""
SPLIT = ["4,2,1", "2,2,2", "1,1,8"]
"""Those on which parameters are split."""


@functools.cache
def mesh_of(axes: int | str) -> Mesh:
    data, fsdp, model = AXES[axes]
    return make_mesh(data * fsdp * model, fsdp=fsdp, model=model)


def examples(samples: int, seed: int = 0, size: int = 8) -> Examples:
    """Prompts and responses of all lengths, so that no device has the mean of the others."""
    rng = np.random.default_rng(seed)
    prompts = Prompts(
        rng.integers(2, VOCABULARY, (size, P)).astype(np.int32),
        (1 + np.arange(size) % P).astype(np.int32),
        np.arange(100, 100 + size, dtype=np.uint32),
    )
    lengths = (1 + (np.arange(size)[:, None] + np.arange(samples)[None]) % T).astype(np.int32)
    return Examples(prompts, Responses(rng.integers(2, VOCABULARY, (size, samples, T)).astype(np.int32), lengths))


@functools.cache
def params(mesh: Mesh):
    """A policy, a reference that differs from it, and a reward model that tells responses apart."""
    key = jax.random.key(0)
    policy, reference = (parameters.init_decoder(WHOLE, mesh, jax.random.fold_in(key, i)) for i in range(2))
    _, reward = parameters.adapt_reward(WHOLE, mesh, jax.random.fold_in(key, 2), policy)
    head = jax.random.normal(jax.random.fold_in(key, 3), (SIZES.width, 1))
    return policy, reference, lora.overlay(reward, {"params": {"head": {"kernel": replicate(mesh, head)}}})


def moved(trained, mesh: Mesh):
    """Adapters that have left their start, where B is 0 and half of the gradient with it."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x) + 0.1, x.sharding), trained)


def sft(mesh: Mesh):
    optimizer = optimizers.supervised(SUPERVISED)
    step = assembly.sft_step(WHOLE, mesh, optimizer)
    return step, programs.init_state(params(mesh)[0], optimizer, mesh), lambda i: ({}, shard(mesh, examples(1, i)))


def sft_of_adapters(mesh: Mesh):
    optimizer = optimizers.supervised(SUPERVISED)
    step = assembly.sft_step(ADAPTED, mesh, optimizer)
    base = params(mesh)[0]
    trained = moved(parameters.adapt_decoder(ADAPTED, mesh, jax.random.key(7), base), mesh)
    return step, programs.init_state(trained, optimizer, mesh), lambda i: (base, shard(mesh, examples(1, i)))


def reward_model(mesh: Mesh):
    optimizer = optimizers.supervised(SUPERVISED)
    step = assembly.reward_model_step(WHOLE, mesh, optimizer)
    return step, programs.init_state(params(mesh)[2], optimizer, mesh), lambda i: ({}, shard(mesh, examples(2, i)))


def reward_model_of_adapters(mesh: Mesh):
    optimizer = optimizers.supervised(SUPERVISED)
    step = assembly.reward_model_step(ADAPTED, mesh, optimizer)
    frozen, trained = parameters.adapt_reward(ADAPTED, mesh, jax.random.key(7), params(mesh)[0])
    state = programs.init_state(moved(trained, mesh), optimizer, mesh)
    return step, state, lambda i: (frozen, shard(mesh, examples(2, i)))


def policy(mesh: Mesh, beta: float | None = None, parts: networks.Networks = WHOLE, options: config.Policy = POLICY):
    start, reference, reward = params(mesh)
    optimizer = optimizers.policy(POLICY)
    given = dataclasses.replace(options, beta=beta)
    score = scorer(WHOLE, mesh)
    algorithm = assembly.algorithm(parts, mesh, given, beta=beta or 0.2, num_references=16, eos_ids=(EOS,))
    step = assembly.policy_step(
        parts, mesh, given, algorithm, optimizer, lambda *batch: score(reward, *batch),
        key=jax.random.key(5), max_length=T, eos_ids=(EOS,),
    )  # fmt: skip
    if parts is not WHOLE:
        reference, start = adapted(parts, mesh)
    state = programs.init_state(start, optimizer, mesh, algorithm.start())
    rewards = np.sort(np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32), axis=-1)
    return step, state, lambda i: (reference, shard(mesh, PolicyBatch(examples(1, i).prompts, rewards)))


def adapted(parts: networks.Networks, mesh: Mesh):
    """A reference, and adapters of it that have left their start."""
    reference = params(mesh)[1]
    if parts.architecture is DEEP:
        reference = parameters.init_decoder(parts, mesh, jax.random.key(9))
    return reference, moved(parameters.adapt_decoder(parts, mesh, jax.random.key(7), reference), mesh)


def policy_of_adapters(mesh: Mesh):
    return policy(mesh, parts=ADAPTED)


def policy_of_last_layers(mesh: Mesh):
    return policy(mesh, parts=LAST)


def policy_with_a_critic(mesh: Mesh):
    return policy(mesh, options=config.ActorCritic(**dataclasses.asdict(POLICY)))


COMPILED: list[str] = []


def count_compilations(event: str, *_, **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(count_compilations)


@functools.cache
def history(make, devices: int):
    """How many programs each of five calls of the step compiled, and (state, metrics) after each."""
    mesh = mesh_of(devices)
    step, state, batch = make(mesh)
    taken, compiled = [], []
    for i in range(5):
        arguments, before = batch(i), len(COMPILED)
        state, metrics = step(state, *arguments)
        compiled.append(len(COMPILED) - before)
        taken.append(jax.device_get((state, metrics)))
    return compiled, taken


def test_the_share_of_responses_without_an_end_is_that_of_the_rollouts():
    step, state, batch = policy(mesh_of(1))
    _, given = batch(0)
    responses = jax.device_get(step.sample(state.params, given.prompts, step.key(state.step)).responses)
    ended = [
        EOS in tokens[:length] for row in zip(responses.tokens, responses.lengths, strict=True)
        for tokens, length in zip(*row, strict=True)
    ]  # fmt: skip
    assert 0 < np.mean(ended) < 1
    (_, (first, *_)) = history(policy, 1)
    assert first[1]["unfinished"] == pytest.approx(1 - np.mean(ended))


STEPS = [
    sft, sft_of_adapters, reward_model, reward_model_of_adapters,
    policy, policy_of_adapters, policy_of_last_layers, policy_with_a_critic,
]  # fmt: skip


@pytest.fixture(params=STEPS, ids=lambda make: make.__name__)
def trained(request):
    """What steps on one device and on eight compiled, and their two histories."""
    (one, history_of_one), (eight, history_of_eight) = (history(request.param, devices) for devices in (1, 8))
    return (one, eight), (history_of_one, history_of_eight)


def test_eight_devices_take_the_step_of_one(trained):
    _, (one, eight) = trained
    # The first step alone: what follows starts from parameters that differ in their last bits.
    (state, metrics), (sharded_state, sharded_metrics) = one[0], eight[0]
    assert_same_step((sharded_state, sharded_metrics), (state, metrics))


def assert_same_step(found, expected, *, atol=1e-5, moments_rtol=1e-4):
    (state, metrics), (expected_state, expected_metrics) = found, expected
    assert expected_metrics["gradient_norm"] > 1e-3
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        if name == "first_rows":  # parameters, of which below
            continue
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=atol, err_msg=name)
    # Adam's moments are the gradient itself; the parameters divide it by its size, noise included where it is 0.
    for (path, value), actual in zip(
        jax.tree.leaves_with_path(expected_state.optimizer), jax.tree.leaves(state.optimizer), strict=True
    ):
        np.testing.assert_allclose(actual, value, rtol=moments_rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


ALL_ON_ALL = [
    pytest.param(
        make,
        axes,
        id=f"{make.__name__}-{axes}",
        marks=[] if axes == "2,2,2" else [pytest.mark.slow],
    )
    for make in STEPS
    for axes in SPLIT
]


@pytest.mark.parametrize(("make", "axes"), ALL_ON_ALL)
def test_split_parameters_take_the_step_of_one_device_and_stay_where_they_were(make, axes):
    step, state, batch = make(mesh_of(axes))
    before = jax.tree.map(lambda x: x.sharding, state)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.optimizer))
    state, metrics = step(state, *batch(0))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    assert_same_step(jax.device_get((state, metrics)), history(make, 1)[1][0])


def test_a_step_compiles_once(trained):
    for compiled in trained[0]:
        assert compiled[0] >= 1
        assert compiled[1:] == [0] * 4


def test_a_step_counts_itself_and_changes_the_parameters(trained):
    _, histories = trained
    for history in histories:
        assert [int(state.step) for state, _ in history] == [1, 2, 3, 4, 5]
        first, last = (jax.tree.leaves(state.params) for state, _ in (history[0], history[-1]))
        assert any((a != b).any() for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("learning_rate", "moves"), [(0.0, False), (1e-20, False), (1e-3, True)])
def test_an_update_that_float32_loses_leaves_the_first_rows(devices, learning_rate, moves):
    mesh, start = mesh_of(devices), jnp.linspace(0.5, 2, 8)
    params = replicate(mesh, {"final_norm": {"scale": start}, "q_proj": {"kernel": jnp.ones((8, 8))}})
    optimizer = optax.adam(learning_rate)

    def by_one(state):
        return programs.Change(jax.tree.map(jnp.ones_like, state.params)), {"loss": jnp.ones(())}

    step = programs.guarded(mesh, optimizer, by_one, ("loss",))
    _, metrics = step(programs.init_state(params, optimizer, mesh))
    expected = np.concatenate([np.asarray(start), np.ones(8, np.float32)])
    np.testing.assert_allclose(metrics["first_rows"], expected - learning_rate, rtol=1e-6)
    assert (np.asarray(metrics["first_rows"]) != expected).all() == moves
    assert metrics["first_rows"].is_fully_replicated


def update_of(make: str, devices: int, micro_batches: int | None, samples: int = 4):
    """(step, its arguments) of one update on 32 prompts, whose responses differ in length from slice to slice."""
    mesh, size = mesh_of(devices), 32
    start, reference, reward = params(mesh)
    parts = {"policy_of_adapters": ADAPTED, "policy_of_last_layers": LAST, "as a whole": LAST_AS_A_WHOLE}.get(
        make, WHOLE
    )
    if make == "sft":
        optimizer = optimizers.supervised(SUPERVISED)
        step = assembly.sft_step(parts, mesh, optimizer, micro_batches=micro_batches)
        return step, (programs.init_state(start, optimizer, mesh), {}, shard(mesh, examples(1, size=size)))
    if make == "reward_model":
        optimizer = optimizers.supervised(SUPERVISED)
        step = assembly.reward_model_step(parts, mesh, optimizer, micro_batches=micro_batches)
        return step, (programs.init_state(reward, optimizer, mesh), {}, shard(mesh, examples(2, size=size)))
    given = dataclasses.replace(POLICY, micro_batches=micro_batches, prompts_per_step=size, samples_per_prompt=samples)
    optimizer = optimizers.policy(given)
    algorithm = assembly.algorithm(parts, mesh, given, beta=0.2, num_references=16, eos_ids=(EOS,))
    step = assembly.policy_step(
        parts,
        mesh,
        given,
        algorithm,
        optimizer,
        lambda *batch: None,
        key=jax.random.key(5),
        max_length=T,
        eos_ids=(EOS,),
    ).update
    if parts is not WHOLE:
        reference, start = adapted(parts, mesh)
    state = programs.init_state(start, optimizer, mesh, algorithm.start())
    batch, rng = examples(samples, size=size), np.random.default_rng(1)
    rollouts = Rollouts(batch.prompts, batch.responses, np.zeros((size, samples, T), np.float32))
    rewards = rng.normal(size=(size, samples)).astype(np.float32)
    references = np.sort(rng.normal(size=(size, 16)).astype(np.float32), axis=-1)
    return step, (state, reference, shard(mesh, Experience(rollouts, rewards, references)))


@functools.cache
def updated(make: str, devices: int, micro_batches: int):
    step, arguments = update_of(make, devices, micro_batches)
    return jax.device_get(step(*arguments))


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 2), (1, 4), (8, 4)])
@pytest.mark.parametrize("make", ["sft", "reward_model", "policy", "policy_of_adapters", "policy_of_last_layers"])
def test_micro_batches_change_no_update(make, devices, micro_batches):
    found, expected = updated(make, devices, micro_batches), updated(make, 1, 1)
    assert_same_step(found, expected, atol=1e-6, moments_rtol=1e-5)


def test_a_shared_pass_of_frozen_layers_changes_no_update():
    found, expected = updated("policy_of_last_layers", 1, 1), updated("as a whole", 1, 1)
    assert set(found[0].params["lora"]) == {"layers_1"}
    assert_same_step(found, expected, atol=1e-6, moments_rtol=1e-5)


def spoiled_rewards(value):
    """The arguments of a policy step with one reward of many that is `value`."""
    step, (state, reference, experience) = update_of("policy", 8, 1)
    rewards = experience.raw
    rewards = np.array(rewards)
    rewards[3, 1] = value
    return step, state, (reference, dataclasses.replace(experience, raw=shard(mesh_of(8), rewards)))


def spoiled_gradient(value):
    """The arguments of a supervised step whose loss is finite, and whose gradient overflows."""
    step, (state, frozen, batch) = update_of("sft", 8, 1)
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * value, state.params))
    return step, state, (frozen, batch)


@pytest.mark.parametrize(
    ("spoiled", "value", "wrong"),
    [
        (spoiled_rewards, np.nan, "raw_reward"),
        (spoiled_rewards, -np.inf, "raw_reward"),
        (spoiled_gradient, 1e30, "gradient_norm"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_neither_do_those_behind_it(spoiled, value, wrong):
    step, state, arguments = spoiled(value)
    before = jax.tree.map(np.array, state)  # a copy: the step takes the state over
    state, metrics = step(state, *arguments)
    finite = {name: bool(np.isfinite(metrics[name])) for name in GUARDED if name in metrics}
    assert next(name for name, sound in finite.items() if not sound) == wrong
    assert np.isfinite(metrics["gradient_norms"]).all() == finite["gradient_norm"]
    assert int(state.step) < 0
    if spoiled is spoiled_rewards:
        # One that was dispatched before the host knew.
        reference, experience = arguments
        sound = shard(mesh_of(8), np.nan_to_num(experience.raw, neginf=0))
        state, metrics = step(state, reference, dataclasses.replace(experience, raw=sound))
        assert all(np.isfinite(metrics[name]) for name in GUARDED)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.last_sound()), before)


def test_gradient_norms_are_those_of_the_parameters():
    state, metrics = updated("policy", 1, 1)
    np.testing.assert_allclose(np.linalg.norm(metrics["gradient_norms"]), metrics["gradient_norm"], rtol=1e-5)
    # The moment of RMSProp is a hundredth of the squared gradient, clipped to the norm of 1.
    [rms] = [
        part for part in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(part, "nu")
    ]
    moments = np.array([np.linalg.norm(np.sqrt(leaf)) for leaf in jax.tree.leaves(rms.nu)])
    ratio = moments / metrics["gradient_norms"]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


@pytest.mark.parametrize(("memory", "limit"), [(None, 2**26), (2**35, 2**31)])
@pytest.mark.parametrize("prompts", [1, 7, 48])
@pytest.mark.parametrize("length", [8, 512, 65536])
def test_a_batch_has_as_few_slices_as_fit(memory, limit, prompts, length):
    whole = costs.Batch(prompts, 4, 16, length)

    def kept(count):
        part = dataclasses.replace(whole, prompts=prompts // count)
        return costs.kept_activations(WHOLE.architecture, part, length=length, rematerialize=False)

    count = costs.default_micro_batches(WHOLE.architecture, whole, rematerialize=False, memory=memory)
    divisors = [size for size in range(1, prompts + 1) if prompts % size == 0]
    assert count in divisors
    assert kept(count) <= limit or count == prompts
    assert all(kept(fewer) > limit for fewer in divisors if fewer < count)


def test_a_step_cuts_its_batch_by_itself(monkeypatch):
    monkeypatch.setattr(costs, "default_micro_batches", lambda *_, **__: 4)
    step, arguments = update_of("policy", 1, None)
    assert step.lower(*arguments).as_text() == update_of("policy", 1, 4)[0].lower(*arguments).as_text()


@pytest.mark.parametrize(
    ("vocabulary", "memory", "expected"),
    # 2^25 / 4 / 131072; 16e9 / 64 / 4 / 131072; no more than 4096; at least one.
    [(131_072, None, 64), (131_072, 16e9, 476), (512, 141e9, 4096), (2**24, None, 1)],
)
def test_a_chunk_of_logits_is_a_share_of_the_memory(vocabulary, memory, expected):
    assert costs.chunk_size(vocabulary, memory) == expected


def test_the_sampler_casts_its_weights_once():
    """Of a bfloat16 model's trained weights, float32: the loop over tokens reads none of them as they are."""
    parts = networks.create(dataclasses.replace(SIZES, dtype="bfloat16"), config.Lora())
    mesh, prompts = mesh_of(1), examples(1).prompts
    params = parameters.init_decoder(parts, mesh, jax.random.key(0))
    sample = assembly.sampler(parts, mesh, num_samples=2, max_length=T, eos_ids=(EOS,), temperature=1.0)

    def read_by_loops(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                if equation.primitive.name == "while":
                    yield from (variable.aval for variable in inner.invars)
                yield from read_by_loops(inner)

    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    avals = read_by_loops(jax.make_jaxpr(sample)(params, prompts, jax.random.key(1)).jaxpr)
    assert {aval.dtype for aval in avals if aval.shape in shapes} == {jnp.dtype("bfloat16")}


def test_a_step_makes_no_copy_of_the_state_that_it_takes_over():
    """Of no parameter or moment: a choice between the old and the new state would make one of each."""

    def step(state):
        gradients = jax.tree.map(jnp.sin, state.params)
        norm = optax.tree.norm(gradients)
        return programs.Change(gradients), {"loss": norm, "gradient_norm": norm}

    optimizer = optimizers.policy(POLICY)
    kernels = {name: {"kernel": jnp.ones((56, 72))} for name in ("q_proj", "gate_proj")}
    state = programs.init_state({"params": kernels}, optimizer, mesh_of(1))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = programs.guarded(mesh_of(1), optimizer, step, ("loss",)).lower(state).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert "f32[56,72]" in text
    assert not re.findall(r"= f32\[56,72\]\S* copy\(", text)


def test_micro_batches_take_less_memory():
    def peak(micro_batches):
        step, arguments = update_of("policy", 1, micro_batches, samples=16)
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert peak(4) < peak(1) / 2


def test_init_state_copies_the_parameters_that_a_step_gives_away():
    mesh = mesh_of(1)
    reference = params(mesh)[0]
    state = programs.init_state(reference, optimizers.supervised(SUPERVISED), mesh)
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(state.params), strict=True)
    assert all(mine.unsafe_buffer_pointer() != given.unsafe_buffer_pointer() for given, mine in pairs)


def test_only_adapters_and_head_are_trained():
    mesh = mesh_of(1)
    _, taken = history(reward_model_of_adapters, 1)
    frozen, trained = parameters.adapt_reward(ADAPTED, mesh, jax.random.key(7), params(mesh)[0])
    assert jax.tree.structure(taken[-1][0].params) == jax.tree.structure(trained)
    assert trained.keys() == {"params", "lora"} and trained["params"].keys() == {"head"}
    # One copy of the weights: the trunk is the reference's own arrays.
    assert frozen["params"]["trunk"] is params(mesh)[0]["params"]
    _, taken = history(policy_of_adapters, 1)
    assert taken[-1][0].params.keys() == {"lora"}


def test_adapters_start_as_the_reference_and_merge_into_it():
    mesh = mesh_of(1)
    reference = params(mesh)[1]
    trained = parameters.adapt_decoder(ADAPTED, mesh, jax.random.key(7), reference)
    batch = examples(2)
    apply = jax.jit(ADAPTED.decoder.apply)
    expected = apply(reference, batch.prompts, batch.responses)
    np.testing.assert_array_equal(apply(lora.overlay(reference, trained), batch.prompts, batch.responses), expected)
    adapted = lora.overlay(reference, moved(trained, mesh))
    merged = networks.merged(ADAPTED, adapted)
    assert merged.keys() == {"params"} and networks.merged(ADAPTED, reference) is reference
    found = apply(merged, batch.prompts, batch.responses)
    assert np.abs(found - expected).max() > 0.01
    np.testing.assert_allclose(found, apply(adapted, batch.prompts, batch.responses), atol=1e-5)


def test_what_is_trained_is_float32_whatever_the_weights_are():
    mesh = mesh_of(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(mesh)[0])
    state = programs.init_state(half, optimizers.supervised(SUPERVISED), mesh)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_the_controller_gets_the_kl_of_every_step_and_its_beta_is_the_next_steps():
    _, taken = history(policy, 1)
    budget = kl_budget.init(0.2, budget=POLICY.kl_budget)
    for state, metrics in taken:
        assert metrics["beta"] == pytest.approx(float(budget.beta), rel=1e-6)
        budget = kl_budget.update(budget, jnp.asarray(metrics["kl"]))
        assert state.extra.beta == pytest.approx(float(budget.beta), rel=1e-6)
    assert taken[-1][0].extra.beta != np.float32(0.2)


def test_a_given_beta_is_held():
    step, state, batch = policy(mesh_of(1), beta=0.5)
    for i in range(5):
        state, _ = step(state, *batch(i))
    assert float(state.extra.beta) == np.float32(0.5)


def sampler(mesh: Mesh):
    return assembly.sampler(WHOLE, mesh, num_samples=3, max_length=T, eos_ids=(EOS,), temperature=0.7)


@functools.cache
def drawn(mesh: Mesh):
    sample, prompts = sampler(mesh), shard(mesh, examples(1).prompts)
    rollouts = jax.device_get([sample(params(mesh)[0], prompts, jax.random.key(seed)) for seed in (1, 2)])
    assert sample._cache_size() == 1
    return rollouts


@pytest.mark.parametrize("axes", [8, *SPLIT])
def test_the_sampler_draws_the_same_tokens_on_any_mesh(axes):
    (expected, other), (found, _) = drawn(mesh_of(1)), drawn(mesh_of(axes))
    assert (expected.responses.tokens != other.responses.tokens).any()
    np.testing.assert_array_equal(found.responses.tokens, expected.responses.tokens)
    np.testing.assert_array_equal(found.responses.lengths, expected.responses.lengths)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)


@functools.cache
def measured(mesh: Mesh):
    """Scores, and the KL of a policy to a reference and to itself."""
    start, reference, reward = params(mesh)
    batch = examples(3)
    rollouts = shard(mesh, Rollouts(batch.prompts, batch.responses, np.zeros((8, 3, T), np.float32)))
    measure = assembly.kl_of_responses(WHOLE, mesh, temperature=0.7)
    scores = scorer(WHOLE, mesh)(reward, rollouts.prompts, rollouts.responses)
    return jax.device_get((scores, measure(start, reference, rollouts), measure(start, start, rollouts)))


@pytest.mark.parametrize("axes", [8, *SPLIT])
def test_scores_and_kl_are_the_same_on_any_mesh(axes):
    for found, expected in zip(measured(mesh_of(axes)), measured(mesh_of(1)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_scores_tell_responses_apart_and_a_policy_has_no_kl_to_itself():
    scores, kls, none = measured(mesh_of(1))
    assert scores.shape == kls.shape == (8, 3)
    assert np.ptp(scores) > 0.1
    assert (kls > 0).all()
    np.testing.assert_allclose(none, 0, atol=1e-6)


def collectives(step, *arguments) -> dict[str, int]:
    """How often the compiled program has each kind of communication."""
    kinds = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        step.lower(*arguments).compile().as_text(),
    )
    return dict(collections.Counter(kinds))


def communication(mesh: Mesh) -> dict[str, dict[str, int]]:
    policy_params, _, reward = params(mesh)
    batch = shard(mesh, examples(3))
    step, state, supervised = sft(mesh)
    return {
        "sample": collectives(sampler(mesh), policy_params, batch.prompts, jax.random.key(1)),
        "score": collectives(scorer(WHOLE, mesh), reward, batch.prompts, batch.responses),
        "update": collectives(step, state, *supervised(0)),
    }


def test_data_parallel_devices_communicate_in_updates_alone():
    found = communication(mesh_of(8))
    assert found["sample"] == found["score"] == {}
    assert found["update"].keys() == {"all-reduce"}


def test_parameters_split_by_fsdp_are_gathered_once_a_program():
    mesh = mesh_of("4,2,1")
    found = communication(mesh)
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params(mesh)[0]))
    assert found["sample"].keys() == found["score"].keys() == {"all-gather"}
    assert found["sample"]["all-gather"] <= split
    assert found["update"].keys() <= {"all-reduce", "all-gather", "reduce-scatter"}


def test_split_parameters_take_their_share_of_memory():
    for mesh in map(mesh_of, SPLIT):
        split = mesh.shape["fsdp"] * mesh.shape["model"]
        state = programs.init_state(params(mesh)[0], optimizers.supervised(SUPERVISED), mesh)
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert held < 1.3 * whole / split
