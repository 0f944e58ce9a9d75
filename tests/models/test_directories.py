"""Hostile directories: whatever is wrong with a model or an adapter, reading it is soon done, or an InputError."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import traceback
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctrl_jax.config import Lora
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, lora, peft, weights
from tests.pipeline.pretrained import CLASSIFIER, write_model

SECONDS = 30  # a hang would not end at all; a busy machine is slow
"""That an input may take at most, on a busy machine; a directory of this size takes a few hundredths of one."""


class TookTooLong(BaseException):
    """No Exception, so that nothing under test takes it for its own."""


@contextlib.contextmanager
def deadline(seconds=SECONDS):
    def ring(signum, frame):
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    # Again each second: an exception in a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Bases:
    model: Path
    parts: Path
    classifier: Path
    adapter: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The directories that are mutated, each file a few KB."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 260}
    model = write_model(root / "model", **sizes)
    classifier = write_model(root / "classifier", **sizes, **CLASSIFIER)
    architecture = huggingface.architecture(model, dtype="float32")
    params = weights.load(model, architecture)
    weights.save(root / "parts", params, architecture, huggingface.read_config(model), shard_bytes=1000)
    settings = Lora(rank=2, targets=("q_proj", "down_proj"))
    peft.save(root / "adapter", lora.init(params, settings, jax.random.key(0)), architecture, settings, base="model")
    more = {"base_model.model.lm_head.weight": np.ones((260, 8), np.float32)}
    save_file(load_file(root / "adapter" / peft.WEIGHTS) | more, root / "adapter" / peft.WEIGHTS, {"format": "pt"})
    config = json.loads((root / "adapter" / peft.CONFIG).read_text()) | {"modules_to_save": ["lm_head"]}
    (root / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    return Bases(model, root / "parts", classifier, root / "adapter")


def read_everything(folder, base):
    """All that a run reads of a directory; of an adapter with its base. What comes of it is finite."""
    if base is not None:
        architecture = huggingface.architecture(base, dtype="float32")
        peft.files(folder)
        peft.architecture(folder, architecture)
        adapter = peft.load(folder, architecture, base=base)
        params = peft.merge(weights.load(base, architecture), adapter)
    else:
        architecture = huggingface.architecture(folder, dtype="float32")
        huggingface.context(folder)
        classifier = huggingface.is_classifier(folder)
        weights.fingerprint(folder)
        weights.check(folder, architecture, reward=classifier)
        params = weights.load(folder, architecture)
        if classifier:
            params = {"trunk": params, "head": weights.load_reward_head(folder, architecture)}
    for leaf in jax.tree.leaves(params):
        assert np.isfinite(np.asarray(leaf)).all()


# As JSON texts, since some are none that a dict could hold.
VALUES = (
    "-1", "0", "1", "2", "3", "-7.5", "0.5", "1e-300", "1e300", "1e400", "NaN", "-Infinity", str(2**31),
    str(2**63), "9" * 400, "9" * 5000, "true", "false", "null", '""', '"x"', '"silu"', f'"{"x" * 100_000}"',
    '"\\ud800"', "[]", "{}",
    "[1]", '["full_attention"]', '["sliding_attention"]', f"[{'0,' * 100_000}0]", '{"rope_type": "linear"}',
    '{"rope_type": "llama3", "factor": 1e300}', '{"rope_type": ["x"], "factor": "y"}', '{"full_attention": {}}',
    '{"full_attention": []}', '{"0": "a", "1": "b"}', "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    '["LlamaForCausalLM"]', '["Gemma3ForCausalLM"]', '["Qwen3ForCausalLM"]', '["Qwen2ForSequenceClassification"]',
    '{"a": 1, "a": 2}',
)  # fmt: skip
KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act",
    "tie_word_embeddings", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "max_window_layers",
    "use_sliding_window", "attention_bias", "mlp_bias", "id2label", "num_labels", "quantization_config",
    "partial_rotary_factor", "original_max_position_embeddings", "use_bidirectional_attention", "dtype",
)  # fmt: skip
ADAPTER_KEYS = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora",
    "layers_to_transform",
    "bias", "rank_pattern", "trainable_token_indices", "init_lora_weights", "use_dora", "unheard_of",
)  # fmt: skip


def replace_file(file, content):
    """Anew, and not through the hard link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def a_value(draw, folder):
    adapter = (folder / peft.CONFIG).exists()
    file = folder / (peft.CONFIG if adapter else "config.json")
    key, value = draw.choice(ADAPTER_KEYS if adapter else KEYS), draw.choice(VALUES)
    config = json.loads(file.read_text()) | {key: "HERE"}
    if draw.random() < 0.2:
        del config[key]
    replace_file(file, json.dumps(config).replace('"HERE"', value).encode())
    return f"{key} = {value[:40]}"


