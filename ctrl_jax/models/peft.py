"""Adapters as the PEFT library keeps them: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ctrl_jax.config import PROJECTIONS, Lora
from ctrl_jax.errors import InputError
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.weights import new_folder, targets
from ctrl_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What would change the sum W + (alpha / r) A B, or the modules it is for.
UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
}
# The same, of newer versions: read, but not written, since older versions refuse what they do not know.
UNSUPPORTED_NEWER = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Other ways to start (pissa, olora, loftq, ...) change the base as well, whenever the adapter is loaded.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def files(folder: Path) -> dict[str, Path]:
    """The files that make an adapter, by name. Errors: InputError where one is missing."""
    found = {name: Path(folder) / name for name in (CONFIG, WEIGHTS)}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"There is no {' and no '.join(missing)}; --model.adapter is a folder with {CONFIG} and {WEIGHTS}."
        )
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
        **UNSUPPORTED,
    }
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path, architecture: Architecture, *, base: Path) -> tuple[Params, Lora]:
    """The adapters of a directory, for `lora.merge`, with their rank and alpha.

    Raises:
      InputError: if a file is missing or damaged, the adapter is of a kind that is not a plain LoRA, or it is one for
        another base: another name, other modules or other shapes.
    """
    folder = Path(folder)
    config = _read_config(folder)
    named = config.get("base_model_name_or_path")
    # A name on the hub or a path; the directory here may be a link, which has two names.
    if named and Path(str(named)).absolute().name not in (base.absolute().name, base.resolve().name):
        raise InputError(
            f"{folder / CONFIG} says that the adapter is for {named!r}, and --model.path is {base}. Give that model; "
            "or, if it is the same one under another name, change base_model_name_or_path there."
        )
    for key in (*UNSUPPORTED, *UNSUPPORTED_NEWER, "init_lora_weights"):
        value = config.get(key)
        plain = value in STARTS if key == "init_lora_weights" else not value or value == UNSUPPORTED.get(key)
        if not plain:
            raise InputError(
                f"{folder / CONFIG} has {key} = {value!r}, which is not read; merge the adapter into its base "
                "with peft (merge_and_unload) and give the result as --model.path."
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise InputError(f"{folder / CONFIG} has r = {rank!r} and lora_alpha = {alpha!r}; both must be above 0.")
    modules = _modules(architecture)
    adapters: Params = {}
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                prefix, _, kind = name.removesuffix(".weight").rpartition(".")
                if prefix not in modules or kind not in ("lora_A", "lora_B"):
                    raise _other_base(folder, name, "a tensor that the base has no projection for", base)
                layer, target = modules[prefix]
                adapters.setdefault(layer, {}).setdefault(target, {})[kind] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS} cannot be read ({error}); download or export the adapter again."
        ) from error
    wanted = targets(architecture)
    shapes = {target.path[:2]: target.shape for target in wanted.values() if target.path[-1] == "kernel"}
    for layer, by_target in adapters.items():
        for target, parts in by_target.items():
            rows, columns = shapes[layer, target]
            found = {kind: part.shape for kind, part in parts.items()}
            if found != {"lora_A": (rank, rows), "lora_B": (columns, rank)}:
                text = f"{found}, where A {(rank, rows)} and B {(columns, rank)} belong"
                raise _other_base(folder, f"{layer}.{target}", text, base)
            by_target[target] = {
                "a": jnp.asarray(parts["lora_A"].T, jnp.float32),
                "b": jnp.asarray(parts["lora_B"].T, jnp.float32),
            }
    if not adapters:
        raise InputError(f"{folder / WEIGHTS} holds no adapter; export it again.")
    used = tuple(target for target in PROJECTIONS if any(target in layer for layer in adapters.values()))
    return adapters, Lora(rank=rank, alpha=float(alpha), targets=used)


def _modules(architecture: Architecture) -> dict[str, tuple[str, str]]:
    """PEFT's name of every projection, with its layer and target here."""
    return {
        f"base_model.model.{name.removesuffix('.weight')}": (target.path[0], target.path[1])
        for name, target in targets(architecture).items()
        if target.path[0].startswith("layers_") and target.path[-1] == "kernel"
    }


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / CONFIG} cannot be read ({error}); an adapter is a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{folder / CONFIG} has peft_type {kind!r}; only LORA is read.")
    return config


def _other_base(folder: Path, name: str, text: str, base: Path) -> InputError:
    return InputError(
        f"{folder / WEIGHTS} has {name}: {text}. It is an adapter for another model than {base}; give that one as "
        "--model.path."
    )
