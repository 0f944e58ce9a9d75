"""The fused form against the plain one, which test_decoder.py holds to the definition; on CPU by XLA's own kernel."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.models import architecture, attention, decoder, reward
from ctrl_jax.models.attention import KeysValues, attend, attend_fused, visible
from ctrl_jax.types import Prompts, Responses

B, N, P, H, K, D = 2, 3, 5, 4, 2, 8
LENGTHS = jnp.array([5, 2])
fused = functools.partial(attend_fused, implementation="xla")


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def case(length, window, with_own):
    """(queries, keys and values, masks) of `length` tokens that follow prompts of 5 and 2, or that are the prompts."""
    positions = (LENGTHS[:, None] if with_own else 0) + jnp.arange(length)[None]
    real = jnp.arange(P)[None, None] < LENGTHS[:, None, None]
    shared_mask = real & visible(jnp.broadcast_to(positions, (B, length)), jnp.arange(P)[None], window)
    shared = KeysValues(draw(1, B, K, P, D), draw(2, B, K, P, D))
    if not with_own:
        return draw(0, B, 1, length, H, D), shared, shared_mask, None, None
    own = KeysValues(draw(3, B * N, K, length, D), draw(4, B * N, K, length, D))
    index = jnp.arange(length)
    return draw(0, B, N, length, H, D), shared, shared_mask, own, visible(index, index, window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("length", "with_own"), [(7, True), (8, True), (P, False)])
def test_both_forms_agree_and_so_do_their_gradients(length, with_own, window):
    queries, shared, shared_mask, own, own_mask = case(length, window, with_own)
    # What a padded query reads means nothing, and differs: of all keys masked, one form takes the mean.
    seen = shared_mask.any(-1) if own_mask is None else shared_mask.any(-1) | own_mask.any(-1)[None]

    def loss(function, queries, shared, own):
        out = function(queries, shared, shared_mask, own, own_mask, scale=0.3)
        return jnp.sin(jnp.where(seen[:, None, :, None], out, 0.0)).sum(), out

    def run(function):
        return jax.jit(jax.value_and_grad(functools.partial(loss, function), argnums=(0, 1, 2), has_aux=True))(
            queries, shared, own
        )

    ((value, out), gradients), ((expected, plain), plain_gradients) = run(fused), run(attend)
    np.testing.assert_allclose(out, jnp.where(seen[:, None, :, None], plain, out), atol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_padded_keys_hold_changes_nothing():
    queries, shared, shared_mask, own, own_mask = case(7, None, True)
    padded = jnp.arange(P)[None, None, :, None] >= LENGTHS[:, None, None, None]
    spoilt = KeysValues(*(jnp.where(padded, 1e3, part) for part in shared))
    expected, found = (fused(queries, part, shared_mask, own, own_mask, scale=1.0) for part in (shared, spoilt))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": "float32"}, False),
        ({"length": 1}, False),
        ({"head": 60}, False),
        ({"head": 128}, True),
        ({"head": 256}, False),
        ({"softcap": 50.0}, False),
    ],
    ids=str,
)
def test_the_kernel_is_taken_where_it_fits(changes, expected):
    given = {"dtype": "bfloat16", "length": 4, "head": 64, "softcap": None} | changes
    queries = jnp.zeros((1, 2, given["length"], 2, given["head"]), given["dtype"])
    assert attention.fits_kernel(queries, given["softcap"]) is expected


@pytest.mark.parametrize(
    ("kind", "capability", "expected"),
    [
        ("NVIDIA H200", "9.0", True),
        ("NVIDIA A100-SXM4-80GB", "8.0", True),
        ("NVIDIA V100-SXM2-16GB", "7.0", False),
        ("TPU v5e", None, False),
        ("cpu", None, False),
    ],
)
def test_the_kernel_is_there_by_the_mesh_and_not_by_the_machine(monkeypatch, kind, capability, expected):
    def mesh(kind, capability):
        devices = np.array([SimpleNamespace(device_kind=kind, compute_capability=capability)])
        return SimpleNamespace(devices=devices, size=1)

    others = {"cpu": "NVIDIA H200"}.get(kind, "cpu")
    monkeypatch.setattr(jax, "devices", lambda: [*mesh(others, "9.0").devices])
    assert attention.has_kernel(mesh(kind, capability)) is expected


def test_several_devices_take_the_kernel_where_it_has_a_gradient():
    device = SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0")
    mesh = SimpleNamespace(devices=np.array([device] * 2), size=2)
    assert attention.has_kernel(mesh) is (jax.__version_info__ >= (0, 11))


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoder_takes_the_kernel_only_where_it_is_asked_to(monkeypatch, fused):
    """As far as a machine without one can tell: lowered for a GPU, not run."""
    with_kernel(monkeypatch)
    sizes = dataclasses.replace(
        architecture.from_scratch(vocabulary_size=5, width=16, layers=1, heads=2, kv_heads=1, mlp_width=8),
        dtype="bfloat16",
    )
    prompts = Prompts(jnp.zeros((1, 8), jnp.int32), jnp.full(1, 8), jnp.zeros(1, jnp.uint32))
    responses = Responses(jnp.zeros((1, 2, 8), jnp.int32), jnp.full((1, 2), 8))
    for network in (decoder.Decoder(sizes, fused_attention=fused), reward.RewardModel(sizes, fused_attention=fused)):
        params = jax.eval_shape(network.init, jax.random.key(0), prompts, responses)
        program = jax.jit(network.apply).trace(params, prompts, responses)
        assert ("__cudnn$fmha" in program.lower(lowering_platforms=("cuda",)).as_text()) is fused


def with_kernel(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.parametrize("mapped", [False, True])
def test_the_kernel_and_its_gradient_are_made_for_a_gpu(monkeypatch, mapped):
    """As far as a machine without one can tell: lowered, not run."""
    if mapped and jax.__version_info__ < (0, 11):
        pytest.skip("this jax has no gradient of the kernel under shard_map, and has_kernel says so")
    with_kernel(monkeypatch)
    arrays = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.bfloat16), case(7, None, True)[:4])
    own_mask = case(7, None, True)[4]

    def loss(queries, shared, shared_mask, own):
        return attend_fused(queries, shared, shared_mask, own, own_mask, scale=1.0).astype(jnp.float32).sum()

    if mapped:
        auto = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((2,), ("data",), axis_types=(auto,), devices=jax.devices("cpu")[:2])
        batch = jax.P("data")
        loss = jax.shard_map(
            lambda *arrays, loss=loss: jax.lax.psum(loss(*arrays), "data"),
            mesh=mesh, in_specs=(batch,) * 4, out_specs=jax.P(),
        )  # fmt: skip
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
    text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBias" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
