"""Weights of a Hugging Face directory: safetensors to the decoder's parameters, and back. Nothing is unpickled.

A checkpoint stores a projection as [out, in], linen as [in, out]; the other tensors are alike. Tensors are read one at
a time, in blocks of rows, straight into the memory that the array keeps, so that loading needs little more memory than
the model itself, and on a mesh each device's part alone.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from ctrl_jax.errors import InputError
from ctrl_jax.models import files, huggingface
from ctrl_jax.models.architecture import MATRICES, Architecture
from ctrl_jax.models.files import Tensor
from ctrl_jax.types import Params

Place = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]
"""Where the parameter of this path and shape lives, such as (("layers_0", "q_proj", "kernel"), (576, 576))."""

INDEX = "model.safetensors.index.json"
SCORE = "score.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of rows read at once: small enough to be transposed in the cache, several times as fast as a large tensor at once.
BLOCK_BYTES = 2 << 20
# What jax's CPU backend asks of memory that it takes over instead of copying it.
ALIGNMENT = 64


class Target(NamedTuple):
    """A parameter that a tensor of a checkpoint becomes."""

    path: tuple[str, ...]
    stored: tuple[int, ...]
    """Shape in the checkpoint."""
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored[::-1] if self.transposed else self.stored


def targets(architecture: Architecture) -> dict[str, Target]:
    """The tensors of a language model's checkpoint by name, and the parameters they become."""
    width, head_dim, shapes = architecture.width, architecture.head_dim, architecture.shapes()
    found = {"model.embed_tokens.weight": Target(("embedding", "embedding"), (architecture.vocabulary_size, width))}
    norms = [("input_layernorm", "attention_norm", width)]
    if architecture.post_norms:
        # The same name as below, for another norm: Gemma's is after attention, the others' before the MLP.
        norms += [
            ("post_attention_layernorm", "attention_post_norm", width),
            ("pre_feedforward_layernorm", "mlp_norm", width),
            ("post_feedforward_layernorm", "mlp_post_norm", width),
        ]
    else:
        norms += [("post_attention_layernorm", "mlp_norm", width)]
    if architecture.query_key_norm:
        norms += [("self_attn.q_norm", "q_norm", head_dim), ("self_attn.k_norm", "k_norm", head_dim)]
    for index in range(len(architecture.layers)):
        prefix, layer = f"model.layers.{index}", f"layers_{index}"
        for matrix in MATRICES:
            name, path, shape = f"{prefix}.{matrix.block}.{matrix.name}", (layer, matrix.name), shapes[matrix.name]
            found[f"{name}.weight"] = Target((*path, "kernel"), (shape.outputs, shape.inputs), transposed=True)
            if shape.bias:
                found[f"{name}.bias"] = Target((*path, "bias"), (shape.outputs,))
        for name, norm, size in norms:
            found[f"{prefix}.{name}.weight"] = Target((layer, norm, "scale"), (size,))
    found["model.norm.weight"] = Target(("final_norm", "scale"), (width,))
    if not architecture.tied_embeddings:
        found["lm_head.weight"] = Target(("head", "kernel"), (architecture.vocabulary_size, width), transposed=True)
    return found


def load(
    folder: Path,
    architecture: Architecture,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    place: Place | None = None,
) -> Params:
    """Parameters of the decoder of `architecture` (its trunk, for a sequence classifier).

    Args:
      dtype: of the parameters, by default the architecture's; float32, bfloat16 and float16 are read.
      place: the sharding of each parameter; by default all are on the first device. Of a part that lives on devices
        of other processes nothing is read here.

    Raises:
      InputError: where weights are missing, left over, misshapen, truncated, corrupt, quantized, pickled, NaN or
        infinite; it names the file, the tensor, and both shapes. Values are checked where they are read.
    """
    folder = Path(folder)
    wanted = targets(architecture)
    with files.reading(folder):
        stored = _inventory(folder)
        _compare(folder, wanted, stored, architecture)
    params: Params = {}
    # The largest first: what converts it on the way is then beside an empty tree.
    for name in sorted(wanted, key=lambda name: -int(np.prod(wanted[name].stored))):
        target = wanted[name]
        array = read(stored[name], target, np.dtype(dtype or architecture.dtype), place)
        node = params
        for key in target.path[:-1]:
            node = node.setdefault(key, {})
        node[target.path[-1]] = array
    return params


