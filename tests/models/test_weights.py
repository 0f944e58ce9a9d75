import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from ctrl_jax.config import Lora
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, weights
from ctrl_jax.models.decoder import Decoder, policy
from ctrl_jax.models.reward import RewardModel
from ctrl_jax.types import Prompts, Responses
from tests.models.oracles import cases

ROOT = Path(__file__).parents[2]
# Compiling is what takes long here, and half of it optimises what runs once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PROMPTS = Prompts(
    jnp.array(
        [
            [*prompt[:length], *[7] * (cases.P - length)]
            for prompt, length in zip(cases.PROMPTS, cases.PROMPT_LENGTHS, strict=True)
        ]
    ),
    jnp.array(cases.PROMPT_LENGTHS),
    jnp.arange(2, dtype=jnp.uint32),
)
RESPONSES = Responses(jnp.array(cases.RESPONSES), jnp.full((2, 2), cases.T))


def write(folder, case, tensors=None, **config):
    """A directory as transformers would save the model of a recorded case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case["config"] | config))
    save_file(cases.tensors(case) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder, dtype="float32", **options):
    architecture = huggingface.architecture(folder, dtype=dtype)
    return architecture, weights.load(folder, architecture, **options)


def logits(architecture, params, prompts=PROMPTS, responses=RESPONSES):
    return jit(Decoder(architecture, lora=Lora()).apply)({"params": params}, prompts, responses)


def assert_same_bits(one, other):
    one, other = flax.traverse_util.flatten_dict(one), flax.traverse_util.flatten_dict(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype and leaf.shape == other[path].shape, path
        assert np.asarray(leaf).tobytes() == np.asarray(other[path]).tobytes(), path


@pytest.fixture
def qwen3(tmp_path):
    """Untied, with biases in none of its layers."""
    return write(tmp_path / "qwen3", cases.read("qwen3"))


@pytest.fixture
def gemma3(tmp_path):
    return write(tmp_path / "gemma3", cases.read("gemma3"))


@pytest.mark.parametrize("name", cases.CAUSAL)
def test_logits_are_those_of_transformers(tmp_path, name):
    case = cases.read(name)
    architecture, params = load(write(tmp_path / name, case))
    expected = np.array(case["logits"])
    assert expected.std() > 0.1  # a comparison of zeros would hold too
    np.testing.assert_allclose(logits(architecture, params), expected, rtol=0, atol=2e-4)


def test_bfloat16_gives_these_logits_roughly(tmp_path):
    case = cases.read("gemma3")
    architecture, params = load(write(tmp_path, case), dtype="bfloat16")
    expected = np.array(case["logits"])
    error = np.asarray(logits(architecture, params), np.float32) - expected
    assert 1e-4 < np.sqrt((error**2).mean()) < 0.02 * expected.std()  # 8 bits of precision are 0.4 % a step


@pytest.mark.parametrize("name", cases.CAUSAL)
def test_decoding_with_a_cache_gives_the_logits_of_transformers(tmp_path, name):
    case = cases.read(name)
    architecture, params = load(write(tmp_path / name, case))
    pure, variables = policy(Decoder(architecture)), {"params": params}
    features, cache = jit(pure.prefill)(variables, PROMPTS)
    steps = [jnp.broadcast_to(features[:, None], (2, 2, features.shape[-1]))]
    own = pure.start(cache, 2, cases.T)
    decode = jit(pure.decode)
    for index in range(cases.T - 1):
        features, own = decode(variables, cache, own, PROMPTS.lengths, RESPONSES.tokens[..., index], jnp.asarray(index))
        steps.append(features)
    found = pure.unembed(variables, jnp.stack(steps, axis=2))
    np.testing.assert_allclose(found, case["logits"], rtol=0, atol=2e-4)


def without_windows(architecture):
    return replace(architecture, layers=tuple(replace(layer, window=None) for layer in architecture.layers))


def with_one_rope(architecture):
    return replace(
        architecture,
        layers=tuple(replace(layer, rotary=architecture.layers[0].rotary) for layer in architecture.layers),
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mistral", without_windows),
        ("qwen2", without_windows),
        ("gemma3", without_windows),
        ("gemma3", with_one_rope),
        ("gemma2", partial(replace, attention_softcap=None)),
        ("gemma2", partial(replace, logits_softcap=None)),
        ("gemma2", partial(replace, query_scale=8**-0.5)),
    ],
)
def test_the_oracles_would_notice(tmp_path, name, other):
    case = cases.read(name)
    architecture, params = load(write(tmp_path / name, case))
    assert np.abs(np.asarray(logits(other(architecture), params)) - np.array(case["logits"])).max() > 0.01


@pytest.mark.parametrize("name", cases.CLASSIFIERS)
def test_scores_are_those_of_transformers(tmp_path, name):
    case = cases.read(name)
    folder = write(tmp_path / name, case)
    architecture, trunk = load(folder)
    params = {"trunk": trunk, "head": weights.load_reward_head(folder, architecture)}
    assert huggingface.is_classifier(folder)
    found = jit(RewardModel(architecture).apply)({"params": params}, PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, case["scores"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", cases.CAUSAL)
def test_parameters_are_those_that_the_decoder_asks_for(tmp_path, name):
    architecture, params = load(write(tmp_path / name, cases.read(name)))
    asked = jax.eval_shape(Decoder(architecture).init, jax.random.key(0), PROMPTS, RESPONSES)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, asked)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_each_stored_type_is_read_as_numpy_would_convert_it(tmp_path, stored, wanted):
    case = cases.read("llama_biases")
    source = {name: tensor.astype(stored) for name, tensor in cases.tensors(case).items()}
    architecture, params = load(write(tmp_path, case, source), dtype=wanted)
    for name, target in weights.targets(architecture).items():
        expected = source[name].astype(wanted)
        found = np.asarray(flax.traverse_util.flatten_dict(params)[target.path])
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected.T if target.transposed else expected)


def test_weights_to_train_may_be_float32_beside_bfloat16_activations(qwen3):
    architecture = huggingface.architecture(qwen3, dtype="bfloat16")
    params = weights.load(qwen3, architecture, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", cases.CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_save_load_keeps_every_bit(tmp_path, name, dtype):
    case = cases.read(name)
    source = {name: tensor.astype(dtype) for name, tensor in cases.tensors(case).items()}
    folder = write(tmp_path / "source", case, source, dtype=dtype)
    architecture, params = load(folder, dtype=dtype)
    weights.save(tmp_path / "saved", params, architecture, huggingface.read_config(folder))
    again, params_again = load(tmp_path / "saved", dtype=dtype)
    assert again == architecture
    assert_same_bits(params_again, params)
    # And on disk: the same names, types and bytes, so that any other tool reads the same model.
    assert_same_bits(load_file(tmp_path / "saved" / "model.safetensors"), source)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == case["config"] | {"dtype": dtype}


def test_a_saved_config_tells_the_type_of_the_saved_weights(tmp_path, qwen3):
    architecture, params = load(qwen3, dtype="bfloat16")
    weights.save(tmp_path / "new", params, architecture, huggingface.read_config(qwen3))
    assert huggingface.read_config(tmp_path / "new")["dtype"] == "bfloat16"
    old = {key: value for key, value in huggingface.read_config(qwen3).items() if key != "dtype"}
    weights.save(tmp_path / "old", params, architecture, old)
    assert huggingface.read_config(tmp_path / "old")["torch_dtype"] == "bfloat16"


def test_a_large_model_is_saved_in_parts_with_an_index(tmp_path, qwen3):
    architecture, params = load(qwen3)
    limit = 20_000
    weights.save(tmp_path / "parts", params, architecture, huggingface.read_config(qwen3), shard_bytes=limit)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    tensors = [load_file(file) for file in files]
    assert max(sum(tensor.nbytes for tensor in part.values()) for part in tensors) <= limit
    index = json.loads((tmp_path / "parts" / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["weight_map"] == {name: file.name for file, part in zip(files, tensors, strict=True) for name in part}
    _, again = load(tmp_path / "parts")
    assert_same_bits(again, params)


def test_parameters_of_several_types_are_not_saved(tmp_path, qwen3):
    architecture, params = load(qwen3)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="several types"):
        weights.save(tmp_path / "mixed", params, architecture, huggingface.read_config(qwen3))
    params["final_norm"]["scale"] = jnp.zeros(31)
    with pytest.raises(ValueError, match=r"final_norm/scale has the shape \(31,\), but the architecture \(32,\)"):
        weights.save(tmp_path / "mixed", params, architecture, huggingface.read_config(qwen3))


def test_a_save_that_fails_leaves_nothing(tmp_path, qwen3, monkeypatch):
    architecture, params = load(qwen3)

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        weights.save(tmp_path / "export" / "model", params, architecture, huggingface.read_config(qwen3))
    assert list((tmp_path / "export").iterdir()) == []


def test_a_save_takes_files_along_and_overwrites_nothing(tmp_path, qwen3):
    architecture, params = load(qwen3)
    config = huggingface.read_config(qwen3)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights.save(tmp_path / "new", params, architecture, config, beside=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(InputError, match=r"new exists and is not empty\. Delete it"):
        weights.save(tmp_path / "new", params, architecture, config)
    (tmp_path / "empty").mkdir()
    weights.save(tmp_path / "empty", params, architecture, config)
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_on_a_mesh_each_device_reads_its_part_alone(qwen3, monkeypatch):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])
    read = {}
    blocks = weights._blocks

    def watched(tensor, index):
        for at, block in blocks(tensor, index):
            read.setdefault(tensor.name, []).append(block.shape)
            yield at, block

    monkeypatch.setattr(weights, "_blocks", watched)

    def place(path, shape):
        columns = path[-2] in ("q_proj", "gate_proj")
        rows = path[-2] in ("down_proj", "embedding")
        return NamedSharding(mesh, P(None, "model") if columns else P("model") if rows else P())

    architecture = huggingface.architecture(qwen3, dtype="float32")
    params = weights.load(qwen3, architecture, place=place)
    # Of the stored [out, in]: a quarter for each of four pairs of devices, and what all eight hold once.
    assert read["model.layers.0.self_attn.q_proj.weight"] == [(10, 32)] * 4
    assert read["model.layers.0.mlp.down_proj.weight"] == [(32, 12)] * 4
    assert read["model.embed_tokens.weight"] == [(10, 32)] * 4
    assert read["model.norm.weight"] == [(32,)]
    assert_same_bits(params, weights.load(qwen3, architecture))
    kernel = params["layers_0"]["q_proj"]["kernel"]
    assert {part.data.shape for part in kernel.addressable_shards} == {(32, 10)}


def test_tensors_of_more_than_a_block_are_read_whole(qwen3, monkeypatch):
    architecture = huggingface.architecture(qwen3, dtype="float32")
    params = weights.load(qwen3, architecture)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 3 * 32 * 4 + 5)  # three rows, of 40
    assert_same_bits(weights.load(qwen3, architecture), params)


MEMORY = """
import sys
from pathlib import Path
import jax
from ctrl_jax.models import huggingface, weights

