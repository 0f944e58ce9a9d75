"""Adapters in PEFT's files: the same adapter after a round trip, the same model in peft, and what is refused."""

import functools
import json
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from ctrl_jax.devices import partitioning
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, lora, peft, weights
from ctrl_jax.models.decoder import Decoder
from ctrl_jax.models.lora import PROJECTIONS, Lora
from ctrl_jax.types import Prompts, Responses
from tests.models.oracles import cases

# Compiling is what takes long here, and half of it optimises what runs once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SEQUENCE = np.concatenate([cases.PROMPTS[0], cases.RESPONSES[0, 0]])


@pytest.fixture
def base(tmp_path):
    """A tiny Llama with grouped heads, biases and tied embeddings, as transformers saves it."""
    case = cases.read("llama_biases")
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["config"]))
    save_file(cases.tensors(case), folder / "model.safetensors", {"format": "pt"})
    return folder


def architecture_of(base):
    return huggingface.architecture(base, dtype="float32")


def adapter(base, settings):
    """Adapters with neither factor at 0, unlike those that training starts from."""
    draws = np.random.RandomState(0)
    adapters = {}
    layers = len(architecture_of(base).layers)
    adapted = {f"layers_{i}" for i in range(layers - (settings.last_layers or layers), layers)}
    for target in weights.targets(architecture_of(base)).values():
        if target.path[-1] == "kernel" and target.path[1] in settings.targets and target.path[0] in adapted:
            layer, projection, _ = target.path
            rows, columns = target.shape
            adapters.setdefault(layer, {})[projection] = {
                "a": jnp.array(0.3 * draws.standard_normal((rows, settings.rank)), jnp.float32),
                "b": jnp.array(0.3 * draws.standard_normal((settings.rank, columns)), jnp.float32),
            }
    return adapters


@functools.cache
def forward(architecture, settings):
    return jit(Decoder(architecture, settings).apply)


def logits(base, params, settings=Lora(), architecture=None):  # noqa: B008, a frozen value
    """[t, V] of SEQUENCE, each from all tokens before it, for t = 1 on."""
    split = len(cases.PROMPTS[0])
    prompts = Prompts(jnp.array(SEQUENCE[None, :split]), jnp.array([split]), jnp.zeros(1, jnp.uint32))
    responses = Responses(jnp.array(SEQUENCE[None, None, split:]), jnp.array([[len(SEQUENCE) - split]]))
    return forward(architecture or architecture_of(base), settings)(params, prompts, responses)[0, 0]


def read_all(folder):
    return json.loads((folder / peft.CONFIG).read_text()), load_file(folder / peft.WEIGHTS)


def rewrite(folder, *, tensors=None, **config):
    """Changes the files of an adapter."""
    old_config, old_tensors = read_all(folder)
    (folder / peft.CONFIG).write_text(json.dumps(old_config | config))
    save_file(old_tensors if tensors is None else tensors, folder / peft.WEIGHTS, {"format": "pt"})


SETTINGS = Lora(rank=3, alpha=4.5)


@pytest.fixture
def saved(tmp_path, base):
    peft.save(tmp_path / "adapter", adapter(base, SETTINGS), architecture_of(base), SETTINGS, base=str(base))
    return tmp_path / "adapter"


@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize("targets", [PROJECTIONS, ("v_proj", "q_proj"), ("down_proj",)])
def test_save_and_load_keep_every_bit(tmp_path, base, targets, last_layers):
    settings = Lora(rank=2, alpha=7.0, targets=targets, last_layers=last_layers)
    adapters = adapter(base, settings)
    peft.save(tmp_path / "saved", adapters, architecture_of(base), settings, base=str(base))
    _, again, found, *_ = peft.load(tmp_path / "saved", architecture_of(base), base=base)
    assert (found.rank, found.alpha, set(found.targets)) == (2, 7.0, set(targets))
    assert found.last_layers == last_layers
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_names_and_shapes_are_those_of_peft(base, saved):
    config, tensors = read_all(saved)
    # [out, in] of the checkpoint's own projections, and PEFT's name for each.
    sizes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in load_file(base / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }
    assert len(sizes) == 2 * 7
    expected = {}
    for name, (out, into) in sizes.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (3, into)
        expected[f"base_model.model.{name}.lora_B.weight"] = (out, 3)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 4.5, list(PROJECTIONS))
    assert config["base_model_name_or_path"] == str(base)
    assert "layers_to_transform" not in config


