"""Adapters as the PEFT library keeps them: adapter_config.json and adapter_model.safetensors.

Beside the factors of LoRA, an adapter may hold parameters that take the place of the base's (`modules_to_save`: often
the embedding and the output projection), and rows of them (`trainable_token_indices`).
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ctrl_jax.errors import InputError
from ctrl_jax.models import lora, weights
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.files import Tensor, exists, read_header, read_json, reading, shown, size
from ctrl_jax.models.lora import PROJECTIONS, Lora
from ctrl_jax.models.weights import Place, Target, new_folder, targets
from ctrl_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter saved here has not, as PEFT writes it.
PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
}
# Keys that are read below, and those that change nothing in a trained adapter. Any other is refused if it is set.
READ = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights", "modules_to_save",
    "trainable_token_indices", "layers_to_transform",
)  # fmt: skip
UNIMPORTANT = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "unsloth_fixed",
    "velora_config",
)  # fmt: skip
# Other ways to start (pissa, olora, loftq, ...) change the base as well, whenever the adapter is loaded.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE = "Merge the adapter into its base with peft (merge_and_unload), and give the result as `model.path`."
EXPORT_AGAIN = "Download or export the adapter again."
MOST = 1_000_000  # of a rank, and of an alpha
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# The end of a tensor's name after that of its module, and what it holds.
KINDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".base_layer.weight": "base",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".weight": "weight",
    ".bias": "bias",
}


class Adapter(NamedTuple):
    """What `merge` does to a base."""

    folder: Path
    factors: Params
    """{"layers_i": {target: {"a": [in, rank], "b": [rank, out]}}}, also of `embedding` and `head`; float32."""
    lora: Lora
    """The factors' rank, the alpha by which they are scaled, and the projections and layers that have them."""
    base: Params
    """Parameters that the base had when the adapter was saved, in a tree like its."""
    replaced: Params
    """Parameters in place of the base's."""
    rows: dict[str, tuple[np.ndarray, np.ndarray]]
    """Tokens, and a row [D] of each, in place of the `embedding`'s or the `head`'s."""
    unties: bool
    """Whether the base's one embedding and output projection are two in the result."""


def files(folder: Path) -> dict[str, Path]:
    """The files that make an adapter, by name. Errors: InputError where one is missing."""
    found = {name: Path(folder) / name for name in (CONFIG, WEIGHTS)}
    missing = [str(path) for path in found.values() if not exists(path)]
    pickled = Path(folder) / "adapter_model.bin"
    if missing == [str(found[WEIGHTS])] and exists(pickled):
        program = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load({json.dumps(str(pickled))}, weights_only=True), {json.dumps(str(found[WEIGHTS]))})"
        )
        raise InputError(
            f"{folder} has its weights in {pickled.name}, a pickle, which is never opened here.",
            field=str(folder),
            value=pickled.name,
            remedy=f"Convert it to safetensors, where torch is installed, with python -c {shlex.quote(program)}.",
        )
    if missing:
        raise InputError(
            f"There is no {' and no '.join(missing)}",
            field="model.adapter",
            value=str(folder),
            remedy=f"`model.adapter` is a folder with {CONFIG} and {WEIGHTS}.",
        )
    for path in found.values():
        size(path)
    return found


