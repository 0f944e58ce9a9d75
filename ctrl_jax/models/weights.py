"""Weights of a Hugging Face directory: safetensors to the decoder's parameters, and back. Nothing is unpickled.

A checkpoint stores a projection as [out, in], linen as [in, out]; the other tensors are alike. Tensors are read one at
a time, in blocks of rows, straight into the memory that the array keeps, so that loading needs little more memory than
the model itself, and on a mesh each device's part alone.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface
from ctrl_jax.models.architecture import Architecture
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


class Tensor(NamedTuple):
    """A tensor as a file's header tells of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def targets(architecture: Architecture) -> dict[str, Target]:
    """The tensors of a language model's checkpoint by name, and the parameters they become."""
    width, head_dim, mlp_width = architecture.width, architecture.head_dim, architecture.mlp_width
    queries, keys = architecture.heads * head_dim, architecture.kv_heads * head_dim
    found = {"model.embed_tokens.weight": Target(("embedding", "embedding"), (architecture.vocabulary_size, width))}
    projections = [
        ("self_attn.q_proj", queries, width, architecture.qkv_bias),
        ("self_attn.k_proj", keys, width, architecture.qkv_bias),
        ("self_attn.v_proj", keys, width, architecture.qkv_bias),
        ("self_attn.o_proj", width, queries, architecture.output_bias),
        ("mlp.gate_proj", mlp_width, width, architecture.mlp_bias),
        ("mlp.up_proj", mlp_width, width, architecture.mlp_bias),
        ("mlp.down_proj", width, mlp_width, architecture.mlp_bias),
    ]
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
        for name, out, into, bias in projections:
            path = (layer, name.split(".")[1])
            found[f"{prefix}.{name}.weight"] = Target((*path, "kernel"), (out, into), transposed=True)
            if bias:
                found[f"{prefix}.{name}.bias"] = Target((*path, "bias"), (out,))
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
      InputError: where weights are missing, left over, misshapen, truncated, corrupt, quantized, or pickled; it names
        the file, the tensor, and both shapes.
    """
    folder = Path(folder)
    stored = _inventory(folder)
    wanted = targets(architecture)
    _compare(folder, wanted, stored, architecture)
    params: Params = {}
    # The largest first: what converts it on the way is then beside an empty tree.
    for name in sorted(wanted, key=lambda name: -int(np.prod(wanted[name].stored))):
        target = wanted[name]
        array = _array(stored[name], target, np.dtype(dtype or architecture.dtype), place)
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
    target = Target(("head", "kernel"), (1, architecture.width), transposed=True)
    if SCORE not in stored:
        raise InputError(
            f"{folder} has no tensor {SCORE}, the head of a reward model. Give the directory of a sequence classifier "
            "with one label."
        )
    _check(stored[SCORE], target)
    sharding = _sharding(place, ("head", "bias"), (1,))
    bias = jax.make_array_from_callback((1,), sharding, lambda index: np.zeros(1, np.float32)[index])
    return {"kernel": _array(stored[SCORE], target, np.dtype("float32"), place), "bias": bias}


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
    wanted = targets(architecture)
    leaves = {target.path: _leaf(params, target) for target in wanted.values()}
    dtype, *others = {str(leaf.dtype) for leaf in leaves.values()}
    if others:
        raise ValueError(f"the parameters are of several types, {dtype}, {', '.join(others)}; a config names one.")
    config = dict(config)
    # transformers 5 writes the shorter name, and reads both.
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype

    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in beside:
            shutil.copy(file, partial / Path(file).name)
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
            save_file(tensors, partial / file_name, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when it is whole, and vanishes if it is not.

    Errors: as `check_new`.
    """
    check_new(folder)
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new(folder: Path) -> None:
    """Errors: InputError if the folder exists and is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty. Delete it, or save to another place.")


def fingerprint(folder: Path) -> str:
    """12 hex digits of the config and the weights: all of config.json, and of each tensor its name, type, shape, bytes.

    All is read, as loading would, by as many threads as there are cores, and once in a process as long as the files
    have their sizes and times. One model split into other files, or with other metadata, is the same.

    Raises:
      InputError: as `load`, on files that are missing or no safetensors.
    """
    folder = Path(folder)
    found = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors") and path.is_file()]
    return _fingerprint(folder.absolute(), tuple((path.name, *_state(path)) for path in found))


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(8)
def _fingerprint(folder: Path, state: tuple[tuple[str | int, ...], ...]) -> str:
    stored = sorted(_inventory(folder).items())
    starts = {file: _starts(file) for file in {tensor.file for _, tensor in stored}}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = threads.map(lambda entry: _digest(entry[1].file, *starts[entry[1].file][entry[0]]), stored)
        of_all = hashlib.sha256(json.dumps(huggingface.read_config(folder), sort_keys=True).encode())
        for (name, tensor), digest in zip(stored, digests, strict=True):
            of_all.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {digest}\n".encode())
    return of_all.hexdigest()[:12]


def _starts(file: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor of a file are, from and to."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _digest(file: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(start)
        while block := opened.read(min(2**20, end - opened.tell())):
            digest.update(block)
    return digest.hexdigest()


def _inventory(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory by name, from the headers of its files."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return {tensor.name: tensor for tensor in _header(single)}
    if not index.exists():
        raise _no_weights(folder)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        plain = all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is no index of safetensors files, which has a weight_map of names: {error!r}. Fetch it again."
        ) from error
    if not plain:
        raise InputError(f"{index} names files outside of its folder: {files}. Fetch the model again.")
    found: dict[str, Tensor] = {}
    for file_name in files:
        file = folder / file_name
        if not file.exists():
            raise InputError(f"{file} is missing, though {INDEX} names it. Fetch the model again.")
        present = {tensor.name: tensor for tensor in _header(file)}
        promised = {name for name, place in weight_map.items() if place == file_name}
        for name in sorted(promised ^ present.keys()):
            one, other = (INDEX, file) if name in promised else (file, INDEX)
            raise InputError(f"The tensor {name} is in {one}, but not in {other}. Fetch the model again.")
        found |= present
    return found


def _no_weights(folder: Path) -> InputError:
    pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in folder.glob(suffix))
    if not pickled:
        return InputError(f"{folder} has neither model.safetensors nor {INDEX}. Fetch the weights of the model.")
    return InputError(
        f"{folder} has its weights in {pickled[0]}, a pickle, which could run any code and is never opened here. If "
        "you trust it, convert it to safetensors, where torch and transformers are installed, with python -c "
        '"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('converted')\"."
    )


def _header(file: Path) -> Iterator[Tensor]:
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                yield Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            pointer = opened.read(64).startswith(b"version https://git-lfs")
        if pointer:
            raise InputError(
                f"{file} is a pointer of Git LFS, not the weights. Run git lfs pull in its folder."
            ) from None
        raise InputError(
            f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors file: {error}. Fetch it again."
        ) from error


def _compare(folder: Path, wanted: dict[str, Target], stored: dict[str, Tensor], architecture: Architecture) -> None:
    """Raises InputError unless the directory holds what the architecture asks for, and nothing else of note."""
    config = folder / "config.json"
    if "lm_head.weight" in wanted and "lm_head.weight" not in stored:
        raise InputError(
            f"{folder} has no tensor lm_head.weight, though {config} says that the embedding is not the output "
            "projection too. Set tie_word_embeddings to true there if the model was trained so, or fetch it again."
        )
    missing = [name for name in wanted if name not in stored]
    if missing:
        shape = list(wanted[missing[0]].stored)
        raise InputError(
            f"{folder} has no tensor {missing[0]} of shape {shape}, nor {len(missing) - 1} others that {config} "
            "asks for. Fetch the model again, weights and config.json."
        )
    for name, target in wanted.items():
        _check(stored[name], target)
    extra = [name for name in stored if name not in wanted and not _known(name)]
    if extra:
        tensor = stored[extra[0]]
        raise InputError(
            f"{tensor.file} has a tensor {tensor.name} of shape {list(tensor.shape)}, and there are {len(extra) - 1} "
            f"others that no model of {config} has ({len(architecture.layers)} layers). Fetch the model again, weights "
            "and config.json."
        )
    # A classifier has no output projection, so a leftover one is of no consequence.
    if "lm_head.weight" in stored and architecture.tied_embeddings and SCORE not in stored:
        _check_tied(config, stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def _known(name: str) -> bool:
    # Old Llama checkpoints keep the rotary frequencies, which follow from the config.
    return name in ("lm_head.weight", SCORE) or name.endswith(".rotary_emb.inv_freq")


def _check(tensor: Tensor, target: Target) -> None:
    if tensor.shape != target.stored:
        raise InputError(
            f"{tensor.file}: the tensor {tensor.name} has the shape {list(tensor.shape)}, but config.json asks for "
            f"{list(target.stored)}. Fetch the model again, weights and config.json."
        )
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{tensor.file}: the tensor {tensor.name} is of type {tensor.dtype}, and only {', '.join(DTYPES)} are "
            "read. Use the unquantized model."
        )


def _check_tied(config: Path, head: Tensor, embedding: Tensor) -> None:
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or any(
        a.tobytes() != b.tobytes()
        for (_, a), (_, b) in zip(_blocks(head, _whole(head)), _blocks(embedding, _whole(embedding)), strict=True)
    ):
        raise InputError(
            f"{head.file} has a tensor lm_head.weight that is not {embedding.name}, though {config} says that they are "
            "one. Set tie_word_embeddings to false there to use both."
        )


def _whole(tensor: Tensor) -> tuple[slice, ...]:
    return (slice(None),) * len(tensor.shape)


def _sharding(place: Place | None, path: tuple[str, ...], shape: tuple[int, ...]) -> Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if place is None else place(path, shape)


def _array(tensor: Tensor, target: Target, dtype: np.dtype, place: Place | None) -> jax.Array:
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # which jax leaves open for arrays without a shape
        # Devices that hold the same part share one read of it.
        key = tuple(cut.indices(size) for cut, size in zip(index, target.shape, strict=True))
        if key not in parts:
            parts[key] = _read(tensor, target, index, dtype)
        return parts[key]

    array = jax.make_array_from_callback(target.shape, _sharding(place, target.path, target.shape), part)
    # The copy to an accelerator goes on in the background: without this, all tensors could be in this memory at once.
    return jax.block_until_ready(array)


def _read(tensor: Tensor, target: Target, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A part of the parameter, from the same part of the tensor alone."""
    starts_ends = [cut.indices(size) for cut, size in zip(index, target.shape, strict=True)]
    out = _aligned(tuple(end - start for start, end, _ in starts_ends), dtype)
    rows = out.T if target.transposed else out
    for at, block in _blocks(tensor, index[::-1] if target.transposed else index):
        rows[at] = block.astype(dtype, copy=False)
    return out


def _blocks(tensor: Tensor, index: tuple[slice, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of tensor[index], some at a time, each with its place in it."""
    start, end, _ = index[0].indices(tensor.shape[0])
    row_bytes = int(np.prod(tensor.shape[1:])) * jnp.dtype(DTYPES[tensor.dtype]).itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(start, end, step):
        last = min(first + step, end)
        # Opened for each block: the pages of the file that were read count as this process's memory until it is closed.
        with safe_open(tensor.file, framework="np") as opened:
            yield slice(first - start, last - start), opened.get_slice(tensor.name)[(slice(first, last), *index[1:])]


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