def test_the_layers_of_an_adapter_are_named_as_peft_names_them(tmp_path, base):
    settings = replace(SETTINGS, last_layers=1)
    peft.save(tmp_path / "adapter", adapter(base, settings), architecture_of(base), settings, base=str(base))
    config, tensors = read_all(tmp_path / "adapter")
    assert config["layers_to_transform"] == [1]
    assert len(tensors) == 2 * 7 and all(".layers.1." in name for name in tensors)


def test_merging_adds_the_product_to_every_stored_projection(base, saved):
    """W + (alpha / r) B A, in the checkpoint's own [out, in]."""
    architecture = architecture_of(base)
    _, adapters, settings, *_ = peft.load(saved, architecture, base=base)
    params = lora.merge(weights.load(base, architecture), adapters, settings)
    _, factors = read_all(saved)
    for name, stored in load_file(base / "model.safetensors").items():
        target = weights.targets(architecture).get(name)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith("_proj.weight"):
            stored = stored + 4.5 / 3 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        found = params
        for key in target.path:
            found = found[key]
        np.testing.assert_allclose(found.T if target.transposed else found, stored, rtol=0, atol=1e-5, err_msg=name)


def test_the_merged_model_is_the_adapted_one(base, saved):
    architecture = architecture_of(base)
    _, adapters, settings, *_ = peft.load(saved, architecture, base=base)
    params = weights.load(base, architecture)
    adapted = logits(base, {"params": params, "lora": adapters}, settings)
    merged = logits(base, {"params": lora.merge(params, adapters, settings)})
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(adapted - logits(base, {"params": params}))).max() > 0.1


def test_an_adapter_of_some_layers_leaves_the_others(base, saved):
    _, tensors = read_all(saved)
    rewrite(saved, tensors={name: tensor for name, tensor in tensors.items() if ".layers.1." in name})
    architecture = architecture_of(base)
    _, adapters, settings, *_ = peft.load(saved, architecture, base=base)
    params = weights.load(base, architecture)
    merged = lora.merge(params, adapters, settings)
    assert merged["layers_0"] is params["layers_0"]
    assert settings.last_layers is None
    assert not np.array_equal(merged["layers_1"]["q_proj"]["kernel"], params["layers_1"]["q_proj"]["kernel"])