def peak():  # in bytes; unlike ru_maxrss, not that of the process that started this one
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
architecture = huggingface.architecture(folder, dtype="float32")
jax.block_until_ready(jax.device_put(0.0))
before = peak()
params = weights.load(folder, architecture)
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_needs_hardly_more_memory_than_the_model(tmp_path, stored):
    # As in the smallest Gemma, most of it is the embedding, so that one copy of the largest tensor would show.
    config = cases.read("llama_biases")["config"]
    config |= {"vocab_size": 30_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = huggingface.architecture(tmp_path, dtype="float32")
    save_file(
        {name: np.zeros(target.stored, stored) for name, target in weights.targets(architecture).items()},
        tmp_path / "model.safetensors",
    )
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    grown, size = map(int, run.stdout.split())
    assert size > 90_000_000
    assert size <= grown <= 1.3 * size  # below 1, the measurement would be wrong


# What may be wrong with a directory. Each takes it, breaks it, and says what the error has to name.


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def lacks_a_tensor(folder):
    retensor(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    return r"no tensor model\.layers\.1\.mlp\.up_proj\.weight of shape \[48, 32\], nor 0 others"


def lacks_its_head(folder):
    retensor(folder, lambda tensors: tensors.pop("lm_head.weight"))
    return r"no tensor lm_head\.weight.*config\.json.*Set tie_word_embeddings to true"


def has_a_tensor_too_many(folder):
    retensor(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32))}))
    return r"model\.safetensors has a tensor model\.layers\.2\.mlp\.up_proj\.weight of shape \[48, 32\].*\(2 layers\)"