def load_reward_head(folder: Path, architecture: Architecture, *, place: Place | None = None) -> Params:
    """The head of a sequence classifier with one label: kernel [D, 1] and a bias [1] of 0, in float32.

    Raises:
      InputError: as `load`.
    """
    stored = _inventory(Path(folder))
    target = _check_head(Path(folder), stored, architecture)
    sharding = _sharding(place, ("head", "bias"), (1,))
    bias = jax.make_array_from_callback((1,), sharding, lambda index: np.zeros(1, np.float32)[index])
    return {"kernel": read(stored[SCORE], target, np.dtype("float32"), place), "bias": bias}


def check(folder: Path, architecture: Architecture, *, reward: bool = False) -> None:
    """Compares what the directory holds with what `load` (and, of a `reward`, `load_reward_head`) will read.

    Only headers are read, so that a directory which does not fit is refused before any work.

    Raises:
      InputError: as `load`, but for values that are not finite.
    """
    folder = Path(folder)
    with files.reading(folder):
        stored = _inventory(folder)
        _compare(folder, targets(architecture), stored, architecture)
        if reward:
            _check_head(folder, stored, architecture)


def _head(architecture: Architecture) -> Target:
    return Target(("head", "kernel"), (1, architecture.width), transposed=True)


def _check_head(folder: Path, stored: dict[str, Tensor], architecture: Architecture) -> Target:
    """The head of a sequence classifier, whose shape says how many labels it has: config.json may be silent."""
    target = _head(architecture)
    if SCORE not in stored:
        raise InputError(
            f"{folder} has no tensor {SCORE}, the head of a reward model.",
            field=str(folder),
            value=None,
            remedy="Give the directory of a sequence classifier with one label.",
        )
    found = stored[SCORE]
    if found.shape[1:] == (architecture.width,) and found.shape[0] != 1:
        raise InputError(
            f"{found.file}: the tensor {SCORE} has the shape {list(found.shape)}, which makes it a classifier with "
            f"{found.shape[0]} labels, but a reward is one number, of shape {list(target.stored)}.",
            field=str(found.file),
            value=found.shape,
            remedy="Use a model that was trained with num_labels=1.",
        )
    _check(found, target)
    return target