def test_bfloat16_is_read_as_the_values_it_holds(base, saved):
    _, tensors = read_all(saved)
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    rewrite(saved, tensors=rounded)
    _, adapters, *_ = peft.load(saved, architecture_of(base), base=base)
    found = adapters["layers_1"]["o_proj"]["a"]
    expected = rounded["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].T.astype(np.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("named", ["base", "/elsewhere/base", "someone/base/", "link", "", None])
def test_a_base_goes_by_its_name_wherever_it_lies(tmp_path, base, saved, named):
    (tmp_path / "link").symlink_to(base)
    rewrite(saved, base_model_name_or_path=named)
    _, adapters, *_ = peft.load(saved, architecture_of(base), base=tmp_path / "link")
    assert set(adapters) == {"layers_0", "layers_1"}


def test_a_base_may_be_the_current_folder(tmp_path, base, monkeypatch):
    monkeypatch.chdir(base)
    peft.save(tmp_path / "adapter", adapter(base, SETTINGS), architecture_of(base), SETTINGS, base=".")
    _, adapters, *_ = peft.load(tmp_path / "adapter", architecture_of(base), base=Path())
    assert set(adapters) == {"layers_0", "layers_1"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"base_model_name_or_path": "someone/other"},
            r"'someone/other', and `model.path` is .*base\. Give that model",
        ),
        ({"use_dora": True}, r"use_dora = True, which is not read. Merge the adapter into its base with peft"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes', not true or false"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = {'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\], and .* holds no 'lm_head'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head', not a list"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices of model\.embed_tokens, and .* no rows of it"),
        (
            {"target_parameters": ["up_proj"]},
            "target_parameters = .*which is not read.*If it changes nothing, remove it",
        ),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA is read"),
        ({"peft_type": None}, "peft_type None"),
        ({"r": 0}, "r = 0, not a whole number from 1"),
        ({"r": None}, "r = None"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": "16"}, "lora_alpha = '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, not a number above 0"),
        ({"lora_alpha": 1e300}, r"lora_alpha = 1e\+300"),
        ({"layers_to_transform": [0, 1, 2]}, r"no factors of layer 2; `model\.path` has the layers 0 to 1\. Give the"),
        ({"layers_to_transform": [1]}, r"= \[1\], and .* has factors of layer 0 too, which peft passes over; name it"),
        ({"layers_to_transform": 1}, r"= 1, and .* has factors of layer 0 too"),
        ({"layers_to_transform": "1"}, r"= '1', which is no list of layers"),
        ({"layers_to_transform": [True]}, r"= \[True\], which is no list of layers"),
        ({"r": 4}, r"layers\.0\.[\w.]+: .*\(3, .*where A \(4, .* belong\. It is an adapter for another model"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(base, saved, config, message):
    rewrite(saved, **config)
    with pytest.raises(InputError, match=message) as caught:
        peft.load(saved, architecture_of(base), base=base)
    assert str(saved) in str(caught.value)


def test_what_peft_writes_for_the_plain_choice_is_read(base, saved):
    plain = {
        "use_dora": False, "rank_pattern": {}, "modules_to_save": None, "bias": "none", "use_qalora": False,
        "layer_replication": None, "alora_invocation_tokens": None, "init_lora_weights": "gaussian",
        "base_model_name_or_path": None, "loftq_config": {}, "layers_to_transform": None, "peft_version": "0.21.2",
    }  # fmt: skip
    rewrite(saved, **plain)
    assert peft.load(saved, architecture_of(base), base=base).lora.rank == 3


# What may be wrong with the tensors. Each changes them, and says what the error has to name.
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def unknown_module(tensors):
    tensors["base_model.model.v_head.summary.weight"] = np.zeros((1, 32), np.float32)
    return r"base_model\.model\.v_head\.summary\.weight: a tensor that the base has no parameter for"


def a_layer_too_many(tensors):
    tensors[f"{Q.replace('.0.', '.2.')}.lora_A.weight"] = np.zeros((3, 32), np.float32)
    return r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: a tensor that the base has no parameter for"


def head_of_a_classifier(tensors):
    tensors["base_model.model.score.weight"] = np.zeros((1, 32), np.float32)
    return r"score\.weight, the head of a classifier.*give the result as `reward_model\.path`"


def magnitudes(tensors):
    tensors[f"{Q}.lora_magnitude_vector"] = np.zeros(24, np.float32)
    return r"q_proj\.lora_magnitude_vector\. What is read are factors of LoRA, whole parameters .*, and rows"


def names_of_another_tool(tensors):
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
    return r"has model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight\. What is read are"


def more_tokens(tensors):
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((41, 32), np.float32)
    return r"embed_tokens\.weight for 41 tokens, and the base has 40: it was resized before the training\. Merge"


def another_width(tensors):
    tensors["base_model.model.lm_head.weight"] = np.zeros((40, 33), np.float32)
    return r"lm_head\.weight: a tensor of shape \(40, 33\), where \(40, 32\) belongs"


def rows_of_no_token(tensors):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[name] = np.zeros((2, 32), np.float32)
    return (
        r"trainable_token_indices = .*, and .* rows of model\.embed_tokens .*it must name as many tokens, from 0 to 39"
    )


def two_tables(tensors):
    for end in ("weight", "base_layer.weight"):
        tensors[f"base_model.model.model.embed_tokens.{end}"] = np.zeros((40, 32), np.float32)
    return "of which one would be passed over"


def eight_bits(tensors):
    tensors[f"{Q}.lora_A.weight"] = np.zeros((3, 32), ml_dtypes.float8_e4m3fn)
    return r"q_proj\.lora_A\.weight is of type F8_E4M3, and only F32, BF16, F16 are read"


def wrong_width(tensors):
    tensors[f"{Q}.lora_A.weight"] = np.zeros((3, 31), np.float32)
    return r"layers\.0\.self_attn\.q_proj: .*\(3, 31\).*where A \(3, 32\) and B \(24, 3\) belong"


def wrong_rank(tensors):
    tensors[f"{Q}.lora_B.weight"] = np.zeros((24, 2), np.float32)
    return r"\(24, 2\).*where A \(3, 32\) and B \(24, 3\) belong"


def half_an_adapter(tensors):
    del tensors[f"{Q}.lora_B.weight"]
    return r"q_proj\.lora_A\.weight, and not the other factor of it"


def nothing(tensors):
    tensors.clear()
    return "holds no adapter; export it again"


@pytest.mark.parametrize(
    "spoil",
    [
        unknown_module,
        a_layer_too_many,
        head_of_a_classifier,
        magnitudes,
        names_of_another_tool,
        more_tokens,
        another_width,
        rows_of_no_token,
        two_tables,
        eight_bits,
        wrong_width,
        wrong_rank,
        half_an_adapter,
        nothing,
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_any_is_read(base, saved, spoil):
    _, tensors = read_all(saved)
    message = spoil(tensors)
    rewrite(saved, tensors=tensors)
    for read in (peft.check, peft.load):
        with pytest.raises(InputError, match=message) as caught:
            read(saved, architecture_of(base), base=base)
        assert str(saved) in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(base, saved, bad):
    _, tensors = read_all(saved)
    tensors[f"{Q}.lora_B.weight"][5, 1] = bad
    rewrite(saved, tensors=tensors)
    with pytest.raises(InputError, match=r"q_proj\.lora_B\.weight has values that are NaN or infinite"):
        peft.load(saved, architecture_of(base), base=base)


@pytest.mark.parametrize("tokens", [[3, 3], [3, 40], [3, -1], [3], [3, "5"], {"embed_tokens": None}, "3 5"])
def test_tokens_that_are_not_the_rows_are_refused(base, saved, tokens):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    _, tensors = read_all(saved)
    rewrite(saved, tensors=tensors | {name: np.zeros((2, 32), np.float32)}, trainable_token_indices=tokens)
    with pytest.raises(InputError, match=r"trainable_token_indices = .* must name as many tokens, from 0 to 39"):
        peft.check(saved, architecture_of(base), base=base)


ADAPTERS = cases.read("adapters")


@pytest.fixture(scope="module", params=ADAPTERS)
def recorded(request, tmp_path_factory):
    """A recorded base and an adapter of it, as directories, and the logits that peft gives."""
    given, folder = ADAPTERS[request.param], tmp_path_factory.mktemp("recorded")
    case = cases.read(given["base"])
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(case["config"]))
    save_file(cases.tensors(case), folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "adapter" / peft.CONFIG).write_text(json.dumps(given["config"]))
    tensors = cases.adapter_tensors(given["tensors"], given["config"], case["config"])
    save_file(tensors, folder / "adapter" / peft.WEIGHTS, {"format": "pt"})
    return folder / "base", folder / "adapter", np.array(given["logits"])


def test_what_an_adapter_holds_beside_projections_gives_the_logits_of_peft(recorded):
    base, folder, expected = recorded
    architecture = architecture_of(base)
    params = weights.load(base, architecture)
    before = logits(base, {"params": params})
    merged = peft.merge(params, peft.load(folder, architecture, base=base))
    found = logits(base, {"params": merged}, architecture=peft.architecture(folder, architecture))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert np.abs(expected - before).max() > 0.1


def test_tables_that_are_the_base_s_own_leave_it_tied(base, saved):
    """As `save_pretrained(save_embedding_layers=True)` adds them, without modules_to_save."""
    table = 2 * load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    names = [f"base_model.model.{module}.weight" for module in ("model.embed_tokens", "lm_head")]
    rewrite(saved, tensors=read_all(saved)[1] | {name: table.copy() for name in names})
    architecture = architecture_of(base)
    assert peft.architecture(saved, architecture) == architecture
    merged = peft.merge(weights.load(base, architecture), peft.load(saved, architecture, base=base))
    assert "head" not in merged
    np.testing.assert_array_equal(merged["embedding"]["embedding"], table)


def test_a_model_that_an_adapter_untied_is_saved_as_one(recorded, tmp_path):
    base, folder, _ = recorded
    architecture = peft.architecture(folder, architecture_of(base))
    params = peft.merge(weights.load(base, architecture_of(base)), peft.load(folder, architecture_of(base), base=base))
    weights.save(tmp_path / "saved", params, architecture, huggingface.read_config(base))
    assert architecture_of(tmp_path / "saved") == architecture
    again = weights.load(tmp_path / "saved", architecture)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_on_a_mesh_an_adapter_lies_as_its_base(recorded):
    base, folder, _ = recorded
    architecture = architecture_of(base)
    axes = ("data", "fsdp", "model")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices("cpu")[:8])
    place = partial(partitioning.sharding, mesh)

    def merged(place):
        params = weights.load(base, architecture, place=place)
        return peft.merge(params, peft.load(folder, architecture, base=base, place=place), place=place)

    plain, placed = merged(None), merged(place)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        names = tuple(key.key for key in path)
        assert leaf.sharding.is_equivalent_to(place(names, leaf.shape), leaf.ndim), names
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-6), placed, plain)


