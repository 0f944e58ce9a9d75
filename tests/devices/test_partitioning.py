import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from ctrl_jax import config
from ctrl_jax.devices import partitioning
from ctrl_jax.errors import InputError
from ctrl_jax.models import architecture, lora, weights
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.models.reward import RewardModel
from ctrl_jax.types import Prompts, Responses

# Every kind of parameter that a model may have.
SIZES = dataclasses.replace(
    architecture.from_scratch(
        vocabulary_size=20, width=16, layers=1, heads=4, kv_heads=2, mlp_width=24, tied_embeddings=False
    ),
    **{"post_norms": True, "query_key_norm": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
)


def mesh(data=1, fsdp=1, model=1):
    return AbstractMesh((data, fsdp, model), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def variables():
    """Of a decoder, and of a reward model with adapters; as shapes."""
    prompts = Prompts(np.zeros((1, 2), np.int32), np.ones(1, np.int32), np.zeros(1, np.uint32))
    responses = Responses(np.zeros((1, 1, 2), np.int32), np.ones((1, 1), np.int32))
    policy, reward = (
        jax.eval_shape(partial(network.init, jax.random.key(0), prompts, responses))["params"]
        for network in (Decoder(SIZES), RewardModel(SIZES))
    )
    adapters = jax.eval_shape(lambda params: lora.init(params, config.Lora(rank=3), jax.random.key(0)), policy)
    return {"params": policy}, {"params": reward, "lora": {"trunk": adapters}}


def test_every_parameter_has_a_place():
    policy, reward = partitioning.specs(mesh(2, 2, 2), variables())
    trunk, adapters = policy["params"], reward["lora"]["trunk"]["layers_0"]
    layer = trunk["layers_0"]
    assert trunk["embedding"]["embedding"] == P("model", "fsdp")
    assert trunk["head"]["kernel"] == P("fsdp", "model")
    assert reward["params"]["head"] == {"kernel": P("fsdp"), "bias": P()}
    assert reward["params"]["trunk"] == {name: part for name, part in trunk.items() if name != "head"}
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert layer[name] == {"kernel": P("fsdp", "model"), "bias": P("model")}
        assert adapters[name] == {"a": P("fsdp"), "b": P(None, "model")}
    for name in ("o_proj", "down_proj"):
        assert layer[name] == {"kernel": P("model", "fsdp"), "bias": P()}
        assert adapters[name] == {"a": P("model"), "b": P(None, "fsdp")}
    norms = [name for name in layer if name.endswith("norm")]
    assert len(norms) == 6
    assert all(part["scale"] == P() for part in [trunk["final_norm"], *(layer[name] for name in norms)])


def test_the_members_of_an_ensemble_are_on_every_device():
    """Of three, none divides by two."""
    heads = {"heads": {"kernel": np.zeros((8, 3)), "bias": np.zeros(3)}}
    assert partitioning.specs(mesh(2, 2, 2), heads) == {"heads": {"kernel": P("fsdp"), "bias": P()}}


def test_the_tensors_of_a_directory_have_the_places_of_the_parameters():
    params = variables()[0]["params"]
    for target in weights.targets(SIZES).values():
        leaf = params
        for key in target.path:
            leaf = leaf[key]
        assert partitioning.spec(mesh(2, 2, 2), target.path, target.shape) == partitioning.spec(
            mesh(2, 2, 2), ("params", *target.path), leaf.shape
        )


def test_data_splits_no_parameter():
    assert set(jax.tree.leaves(partitioning.specs(mesh(data=8), variables()))) == {P()}


def test_an_optimisers_moments_lie_as_their_parameters():
    params = {"params": {"layers_0": {"q_proj": {"kernel": np.zeros((4, 6))}}}}
    state = [{"count": np.zeros(())}["count"], params, np.zeros(20)]
    expected = {"params": {"layers_0": {"q_proj": {"kernel": P("fsdp", "model")}}}}
    assert partitioning.specs(mesh(1, 2, 3), state) == [P(), expected, P()]


GATE = ("layers_3", "gate_proj", "kernel")


@pytest.mark.parametrize(
    ("path", "shape", "devices", "told"),
    [
        (GATE, (16, 24), {"model": 5}, ["layers_3.gate_proj.kernel", "[16, 24]", "mlp", "`model_parallel`"]),
        (GATE, (16, 24), {"data": 3, "model": 16}, ["of 24", "16 devices", "axis model", "such as 12"]),
        (("embedding", "embedding"), (20, 16), {"fsdp": 6}, ["width of 16", "6 devices", "`fsdp`", "such as 2"]),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_with_the_fix(path, shape, devices, told):
    with pytest.raises(InputError) as error:
        partitioning.spec(mesh(**devices), path, shape)
    assert all(part in str(error.value) for part in told)


@pytest.mark.parametrize(("path", "shape"), [(("layers_0", "router", "kernel"), (4, 4)), (("head", "kernel"), (4,))])
def test_a_parameter_without_a_rule_is_refused(path, shape):
    with pytest.raises(InputError, match=rf"{path[-2]}.{path[-1]} of shape .*Add one for.*RULES"):
        partitioning.spec(mesh(), path, shape)