def save(
    folder: Path,
    params: Params,
    architecture: Architecture,
    config: dict[str, Any],
    *,
    beside: Iterable[Path] = (),
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers and other tools read: config.json and model.safetensors, in parts if large.

    It is written under another name and moved to its place when it is whole. The arrays must be addressable here.

    Args:
      params: of the decoder, as `load` returns them; all of one dtype, which they keep.
      config: of the model that they were loaded from (`huggingface.read_config`); its dtype is set to theirs.
      beside: files to copy into the directory, such as the tokenizer's.
      shard_bytes: above which the weights are split into files of at most this size, but of at least one tensor.

    Raises:
      InputError: if the folder exists and is not empty.
    """
    if not architecture.tied_embeddings:
        # An adapter may have untied them.
        config = {**config, "tie_word_embeddings": False}
    with new_folder(folder) as partial:
        for file in beside:
            shutil.copy(file, partial / Path(file).name)
        _write(partial, params, targets(architecture), config, shard_bytes)


def save_classifier(
    folder: Path,
    trunk: Params,
    head: Params,
    architecture: Architecture,
    config: dict[str, Any],
    *,
    beside: Mapping[str, bytes],
    shard_bytes: int = 5_000_000_000,
) -> None:
    """As `save`, a sequence classifier with one label, whose score is what `head` makes of the last token's features.

    Args:
      trunk: of the decoder; an output projection is left out.
      head: the kernel [D, 1]. A bias is left out, for such a head has none: rewards have no zero.
      config: of the classifier (`huggingface.classifier_config`).
      beside: what other files in the directory hold, by their names.
    """
    wanted = targets(replace(architecture, tied_embeddings=True)) | {SCORE: _head(architecture)}
    kernel = head["kernel"].astype(architecture.dtype)
    with new_folder(folder) as partial:
        for name, contents in beside.items():
            (partial / name).write_bytes(contents)
        _write(partial, {**trunk, "head": {"kernel": kernel}}, wanted, config, shard_bytes)


def _write(
    folder: Path, params: Params, wanted: Mapping[str, Target], config: Mapping[str, Any], shard_bytes: int
) -> None:
    """config.json and the weights. `config` gets their dtype."""
    leaves = {target.path: _leaf(params, target) for target in wanted.values()}
    dtype, *others = {str(leaf.dtype) for leaf in leaves.values()}
    if others:
        raise ValueError(f"the parameters are of several types, {dtype}, {', '.join(others)}; a config names one.")
    # transformers 5 writes the shorter name, and reads both.
    config = {**config, "dtype" if "dtype" in config else "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    itemsize = np.dtype(dtype).itemsize
    sizes = {name: itemsize * int(np.prod(target.stored)) for name, target in wanted.items()}
    shards = _shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file_name = file_name if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        # Contiguous, because save_file writes the memory of an array whatever its strides.
        tensors = {
            name: np.ascontiguousarray(leaf.T if wanted[name].transposed else leaf)
            for name in names
            for leaf in [np.asarray(leaves[wanted[name].path])]
        }
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when it is whole, and vanishes if it is not.

    Its files may be read by whom the umask says. What a killed process left of it is removed by the next one.

    Errors: as `check_new`; InputError if another process is filling it.
    """
    check_new(folder)
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another process is writing {folder}.",
                field=str(folder),
                value=None,
                remedy="Wait for it, or save to another place.",
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            _remove_contents(partial)
            yield partial
            for file in partial.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.chmod(os.fstat(lock.fileno()).st_mode)  # safetensors writes 0600
            (partial / ".lock").unlink()
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _remove_contents(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_new(folder: Path) -> None:
    """Errors: InputError if the folder exists and is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} exists and is not empty.",
            field=str(folder),
            value=None,
            remedy="Delete it, or save to another place.",
        )


def fingerprint(folder: Path) -> str:
    """12 hex digits of the config and the weights, which follow from all that `load` and `load_reward_head` read.

    It covers the values in config.json, and the name, type, shape and every byte of each tensor in model.safetensors,
    or in the files that model.safetensors.index.json names. It does not cover how a model is split into files, nor
    their metadata. The tokenizer's files, the template among them, have a fingerprint of their own
    (`pretrained_tokenizers`), and so has an adapter. It takes as long as reading the files once, by several threads,
    and is computed once in a process as long as the files have their sizes and times.

    Raises:
      InputError: as `load`, on files that are missing or no safetensors.
    """
    folder = Path(folder)
    with files.reading(folder):
        found = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")]
        state = tuple((path.name, *_state(path)) for path in found if path.is_file())
        return _fingerprint(folder.absolute(), state)


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(8)
def _fingerprint(folder: Path, state: tuple[tuple[str | int, ...], ...]) -> str:
    digest = hashlib.sha256(json.dumps(huggingface.read_config(folder), sort_keys=True).encode())
    tensors = [tensor for _, tensor in sorted(_inventory(folder).items())]
    # The hash and the reading let other threads run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tensor, hashed in zip(tensors, pool.map(_hash, tensors), strict=True):
            digest.update(f"\n{tensor.name} {tensor.dtype} {list(tensor.shape)} ".encode() + hashed)
    return digest.hexdigest()[:12]


def _hash(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for first in range(tensor.start, tensor.end, BLOCK_BYTES):
            digest.update(file.read(min(BLOCK_BYTES, tensor.end - first)))
    return digest.digest()


def _inventory(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory by name, from the headers of its files."""
    single, index = folder / "model.safetensors", folder / INDEX
    if files.exists(single):
        return files.read_header(single)
    if not files.exists(index):
        raise _no_weights(folder)
    found: dict[str, Tensor] = {}
    for file_name, promised in _weight_map(index).items():
        file = folder / file_name
        if not files.exists(file):
            raise InputError(
                f"{file} is missing, though {INDEX} names it.",
                field=str(file),
                value=None,
                remedy="Fetch the model again.",
            )
        present = files.read_header(file)
        for name in sorted(promised ^ present.keys()):
            one, other = (INDEX, file) if name in promised else (file, INDEX)
            raise InputError(
                f"The tensor {files.shown(name)} is in {one}, but not in {other}.",
                field=str(file),
                value=name,
                remedy="Fetch the model again.",
            )
        found |= present
    return found


def _weight_map(index: Path) -> dict[str, set[str]]:
    """The names of the tensors that each file holds, as an index promises them."""
    values = files.read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index} is no index of safetensors files, which has a weight_map of tensors' names to files' names: it "
            f"holds {files.shown(values)}.",
            field=str(index),
            value=values,
            remedy="Fetch it again.",
        )
    promised: dict[str, set[str]] = {}
    for tensor, file_name in weight_map.items():
        promised.setdefault(file_name, set()).add(tensor)
    outside = [
        name for name in sorted(promised) if name in ("", "..") or Path(name).name != name or not name.isprintable()
    ]
    if outside:
        raise InputError(
            f"{index} names files outside of its folder: {files.shown(outside)}.",
            field=str(index),
            value=outside,
            remedy="Fetch the model again.",
        )
    return dict(sorted(promised.items()))