def has_biases_that_its_config_denies(folder):
    retensor(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(40)}))
    return r"has a tensor model\.layers\.0\.self_attn\.q_proj\.bias"


def has_another_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    return r"model\.safetensors: the tensor model\.embed_tokens\.weight has the shape \[40, 32\].*\[41, 32\]"


def is_transposed(folder):
    def change(tensors):
        tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)

    retensor(folder, change)
    return r"lm_head\.weight has the shape \[32, 40\], but config\.json asks for \[40, 32\]"


def is_quantized(folder):
    retensor(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((40, 32), np.int8)}))
    return r"lm_head\.weight is of type I8.*unquantized"


def is_truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return rf"model\.safetensors \({file.stat().st_size} bytes\) is truncated or no safetensors file.*Fetch it again"


def is_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return r"model\.safetensors \(0 bytes\) is truncated"


def has_a_corrupt_header(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    return r"model\.safetensors .* is truncated or no safetensors file"


def is_a_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return r"pointer of Git LFS.*git lfs pull"


def is_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"")
    return r"pytorch_model\.bin, a pickle.*never opened.*AutoModelForCausalLM as M.*save_pretrained"


def has_pickles_of_a_trainer_alone(folder):
    (folder / "model.safetensors").rename(folder / "training_args.bin")
    return r"neither model\.safetensors nor model\.safetensors\.index\.json"