def save(folder: Path, adapters: Params, architecture: Architecture, lora: Lora, *, base: str) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` reads, whole or not at all.

    Args:
      adapters: {"layers_i": {target: {"a": [in, rank], "b": [rank, out]}}}; kept as A [rank, in] and B [out, rank].
      base: the model that they adapt, as adapter_config.json names it.

    Raises:
      InputError: if the folder exists and is not empty.
    """
    tensors = {}
    for prefix, (layer, target) in _modules(architecture).items():
        if target in adapters.get(layer, {}):
            for name, key in (("lora_A", "a"), ("lora_B", "b")):
                value = np.asarray(adapters[layer][target][key], np.float32).T
                tensors[f"{prefix}.{name}.weight"] = np.ascontiguousarray(value)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "inference_mode": True,
        **PLAIN,
    }
    if lora.last_layers is not None:
        layers = len(architecture.layers)
        config["layers_to_transform"] = list(range(lora.first_layer(layers), layers))
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def architecture(folder: Path, base: Architecture) -> Architecture:
    """The architecture of a base with the adapter merged into it. Errors: as `load`, of the names of its tensors."""
    with reading(folder, EXPORT_AGAIN):
        unties = _unties(_held(Path(folder), _read_config(Path(folder)), base), base)
    return replace(base, tied_embeddings=base.tied_embeddings and not unties)


def check(folder: Path, architecture: Architecture, *, base: Path) -> None:
    """Compares an adapter with its base; only headers are read. Errors: as `load`, but for values."""
    _checked(Path(folder), architecture, base)


def load(folder: Path, architecture: Architecture, *, base: Path, place: Place | None = None) -> Adapter:
    """The adapter in a directory.

    Args:
      architecture: of the base.
      base: its directory.
      place: the sharding of a parameter that is replaced whole, as in `weights.load`.

    Raises:
      InputError: if a file is missing or damaged, the adapter holds something that is not read, or it is one for
        another base: another name, other modules or other shapes.
    """
    settings, held, tokens = _checked(Path(folder), architecture, base)
    wanted = _targets(architecture)
    factors: Params = {}
    own: Params = {}
    replaced: Params = {}
    rows = {}
    # The head last, as PEFT does: of a tied base, both may bring the one table.
    for module, tensors in sorted(held.items(), key=lambda item: item[0] == HEAD):
        if "a" in tensors:
            pair = {kind: jnp.asarray(weights.read_here(tensors[kind]).T) for kind in ("a", "b")}
            factors = lora.overlay(factors, _nested(wanted[f"{module}.weight"].path[:-1], pair))
        for kind in tensors.keys() & {"base", "weight", "bias"}:
            target = wanted[_parameter(module, kind)]
            if kind == "base" and module == HEAD and architecture.tied_embeddings:
                target = wanted[f"{EMBEDDING}.weight"]
            array = weights.read(tensors[kind], target, np.dtype(architecture.dtype), place)
            if kind == "base":
                own = lora.overlay(own, _nested(target.path, array))
            else:
                replaced = lora.overlay(replaced, _nested(target.path, array))
        if "rows" in tensors:
            name = wanted[f"{module}.weight"].path[0]
            rows[name] = np.array(tokens[module], np.int32), weights.read_here(tensors["rows"])
    return Adapter(Path(folder), factors, settings, own, replaced, rows, _unties(held, architecture))


def merge(params: Params, adapter: Adapter, *, place: Place | None = None) -> Params:
    """A base's `params` with the adapter in them; `place` is as in `load`.

    Raises:
      InputError: if a product of factors is too large for the weights' type.
    """
    params = lora.overlay(params, adapter.base)
    if adapter.unties:
        kernel = params["embedding"]["embedding"].T
        kernel = kernel if place is None else jax.device_put(kernel, place(("head", "kernel"), kernel.shape))
        params = {**params, "head": {"kernel": kernel}}
    params = lora.merge(lora.overlay(params, adapter.replaced), adapter.factors, adapter.lora)
    _check_finite(adapter.folder, params, adapter.factors)
    for name, (tokens, rows) in adapter.rows.items():
        if name == "embedding":
            changed = {"embedding": params[name]["embedding"].at[tokens].set(rows)}
        else:
            changed = {"kernel": params[name]["kernel"].at[:, tokens].set(rows.T)}
        params = {**params, name: changed}
    return params


def _check_finite(folder: Path, merged: Params, factors: Params, names: tuple[str, ...] = ()) -> None:
    """Raises InputError where W + (alpha / rank) A B is not finite."""
    for name, part in factors.items():
        if name in ("a", "b"):
            weight = merged.get("kernel", merged.get("embedding"))
            if not jnp.isfinite(weight).all():
                raise InputError(
                    f"{folder / WEIGHTS}: the factors of {'.'.join(names)} have a product that {weight.dtype} does "
                    "not hold.",
                    field=str(folder / WEIGHTS),
                    value=".".join(names),
                    remedy=EXPORT_AGAIN,
                )
            return
        _check_finite(folder, merged[name], part, (*names, name))


def _modules(architecture: Architecture) -> dict[str, tuple[str, str]]:
    """PEFT's name of every projection, with its layer and target here."""
    return {
        f"{PREFIX}{name.removesuffix('.weight')}": (target.path[0], target.path[1])
        for name, target in targets(architecture).items()
        if target.path[0].startswith("layers_") and target.path[-1] == "kernel"
    }


Held = dict[str, dict[str, Tensor]]
"""The tensors of an adapter by the module that they change, and by what they hold (KINDS)."""


def _targets(base: Architecture) -> dict[str, Target]:
    """What an adapter may change, also where it unties the output projection from the embedding."""
    return targets(replace(base, tied_embeddings=False))


def _checked(folder: Path, architecture: Architecture, base: Path) -> tuple[Lora, Held, dict[str, list[int]]]:
    """The settings of an adapter, its tensors, and the tokens whose rows it has, of each module."""
    with reading(folder, EXPORT_AGAIN):
        config = _read_config(folder)
        _check_config(folder / CONFIG, config, base)
        settings = _settings(folder / CONFIG, config)
        held = _held(folder, config, architecture)
        _check_saved(folder / CONFIG, config, held)
        wanted = _targets(architecture)
        for module, tensors in held.items():
            for kind in tensors.keys() & {"base", "weight", "bias"}:
                _check_shape(tensors[kind], wanted[_parameter(module, kind)].stored)
            if tensors.keys() & {"a", "b"}:
                _check_factors(module, tensors, wanted[f"{module}.weight"], settings.rank)
        tokens = _tokens(folder / CONFIG, config, held, architecture)
    paths = [wanted[f"{module}.weight"].path for module, tensors in held.items() if "a" in tensors]
    used = tuple(target for target in PROJECTIONS if any(target in path for path in paths))
    adapted = {int(path[0].removeprefix("layers_")) for path in paths if path[0].startswith("layers_")}
    last_layers = _last_layers(folder / CONFIG, config, adapted, len(architecture.layers))
    return replace(settings, targets=used or PROJECTIONS, last_layers=last_layers), held, tokens


def _held(folder: Path, config: dict[str, Any], base: Architecture) -> Held:
    saved = config.get("modules_to_save") or []
    file = files(folder)[WEIGHTS]
    wanted = _targets(base)
    held: Held = {}
    for name, tensor in read_header(file).items():
        module, kind = _module_and_kind(name, wanted, file)
        if kind == "weight" and not any(_names(key, module) for key in saved):
            # PEFT saves the base's own table as well where it was resized or has factors.
            kind = "base"
        weights.check_type(tensor)
        if kind in held.setdefault(module, {}):
            raise InputError(
                f"{file} has {held[module][kind].name} and {name}, of which one would be passed over.",
                field=str(file),
                value=name,
                remedy=MERGE,
            )
        held[module][kind] = tensor
    if not held:
        raise InputError(f"{file} holds no adapter", field=str(file), value=None, remedy="export it again.")
    embedding, head = _changes(held)
    if base.tied_embeddings and "rows" in embedding and embedding | head != {"rows"}:
        raise InputError(
            f"{file} has rows of {EMBEDDING} and more of it or of {HEAD}, one table in the base.",
            field=str(file),
            value=sorted(embedding | head),
            remedy=MERGE,
        )
    return held


def _module_and_kind(name: str, wanted: dict[str, Target], file: Path) -> tuple[str, str]:
    end = next((end for end in KINDS if name.endswith(end)), None)
    if end is None or not name.startswith(PREFIX):
        raise InputError(
            f"{file} has {name}. What is read are factors of LoRA, whole parameters (modules_to_save), and rows of "
            "tokens (trainable_token_indices).",
            field=str(file),
            value=name,
            remedy=MERGE,
        )
    kind, module = KINDS[end], name.removeprefix(PREFIX).removesuffix(end)
    if module.startswith("score"):
        raise InputError(
            f"{file} has {name}, the head of a classifier: it adapts a reward model, and `model.path` is a language "
            "model.",
            field=str(file),
            value=name,
            remedy="Merge it into its base with peft (merge_and_unload), and give the result as `reward_model.path`.",
        )
    target = wanted.get(_parameter(module, kind))
    matrix = target is not None and len(target.stored) == 2
    if target is None or (kind in "ab" and not matrix) or (kind == "rows" and module not in (EMBEDDING, HEAD)):
        raise _other_base(file, name, "a tensor that the base has no parameter for")
    return module, kind


def _parameter(module: str, kind: str) -> str:
    """The tensor of a checkpoint that is changed."""
    return f"{module}.{'bias' if kind == 'bias' else 'weight'}"


def _unties(held: Held, base: Architecture) -> bool:
    """Whether a base's embedding is no longer its output projection once the adapter is merged.

    PEFT changes the one and leaves the other, although they are one in the base. Only what it changes row by row in
    the embedding, it changes in both, unless the head has rows of its own.
    """
    embedding, head = _changes(held)
    return base.tied_embeddings and bool(head or embedding - {"rows"})


def _changes(held: Held) -> tuple[set[str], set[str]]:
    """What an adapter holds of the embedding and of the head, beside tables that are the base's own."""
    embedding, head = (held.get(module, {}).keys() - {"base"} for module in (EMBEDDING, HEAD))
    return embedding, head


def _check_factors(module: str, tensors: dict[str, Tensor], target: Target, rank: int) -> None:
    rows, columns = target.shape
    found = {kind: tensors[kind].shape for kind in ("a", "b") if kind in tensors}
    if len(found) == 1:
        (tensor,) = (tensors[kind] for kind in found)
        raise InputError(
            f"{tensor.file} has {tensor.name}, and not the other factor of it.",
            field=str(tensor.file),
            value=tensor.name,
            remedy=EXPORT_AGAIN,
        )
    if found != {"a": (rank, rows), "b": (columns, rank)}:
        shapes = " and ".join(f"{kind.upper()} {shape}" for kind, shape in found.items())
        text = f"factors {shapes}, where A {(rank, rows)} and B {(columns, rank)} belong"
        raise _other_base(next(iter(tensors.values())).file, module, text)


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape == shape:
        return
    if len(shape) == 2 and tensor.shape[1:] == shape[1:] and any(module in tensor.name for module in (EMBEDDING, HEAD)):
        raise InputError(
            f"{tensor.file} has {tensor.name} for {tensor.shape[0]} tokens, and the base has {shape[0]}: it was "
            "resized before the training.",
            field=str(tensor.file),
            value=tensor.shape,
            remedy=MERGE,
        )
    raise _other_base(tensor.file, tensor.name, f"a tensor of shape {tensor.shape}, where {shape} belongs")


def _tokens(file: Path, config: dict[str, Any], held: Held, base: Architecture) -> dict[str, list[int]]:
    """The tokens of `trainable_token_indices`, of each module that has rows."""
    given = config.get("trainable_token_indices") or {}
    by_key = given if isinstance(given, dict) else {"embed_tokens": given}
    found = {}
    for module in (EMBEDDING, HEAD):
        tensor = held.get(module, {}).get("rows")
        tokens = next((value for key, value in by_key.items() if _names(key, module)), None)
        if tensor is None:
            # The same rows of both are in the file once.
            tied = module == HEAD and base.tied_embeddings and "rows" in held.get(EMBEDDING, {})
            if tokens and not tied:
                raise InputError(
                    f"{file} has trainable_token_indices of {module}, and {WEIGHTS} no rows of it.",
                    field=str(file),
                    value=given,
                    remedy=EXPORT_AGAIN,
                )
            continue
        tokens = tokens if isinstance(tokens, list) else []
        valid = all(type(token) is int and 0 <= token < base.vocabulary_size for token in tokens)
        if not valid or len(set(tokens)) != len(tokens) or tensor.shape != (len(tokens), base.width):
            raise InputError(
                f"{file} has trainable_token_indices = {shown(given)}, and {WEIGHTS} rows of {module} of shape "
                f"{tensor.shape}: it must name as many tokens, from 0 to {base.vocabulary_size - 1}, and a row has "
                f"{base.width} numbers.",
                field=str(file),
                value=given,
                remedy=EXPORT_AGAIN,
            )
        found[module] = tokens
    return found


def _last_layers(file: Path, config: dict[str, Any], adapted: set[int], layers: int) -> int | None:
    """How many layers `layers_to_transform` names, where they are the last ones of the base; else None.

    Raises:
      InputError: if it names other layers than those that have factors.
    """
    given = config.get("layers_to_transform")
    if given is None or given == []:  # all layers, in PEFT too
        return None
    named = given if isinstance(given, list) else [given]
    text = f"{file} has layers_to_transform = {shown(given)}"
    if any(type(layer) is not int for layer in named):
        raise InputError(
            f"{text}, which is no list of layers", field="layers_to_transform", value=given, remedy=EXPORT_AGAIN
        )
    missing, unnamed = sorted(set(named) - adapted), sorted(adapted - set(named))
    if missing:
        raise InputError(
            f"{text}, and {WEIGHTS} has no factors of layer {shown(missing[0])}; `model.path` has the layers 0 to "
            f"{layers - 1}.",
            field="layers_to_transform",
            value=given,
            remedy=f"Give the model that the adapter is for. If it is this one: {EXPORT_AGAIN}",
        )
    if unnamed:
        raise InputError(
            f"{text}, and {WEIGHTS} has factors of layer {unnamed[0]} too, which peft passes over",
            field="layers_to_transform",
            value=given,
            remedy="name it there, or remove its factors.",
        )
    return len(adapted) if min(adapted) == layers - len(adapted) > 0 else None


def _names(key: Any, module: str) -> bool:
    """Whether a name in adapter_config.json is that of the module, or its end, as PEFT finds it."""
    return isinstance(key, str) and bool(key) and module.endswith(key)


def _check_saved(file: Path, config: dict[str, Any], held: Held) -> None:
    """Raises InputError if a module of `modules_to_save` has no tensor."""
    given = config.get("modules_to_save") or []
    whole = [module for module, tensors in held.items() if tensors.keys() & {"weight", "bias"}]
    for key in given:
        if not any(_names(key, module) for module in whole):
            raise InputError(
                f"{file} has modules_to_save = {shown(given)}, and {WEIGHTS} holds no {shown(key)}.",
                field=str(file),
                value=given,
                remedy=EXPORT_AGAIN,
            )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(files(folder)[CONFIG])
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        problem = f"{folder / CONFIG} has peft_type {shown(kind)}"
        raise InputError(problem, field=str(folder / CONFIG), value=kind, remedy="only LORA is read.")
    saved = config.get("modules_to_save")
    if saved is not None and not isinstance(saved, list):
        raise InputError(
            f"{folder / CONFIG} has modules_to_save = {shown(saved)}, not a list.",
            field=str(folder / CONFIG),
            value=saved,
            remedy=EXPORT_AGAIN,
        )
    return config


def _check_config(file: Path, config: dict[str, Any], base: Path) -> None:
    """Raises InputError if an adapter is for another base by its name, or has an option that is not followed here."""
    named = config.get("base_model_name_or_path")
    # A name on the hub or a path; the directory here may be a link, which has two names.
    if named and Path(str(named)).absolute().name not in (base.absolute().name, base.resolve().name):
        raise InputError(
            f"{file} says that the adapter is for {shown(named)}, and `model.path` is {base}.",
            field=str(file),
            value=named,
            remedy="Give that model; or, if it is the same one under another name, change base_model_name_or_path "
            "there.",
        )
    for key, value in config.items():
        if key == "init_lora_weights":
            plain = value in STARTS if isinstance(value, bool | str) else value is None
        else:
            plain = key in READ or key in UNIMPORTANT or not value or value == PLAIN.get(key)
        if not plain:
            known = "" if key in PLAIN or key == "init_lora_weights" else " If it changes nothing, remove it there."
            problem = f"{file} has {key} = {shown(value)}, which is not read."
            raise InputError(problem, field=str(file), value={key: value}, remedy=f"{MERGE}{known}")


def _settings(file: Path, config: dict[str, Any]) -> Lora:
    rank, alpha, stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora") or False
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MOST:
        raise InputError(
            f"{file} has r = {shown(rank)}, not a whole number from 1 to {MOST:,}.",
            field=str(file),
            value=rank,
            remedy=EXPORT_AGAIN,
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= MOST:
        raise InputError(
            f"{file} has lora_alpha = {shown(alpha)}, not a number above 0, up to {MOST:,}.",
            field=str(file),
            value=alpha,
            remedy=EXPORT_AGAIN,
        )
    if not isinstance(stabilised, bool):
        raise InputError(
            f"{file} has use_rslora = {shown(stabilised)}, not true or false.",
            field=str(file),
            value=stabilised,
            remedy=EXPORT_AGAIN,
        )
    # Kalajdzievski 2023, arXiv 2312.03732: the scale is alpha / sqrt(r) instead of alpha / r.
    return Lora(rank=rank, alpha=alpha * rank**0.5 if stabilised else float(alpha))


def _nested(path: tuple[str, ...], value: Any) -> Params:
    return {path[0]: _nested(path[1:], value)} if path else value


def _other_base(file: Path, name: str, text: str) -> InputError:
    return InputError(
        f"{file} has {name}: {text}.",
        field=str(file),
        value=name,
        remedy="It is an adapter for another model than the one at `model.path`; give that one.",
    )