# Pickles beside a model that hold no weights: of the trainer of transformers.
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state")


def _no_weights(folder: Path) -> InputError:
    with files.reading(folder):
        pickled = sorted(
            file.name
            for suffix in ("*.bin", "*.pt", "*.pth")
            for file in folder.glob(suffix)
            if not file.name.startswith(NO_WEIGHTS)
        )
    if not pickled:
        return InputError(
            f"{folder} has neither model.safetensors nor {INDEX}.",
            field=str(folder),
            value=None,
            remedy="Fetch the weights of the model.",
        )
    # The class makes the head: a causal language model would leave a classifier's unread.
    auto, options = "AutoModelForCausalLM", ""
    if huggingface.is_classifier(folder):
        auto, options = "AutoModelForSequenceClassification", ", num_labels=1"
    program = (
        f"from transformers import {auto} as M; "
        f'M.from_pretrained({json.dumps(str(folder))}{options}).save_pretrained("converted")'
    )
    return InputError(
        f"{folder} has its weights in {pickled[0]}, a pickle, which could run any code and is never opened here.",
        field=str(folder),
        value=pickled[0],
        remedy="If you trust it, convert it to safetensors, where torch and transformers are installed, with python -c "
        f"{shlex.quote(program)} and give the folder converted, with the tokenizer's files copied into it.",
    )