def test_a_pickled_adapter_is_told_how_to_be_converted(saved):
    (saved / peft.WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin, a pickle.*weights_only=True") as caught:
        peft.files(saved)
    (program,) = re.findall(r"python -c ('.*')\.$", str(caught.value))
    compile(shlex.split(program)[0], "advice", "exec")


@pytest.mark.parametrize("missing", [peft.CONFIG, peft.WEIGHTS])
def test_a_missing_file_is_named(base, saved, missing):
    assert peft.files(saved) == {name: saved / name for name in (peft.CONFIG, peft.WEIGHTS)}
    (saved / missing).unlink()
    for read in (lambda: peft.files(saved), lambda: peft.load(saved, architecture_of(base), base=base)):
        with pytest.raises(InputError, match=missing) as caught:
            read()
        assert str(saved / missing) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (peft.WEIGHTS, lambda data: data[: len(data) // 2], "is truncated or no safetensors file: .*Fetch it again"),
        (peft.WEIGHTS, lambda data: b"", "is truncated"),
        (peft.WEIGHTS, lambda data: b"\x80\x04}q\x00." + data, "is truncated or no safetensors file"),
        (peft.CONFIG, lambda data: data[:-5], "cannot be read as JSON"),
        (peft.CONFIG, lambda data: b"\xff" + data, "cannot be read as JSON"),
        (peft.CONFIG, lambda data: b"[1]", "only LORA is read"),
    ],
)
def test_a_damaged_file_is_named(base, saved, name, content, message):
    (saved / name).write_bytes(content((saved / name).read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        peft.load(saved, architecture_of(base), base=base)
    assert str(saved / name) in str(caught.value)


def test_a_save_overwrites_nothing_and_fails_whole(tmp_path, base, saved, monkeypatch):
    def save(folder):
        peft.save(folder, adapter(base, SETTINGS), architecture_of(base), SETTINGS, base=str(base))

    before = (saved / peft.WEIGHTS).read_bytes()
    with pytest.raises(InputError, match=r"adapter exists and is not empty\. Delete it, or save to another place"):
        save(saved)
    assert (saved / peft.WEIGHTS).read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file exists and is not empty"):
        save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert (tmp_path / "empty" / peft.WEIGHTS).read_bytes() == before

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(peft, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "export" / "adapter")
    assert list((tmp_path / "export").iterdir()) == []


def logits_of_transformers(model):
    import torch

    with torch.no_grad():
        found = model(torch.tensor(SEQUENCE[None])).logits[0].numpy()
    # As in `logits`: what predicts the first response token, and all after it.
    return found[len(cases.PROMPTS[0]) - 1 : -1]


@pytest.mark.parametrize("last_layers", [None, 1])
def test_an_adapter_saved_here_is_the_same_model_in_peft(tmp_path, base, last_layers):
    library = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    settings, saved = replace(SETTINGS, last_layers=last_layers), tmp_path / "ours"
    peft.save(saved, adapter(base, settings), architecture_of(base), settings, base=str(base))
    original = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager").eval()
    before = logits_of_transformers(original)
    model = library.PeftModel.from_pretrained(original, saved).eval()
    factors = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert len(factors) == 7 * (last_layers or 2)
    theirs = logits_of_transformers(model)
    params = {"params": weights.load(base, architecture_of(base)), "lora": adapter(base, settings)}
    assert np.abs(theirs - before).max() > 0.1
    np.testing.assert_allclose(logits(base, params, settings), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("targets", "layers", "last_layers"),
    [("all-linear", None, None), (["q_proj", "down_proj"], None, None), (["up_proj"], [1], 1), (["up_proj"], 0, None)],
)
def test_an_adapter_saved_by_peft_is_the_same_model_here(tmp_path, base, targets, layers, last_layers):
    library = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager").eval()
    settings = library.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, layers_to_transform=layers, init_lora_weights=False
    )
    torch.manual_seed(0)
    model = library.get_peft_model(original, settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    _, adapters, found, *_ = peft.load(tmp_path / "theirs", architecture_of(base), base=base)
    assert (found.rank, found.alpha, found.last_layers) == (4, 6.0, last_layers)
    assert found.targets == (PROJECTIONS if targets == "all-linear" else tuple(targets))
    params = weights.load(base, architecture_of(base))
    theirs = logits_of_transformers(model)
    ours = logits(base, {"params": lora.merge(params, adapters, found)})
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    assert np.abs(theirs - np.asarray(logits(base, {"params": params}))).max() > 0.1