def a_family(draw, folder):
    """Another family's defaults for all that the file leaves out, with a hostile value in it."""
    file = folder / "config.json"
    if not file.exists():
        return a_value(draw, folder)
    family = draw.choice(sorted(huggingface.FAMILIES))
    config = json.loads(file.read_text()) | {"architectures": [f"{family}ForCausalLM"]}
    replace_file(file, json.dumps(config).encode())
    return f"{family}, {a_value(draw, folder)}"


def a_content(draw, folder):
    file = draw.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    content = bytearray(file.read_bytes())
    how = draw.choice(("truncated", "flipped", "emptied", "doubled", "swapped", "noise", "pointer", "sparse"))
    if how == "truncated":
        content = content[: draw.randrange(len(content) + 1)]
    elif how == "flipped":
        for _ in range(draw.choice((1, 1, 5, 50))):
            # Half of them in the header, which is most of what can be read in different ways.
            at = draw.randrange(min(len(content), draw.choice((400, len(content)))) or 1)
            content[at : at + 1] = bytes([content[at] ^ 1 << draw.randrange(8)])
    elif how == "swapped":
        content = draw.choice([path for path in sorted(folder.iterdir()) if path.is_file()]).read_bytes()
    elif how == "noise":
        content = draw.randbytes(draw.choice((1, 8, 100, 5000)))
    elif how == "pointer":
        content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    else:
        content = {"emptied": b"", "doubled": content * 2, "sparse": content}[how]
    replace_file(file, bytes(content))
    if how == "sparse":
        os.truncate(file, 1 << 40)
    return f"{file.name} {how}"


def a_thing(draw, folder):
    file = draw.choice(sorted(folder.iterdir()))
    how = draw.choice(("missing", "directory", "pipe", "socket", "dangling", "loop", "device", "link"))
    kept = file.with_name("kept")
    file.rename(kept)
    if how == "directory":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "socket":
        with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    elif how != "missing":
        file.symlink_to({"dangling": "nowhere", "loop": file.name, "device": "/dev/zero", "link": kept.name}[how])
    return f"{file.name} {how}"


def entries(draw, header):
    """A header, as a safetensors file has it, with something wrong."""
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    how = draw.choice(("many", "field", "number", "twice", "extra", "metadata", "names", "another"))
    if how == "many":
        end = max(header[name]["data_offsets"][1] for name in names)
        header |= {f"x.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(10_000)}
    elif how == "field":
        header[name][draw.choice(("dtype", "shape", "data_offsets"))] = json.loads(draw.choice(VALUES[:8]))
    elif how == "number":
        numbers = header[name][draw.choice(("shape", "data_offsets"))]
        numbers[draw.randrange(len(numbers))] = draw.choice((0, 1, -1, 4, 2**31, 2**62, 2**64, 10**300, 1.0, True))
    elif how == "extra":
        header["surplus"] = header[name]
    elif how == "metadata":
        header["__metadata__"] = json.loads(draw.choice(VALUES[:8]))
    elif how == "names":
        header[draw.choice(("", "\x1b[2J", "a\nb", "x" * 100_000, "\ud800"))] = header.pop(name)
    elif how == "another":
        header[name]["dtype"] = draw.choice(("F64", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "F4", "x" * 1000))
    text = json.dumps(header)
    if how == "twice":
        text = text[:-1] + f', "{name}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}'
    return text.encode(), how


def a_header(draw, folder):
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text, how = draw.choice((entries, entries, raw))(draw, json.loads(content[8 : 8 + length]))
    size = (
        len(text) if draw.random() < 0.9 else draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(text) - 1, len(text) + 1))
    )
    replace_file(file, struct.pack("<Q", size) + text + content[8 + length :])
    return f"{file.name} header of {size}: {how}"