def is_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    return r"model\.safetensors is a directory, where a file belongs"


def is_a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    return r"model\.safetensors is a pipe, a socket or a device, where a file belongs"


def is_a_link_to_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/0123")
    return r"model\.safetensors is a link to blobs/0123, which does not exist"


def is_not_finite(folder):
    retensor(folder, lambda tensors: np.put(tensors["model.layers.1.mlp.up_proj.weight"], 77, np.nan))
    return r"model\.safetensors: the tensor model\.layers\.1\.mlp\.up_proj\.weight has values that are NaN or infinite"


def has_ten_thousand_tensors_too_many(folder):
    more = {f"model.layers.{i}.mlp.up_proj.weight": np.zeros(1, np.float32) for i in range(2, 10_002)}
    retensor(folder, lambda tensors: tensors.update(more))
    return r"has a tensor model\.layers\.\d+\.mlp\.up_proj\.weight.* 9999 others"


def reheader(folder, change):
    """Changes the header of its weights, and not their data."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NORM = "model.norm.weight"


def has_tensors_that_overlap(folder):
    def change(header):
        header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]

    reheader(folder, change)
    return r"truncated or no safetensors file: the tensor \S+ begins at byte \d+, where \S+ ends at \d+"


def has_a_tensor_beyond_its_end(folder):
    reheader(folder, lambda header: header[NORM].update(data_offsets=[2**40, 2**40 + 128]))
    return "truncated or no safetensors file"


def has_a_shape_that_is_not_its_data(folder):
    reheader(folder, lambda header: header[NORM].update(shape=[2**31]))
    return r"the tensor model\.norm\.weight of type F32 and shape \[2147483648\] has 128 bytes"


def has_a_header_of_another_kind(folder):
    reheader(folder, lambda header: [header])
    return r"no safetensors file: its header is \["


def has_a_huge_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    return "its header would have 4611686018427387904 bytes"


def has_no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"neither model\.safetensors nor model\.safetensors\.index\.json"


@pytest.mark.parametrize(
    "broken",
    [
        lacks_a_tensor,
        lacks_its_head,
        has_a_tensor_too_many,
        has_biases_that_its_config_denies,
        has_another_vocabulary,
        is_transposed,
        is_quantized,
        is_truncated,
        is_empty,
        has_a_corrupt_header,
        is_a_pointer,
        is_pickled,
        has_no_weights,
        has_pickles_of_a_trainer_alone,
        is_a_folder,
        is_a_pipe,
        is_a_link_to_nothing,
        is_not_finite,
        has_ten_thousand_tensors_too_many,
        has_tensors_that_overlap,
        has_a_tensor_beyond_its_end,
        has_a_shape_that_is_not_its_data,
        has_a_header_of_another_kind,
        has_a_huge_header,
    ],
)
def test_a_directory_that_is_broken_is_refused(qwen3, broken):
    message = broken(qwen3)
    with pytest.raises(InputError, match=message) as caught:
        load(qwen3)
    assert str(qwen3) in str(caught.value)


def test_links_to_regular_files_are_read_as_in_the_caches_of_hugging_face(tmp_path, qwen3):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(qwen3 / name)
    assert_same_bits(load(tmp_path)[1], load(qwen3)[1])


@pytest.mark.parametrize(
    ("name", "auto", "options"),
    [
        ("qwen3", "AutoModelForCausalLM", ""),
        ("llama_classifier", "AutoModelForSequenceClassification", ", num_labels=1"),
        ("gemma3_classifier", "AutoModelForSequenceClassification", ", num_labels=1"),
    ],
)
def test_the_advice_for_pickled_weights_keeps_what_the_model_has(tmp_path, name, auto, options):
    folder = write(tmp_path / "it's a $HOME", cases.read(name))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="python -c") as caught:
        load(folder)
    (command,) = re.findall(r"python -c ('.*') and give", str(caught.value))
    (program,) = shlex.split(command)
    assert f"import {auto} as M; M.from_pretrained({json.dumps(str(folder))}{options})" in program
    compile(program, "advice", "exec")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype, bad, wanted, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 200)
    case = cases.read("qwen3")
    source = {name: tensor.astype(dtype) for name, tensor in cases.tensors(case).items()}
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", NORM):
        for place in (0, source[name].size // 2, -1):
            spoilt = source[name].copy()
            spoilt.flat[place] = bad
            folder = write(tmp_path / f"{name}-{place}", case, source | {name: spoilt})
            with pytest.raises(InputError, match=rf"the tensor {re.escape(name)} has values that are NaN or infinite"):
                load(folder, dtype=wanted)


def test_a_value_that_bfloat16_does_not_hold_is_refused_in_bfloat16(qwen3):
    retensor(qwen3, lambda tensors: np.put(tensors[NORM], 3, 3.4e38))  # bfloat16 ends at 3.39e38
    load(qwen3)
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are NaN or infinite in bfloat16"):
        load(qwen3, dtype="bfloat16")


def test_on_a_mesh_a_part_that_is_not_finite_is_found(qwen3):
    retensor(qwen3, lambda tensors: np.put(tensors["lm_head.weight"], -1, np.inf))
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])
    architecture = huggingface.architecture(qwen3, dtype="float32")

    def place(path, shape):
        return NamedSharding(mesh, P(None, "model") if path[0] == "head" else P())

    with pytest.raises(InputError, match=r"lm_head\.weight has values that are NaN or infinite"):
        weights.load(qwen3, architecture, place=place)


@pytest.fixture
def parts(tmp_path, qwen3):
    architecture, params = load(qwen3)
    weights.save(tmp_path / "parts", params, architecture, huggingface.read_config(qwen3), shard_bytes=20_000)
    return tmp_path / "parts"


def edit_index(folder, change):
    index = json.loads((folder / weights.INDEX).read_text())
    change(index)
    (folder / weights.INDEX).write_text(json.dumps(index))


def lacks_a_file(folder):
    (folder / "model-00002-of-00005.safetensors").unlink()
    return r"model-00002-of-00005\.safetensors is missing, though model\.safetensors\.index\.json names it"


def has_a_part_of_another_save(folder):
    shutil.copy(folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors")
    return r"The tensor \S+ is in .*, but not in .*"


def leads_out_of_its_folder(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": "../secret.safetensors"}))
    return r"index\.json names files outside of its folder.*\.\./secret"


def names_its_own_folder(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": ""}))
    return r"index\.json names files outside of its folder.*\[''\]"


def names_the_folder_above(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": ".."}))
    return r"index\.json names files outside of its folder.*'\.\.'"


def names_a_file_by_its_whole_path(folder):
    file = str(folder / "model-00001-of-00005.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    return r"index\.json names files outside of its folder"


def names_ten_thousand_files(folder):
    edit_index(folder, lambda index: index["weight_map"].update({f"x.{i}": f"{i}.safetensors" for i in range(10_000)}))
    return r"0\.safetensors is missing, though"


def has_no_map(folder):
    edit_index(folder, lambda index: index.pop("weight_map"))
    return r"model\.safetensors\.index\.json is no index"


def has_a_map_of_numbers(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": 3}))
    return r"model\.safetensors\.index\.json is no index"


def has_half_an_index(folder):
    (folder / weights.INDEX).write_text('{"weight_map": {')
    return r"model\.safetensors\.index\.json cannot be read as JSON"


@pytest.mark.parametrize(
    "broken",
    [
        lacks_a_file,
        has_a_part_of_another_save,
        leads_out_of_its_folder,
        names_its_own_folder,
        names_the_folder_above,
        names_a_file_by_its_whole_path,
        names_ten_thousand_files,
        has_no_map,
        has_a_map_of_numbers,
        has_half_an_index,
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, broken):
    assert len(list(parts.glob("*.safetensors"))) == 5
    message = broken(parts)
    with pytest.raises(InputError, match=message):
        load(parts)


def test_a_tied_model_may_hold_its_embedding_twice(gemma3):
    _, params = load(gemma3)
    retensor(gemma3, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    _, again = load(gemma3)
    assert_same_bits(again, params)


def test_a_tied_model_with_another_head_is_refused(gemma3):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    retensor(gemma3, change)
    with pytest.raises(InputError, match=r"lm_head\.weight that is not model\.embed_tokens\.weight.*to false"):
        load(gemma3)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(qwen3):
    retensor(
        qwen3, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    )
    load(qwen3)


def test_a_language_model_has_no_reward_head(qwen3):
    architecture = huggingface.architecture(qwen3, dtype="float32")
    with pytest.raises(InputError, match=r"no tensor score\.weight"):
        weights.load_reward_head(qwen3, architecture)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("labels", [{"id2label": None}, {"id2label": None, "num_labels": None}, {}])
def test_the_head_says_how_many_labels_a_classifier_has(tmp_path, rows, labels):
    case = cases.read("llama_classifier")
    head = np.ones((rows, 32), np.float32)
    folder = write(tmp_path, case, cases.tensors(case) | {"score.weight": head}, **labels)
    architecture = huggingface.architecture(folder, dtype="float32")
    if rows == 1:
        weights.check(folder, architecture, reward=True)
        np.testing.assert_array_equal(weights.load_reward_head(folder, architecture)["kernel"], head.T)
        return
    for read in (weights.load_reward_head, partial(weights.check, reward=True)):
        with pytest.raises(
            InputError, match=rf"score\.weight has the shape \[{rows}, 32\].* with {rows} labels.*\[1, 32\]"
        ):
            read(folder, architecture)


def test_a_reward_head_of_another_width_is_refused(tmp_path):
    case = cases.read("llama_classifier")
    folder = write(tmp_path, case, cases.tensors(case) | {"score.weight": np.zeros((1, 31), np.float32)})
    with pytest.raises(InputError, match=r"score\.weight has the shape \[1, 31\].*\[1, 32\]"):
        weights.load_reward_head(folder, huggingface.architecture(folder, dtype="float32"))


def test_only_headers_are_read_to_check_a_directory(qwen3, monkeypatch):
    monkeypatch.setattr(weights, "_blocks", None)
    architecture = huggingface.architecture(qwen3, dtype="float32")
    weights.check(qwen3, architecture)
    with pytest.raises(InputError, match=r"no tensor score\.weight"):
        weights.check(qwen3, architecture, reward=True)
    lacks_a_tensor(qwen3)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        weights.check(qwen3, architecture)


def test_a_fingerprint_follows_the_content_alone(tmp_path, qwen3):
    print_ = weights.fingerprint(qwen3)
    assert re.fullmatch("[0-9a-f]{12}", print_)
    shutil.copytree(qwen3, tmp_path / "copy")
    assert weights.fingerprint(tmp_path / "copy") == print_
    architecture, params = load(qwen3)
    weights.save(tmp_path / "parts", params, architecture, huggingface.read_config(qwen3), shard_bytes=20_000)
    assert weights.fingerprint(tmp_path / "parts") == print_


def test_a_fingerprint_sees_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    case = cases.read("qwen3")
    file = write(tmp_path, case) / "model.safetensors"
    content, prints = file.read_bytes(), {weights.fingerprint(tmp_path)}
    start = 8 + int.from_bytes(content[:8], "little")
    places = {*range(start, len(content), 997), start, len(content) - 1}
    for time_ns, place in enumerate(places):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        os.utime(file, ns=(time_ns, time_ns))  # as if written at other times, however fast this test is
        prints.add(weights.fingerprint(tmp_path))
    assert len(prints) == 1 + len(places)


def test_a_fingerprint_of_many_tensors_takes_a_time_in_proportion(tmp_path):
    """Read once for each of its tensors, the header of this file would take minutes."""
    (tmp_path / "config.json").write_text("{}")
    save_file({f"tensor.{i}": np.zeros(1, np.float32) for i in range(20_000)}, tmp_path / "model.safetensors")
    started = time.perf_counter()
    weights.fingerprint(tmp_path)
    assert time.perf_counter() - started < 30


def test_a_fingerprint_sees_config_and_type(tmp_path, qwen3):
    print_ = weights.fingerprint(qwen3)
    case = cases.read("qwen3")
    assert weights.fingerprint(write(tmp_path / "config", case, rms_norm_eps=1e-5)) != print_
    zeros = {name: np.zeros(shape, np.float16) for name, shape in case["tensors"].items()}
    other = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in zeros.items()}
    first = weights.fingerprint(write(tmp_path / "f16", case, zeros))
    assert weights.fingerprint(write(tmp_path / "bf16", case, other)) != first


@pytest.mark.parametrize("name", cases.CAUSAL)
def test_a_classifier_that_is_saved_is_read_back(tmp_path, name):
    """Of every family, also where an output projection is of no use to it."""
    folder = write(tmp_path / "source", cases.read(name))
    architecture, params = load(folder)
    head = {"kernel": jnp.linspace(-1, 1, architecture.width)[:, None], "bias": jnp.zeros(1)}
    config = huggingface.classifier_config(folder, pad_token_id=3)
    weights.save_classifier(tmp_path / "saved", params, head, architecture, config, beside={"calibration.jsonl": b"x"})
    assert (tmp_path / "saved" / "calibration.jsonl").read_bytes() == b"x"
    assert huggingface.is_classifier(tmp_path / "saved") and huggingface.pad_token_id(tmp_path / "saved") == 3
    found = huggingface.architecture(tmp_path / "saved", dtype="float32")
    assert found == replace(architecture, tied_embeddings=True)
    weights.check(tmp_path / "saved", found, reward=True)
    trunk = weights.load(tmp_path / "saved", found)
    jax.tree.map(np.testing.assert_array_equal, trunk, {name: params[name] for name in params if name != "head"})
    np.testing.assert_array_equal(weights.load_reward_head(tmp_path / "saved", found)["kernel"], head["kernel"])


@pytest.mark.parametrize("name", cases.CAUSAL)
def test_what_is_saved_here_transformers_reads_with_equal_logits(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "source", cases.read(name))
    architecture, params = load(folder)
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)  # as after training
    weights.save(tmp_path / "saved", params, architecture, huggingface.read_config(folder))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = np.asarray(logits(architecture, params))
    for row, (prompt, length) in enumerate(zip(cases.PROMPTS, cases.PROMPT_LENGTHS, strict=True)):
        for sample, response in enumerate(cases.RESPONSES[row]):
            with torch.no_grad():
                expected = model(torch.tensor([[*prompt[:length], *response]])).logits[0, length - 1 : -1]
            np.testing.assert_allclose(found[row, sample], expected.numpy(), rtol=0, atol=2e-4)