def _compare(folder: Path, wanted: dict[str, Target], stored: dict[str, Tensor], architecture: Architecture) -> None:
    """Raises InputError unless the directory holds what the architecture asks for, and nothing else of note."""
    config = folder / "config.json"
    if "lm_head.weight" in wanted and "lm_head.weight" not in stored:
        raise InputError(
            f"{folder} has no tensor lm_head.weight, though {config} says that the embedding is not the output "
            "projection too.",
            field=str(folder),
            value=None,
            remedy="Set tie_word_embeddings to true there if the model was trained so, or fetch it again.",
        )
    missing = [name for name in wanted if name not in stored]
    if missing:
        shape = list(wanted[missing[0]].stored)
        raise InputError(
            f"{folder} has no tensor {missing[0]} of shape {shape}, nor {len(missing) - 1} others that {config} asks "
            "for.",
            field=str(folder),
            value=missing,
            remedy="Fetch the model again, weights and config.json.",
        )
    for name, target in wanted.items():
        _check(stored[name], target)
    extra = [name for name in stored if name not in wanted and not _known(name)]
    if extra:
        tensor = stored[extra[0]]
        raise InputError(
            f"{tensor.file} has a tensor {tensor.name} of shape {list(tensor.shape)}, and there are {len(extra) - 1} "
            f"others that no model of {config} has ({len(architecture.layers)} layers).",
            field=str(tensor.file),
            value=tensor.name,
            remedy="Fetch the model again, weights and config.json.",
        )
    # A classifier has no output projection, so a leftover one is of no consequence.
    if "lm_head.weight" in stored and architecture.tied_embeddings and SCORE not in stored:
        _check_tied(config, stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def _known(name: str) -> bool:
    # Old Llama checkpoints keep the rotary frequencies, which follow from the config.
    return name in ("lm_head.weight", SCORE) or name.endswith(".rotary_emb.inv_freq")


def check_type(tensor: Tensor) -> None:
    """Errors: InputError unless the tensor's values are of a type that is read."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{tensor.file}: the tensor {tensor.name} is of type {tensor.dtype}, and only {', '.join(DTYPES)} are "
            "read.",
            field=str(tensor.file),
            value=tensor.dtype,
            remedy="Use the unquantized one.",
        )


def _check(tensor: Tensor, target: Target) -> None:
    if tensor.shape != target.stored:
        raise InputError(
            f"{tensor.file}: the tensor {tensor.name} has the shape {list(tensor.shape)}, but config.json asks for "
            f"{list(target.stored)}.",
            field=str(tensor.file),
            value=tensor.shape,
            remedy="Fetch the model again, weights and config.json.",
        )
    check_type(tensor)


def _check_tied(config: Path, head: Tensor, embedding: Tensor) -> None:
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or any(
        a.tobytes() != b.tobytes()
        for (_, a), (_, b) in zip(_blocks(head, _whole(head)), _blocks(embedding, _whole(embedding)), strict=True)
    ):
        raise InputError(
            f"{head.file} has a tensor lm_head.weight that is not {embedding.name}, though {config} says that they "
            "are one.",
            field=str(head.file),
            value=head.name,
            remedy="Set tie_word_embeddings to false there to use both.",
        )


def _whole(tensor: Tensor) -> tuple[slice, ...]:
    return (slice(None),) * len(tensor.shape)


def _sharding(place: Place | None, path: tuple[str, ...], shape: tuple[int, ...]) -> Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if place is None else place(path, shape)


def read(tensor: Tensor, target: Target, dtype: np.dtype, place: Place | None) -> jax.Array:
    """The parameter that a stored tensor becomes; each device's part is read and checked alone. Errors: as `load`."""

    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # which jax leaves open for arrays without a shape
        # Devices that hold the same part share one read of it.
        key = tuple(cut.indices(size) for cut, size in zip(index, target.shape, strict=True))
        if key not in parts:
            with files.reading(f"{tensor.file}: the tensor {tensor.name}"):
                parts[key] = _read(tensor, target, index, dtype)
        return parts[key]

    array = jax.make_array_from_callback(target.shape, _sharding(place, target.path, target.shape), part)
    # The copy to an accelerator goes on in the background: without this, all tensors could be in this memory at once.
    return jax.block_until_ready(array)


def read_here(tensor: Tensor) -> np.ndarray:
    """All of a small tensor in this host's memory, as it is stored, in float32. Errors: as `load`."""
    with files.reading(f"{tensor.file}: the tensor {tensor.name}"):
        return _read(tensor, Target((), tensor.shape), _whole(tensor), np.dtype("float32"))


def _read(tensor: Tensor, target: Target, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A part of the parameter, from the same part of the tensor alone."""
    starts_ends = [cut.indices(size) for cut, size in zip(index, target.shape, strict=True)]
    out = _aligned(tuple(end - start for start, end, _ in starts_ends), dtype)
    rows = out.T if target.transposed else out
    for at, block in _blocks(tensor, index[::-1] if target.transposed else index):
        converted = block.astype(dtype, copy=False)
        if not _finite(converted):
            raise InputError(
                f"{tensor.file}: the tensor {tensor.name} has values that are NaN or infinite in {dtype}.",
                field=str(tensor.file),
                value=tensor.name,
                remedy="Fetch the file again; if it was published so, use another model.",
            )
        rows[at] = converted
    return out


def _blocks(tensor: Tensor, index: tuple[slice, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of tensor[index], some at a time, each with its place in it."""
    start, end, _ = index[0].indices(tensor.shape[0])
    dtype = jnp.dtype(DTYPES[tensor.dtype])
    row_bytes = int(np.prod(tensor.shape[1:])) * dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(start, end, step):
        last = min(first + step, end)
        # Mapped for each block: the pages of the file that were read count as this process's memory until then.
        block = np.memmap(tensor.file, dtype, "r", tensor.start + first * row_bytes, (last - first, *tensor.shape[1:]))
        yield slice(first - start, last - start), np.asarray(block)[(slice(None), *index[1:])]


def _finite(values: np.ndarray) -> bool:
    """Whether no value of float32 or bfloat16 is NaN or infinite."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    # All bits of the exponent are set in those alone. np.isfinite takes five times as long for bfloat16.
    return not np.any(np.bitwise_and(values.view(np.uint16), 0x7F80) == 0x7F80)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _leaf(params: Params, target: Target) -> jax.Array:
    leaf = params
    for key in target.path:
        leaf = leaf[key]
    if leaf.shape != target.shape:
        raise ValueError(f"{'/'.join(target.path)} has the shape {leaf.shape}, but the architecture {target.shape}.")
    return leaf


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut where the next tensor would take a file above the limit."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