def raw(draw, header):
    text = draw.choice(VALUES)
    return text.encode("utf-8", "surrogatepass"), text[:40]


def a_number(draw, folder):
    """NaN or infinity in one place of one tensor."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    at = draw.randrange(tensors[name].size)
    tensors[name].flat[at] = draw.choice((np.nan, np.inf, -np.inf, 3e38))
    file.unlink()
    save_file(tensors, file)
    return f"{name}[{at}] = {tensors[name].flat[at]}"


def a_map(draw, folder):
    file = folder / weights.INDEX
    if not file.exists():
        return a_header(draw, folder)
    index = json.loads(file.read_text())
    mapped = index["weight_map"]
    name = draw.choice(sorted(mapped))
    outside = (
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "../x.safetensors",
        "a/b",
        "a\0b",
        "x" * 5000,
        "config.json",
        "\ud800",
    )
    how = draw.choice((*outside, "value", "removed", "many", "files", "all"))
    if how == "value":
        mapped[name] = json.loads(draw.choice(VALUES[:9]))
    elif how == "removed":
        del mapped[name]
    elif how == "many":
        mapped |= {f"x.{i}": mapped[name] for i in range(10_000)}
    elif how == "files":
        mapped |= {f"x.{i}": f"{i}.safetensors" for i in range(10_000)}
    elif how == "all":
        index["weight_map"] = "HERE"
    else:
        mapped[name] = how
    replace_file(file, json.dumps(index).replace('"HERE"', draw.choice(VALUES)).encode())
    return f"index: {how[:40]}"


MUTATIONS = (a_value, a_value, a_value, a_family, a_content, a_content, a_thing, a_header, a_header, a_number, a_map)


def failures(bases, folder, seeds):
    """What of the mutated directories ended otherwise than it should, with the seed of each."""
    found, refused = [], 0
    for seed in seeds:
        draw = random.Random(seed)
        source = getattr(bases, draw.choice(("model", "parts", "classifier", "adapter")))
        target = folder / f"{source.name}-{seed}"
        shutil.copytree(source, target, copy_function=os.link)
        done = draw.choice(MUTATIONS)(draw, target)
        try:
            with deadline():
                read_everything(target, bases.model if source == bases.adapter else None)
        except InputError as error:
            refused += 1
            if str(target) not in str(error) or len(str(error)) > 3000 or not str(error).isprintable():
                found.append(f"{seed}: {source.name}, {done}: the message is {str(error)[:500]!r}")
        except (Exception, TookTooLong):
            found.append(f"{seed}: {source.name}, {done}: {traceback.format_exc(limit=-3)}")
        shutil.rmtree(target)
    assert refused > len(seeds) / 2, "most of them are beyond use"
    return found


def test_a_hundred_hostile_directories_are_read_or_refused(bases, tmp_path):
    assert failures(bases, tmp_path, range(120)) == []


@pytest.mark.slow
def test_many_hostile_directories_are_read_or_refused(bases, tmp_path):
    assert failures(bases, tmp_path, range(1000, 3000)) == []


def test_the_directories_are_right_before_they_are_mutated(bases):
    for folder in (bases.model, bases.parts, bases.classifier):
        read_everything(folder, None)
    read_everything(bases.adapter, bases.model)
