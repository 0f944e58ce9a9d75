"""`config.json` of a Hugging Face directory, read as an `Architecture`.

Keys that a file leaves out have the values that transformers gives them, family by family. Both ways to write rotary
positions are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of transformers 5.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ctrl_jax.errors import InputError
from ctrl_jax.models import files
from ctrl_jax.models.architecture import Architecture, Layer, rotary_frequencies

Rope = dict[str, Any]
LAYER_TYPES = ("full_attention", "sliding_attention")
# The largest that are computed with, well above every published model: nothing is made as large as a file asks for.
AT_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 13,
    "sliding_window_pattern": 1000,
    "max_window_layers": 1000,
}
OTHERWISE_AT_MOST = 1 << 31
# Where a number still does what it is for: beyond, all positions, all scores or all logits would be alike.
RANGES = {
    "rms_norm_eps": (1e-12, 1.0),
    "rope_theta": (1.0, 1e15),
    "rope_local_base_freq": (1.0, 1e15),
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1.0, 1e9),
    "max_position_embeddings": (1.0, 1e9),
    "query_pre_attn_scalar": (1.0, 1e6),
    "attn_logit_softcapping": (0.1, 1e6),
    "final_logit_softcapping": (0.1, 1e6),
}
RESTORE = "Restore the model's own config.json"
# Two spellings of x·σ(x), and two of the tanh approximation of GELU.
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The dict in `config.json`.

    Raises:
      InputError: if there is none, or if it is not a JSON object.
    """
    file = Path(folder) / "config.json"
    if not files.exists(file):
        fix = "Give the path of a Hugging Face directory, which holds config.json, *.safetensors and a tokenizer."
        if files.exists(Path(folder) / "adapter_config.json"):
            fix = f"{folder} holds a PEFT adapter: give it as `model.adapter`, and its base as `model.path`."
        raise InputError(f"{file} is missing.", field=str(file), value=None, remedy=fix)
    values = files.read_json(file)
    if not isinstance(values, dict):
        raise InputError(
            f"{file} holds a {type(values).__name__}, not an object of named values.",
            field=str(file),
            value=values,
            remedy="Fetch the file again.",
        )
    return values


def architecture(folder: Path, *, dtype: Literal["float32", "bfloat16"]) -> Architecture:
    """What the model of a Hugging Face directory computes.

    A sequence classifier's is that of its trunk, without an output projection: `tied_embeddings` is true. Where
    config.json does not say how many labels it has, the weights do (`weights.check`).

    Raises:
      InputError: on a model, rope type or activation that is not supported, and on values that are missing, not of
        their type, out of range, or do not fit each other; it names the file and the value.
    """
    config = _Config(Path(folder) / "config.json", read_config(folder))
    with files.reading(config.file, f"{RESTORE}."):
        return _architecture(config, dtype)


def _architecture(config: "_Config", dtype: Literal["float32", "bfloat16"]) -> Architecture:
    family, classifier = _family(config)
    quantized = config.values.get("quantization_config")
    if quantized is not None:
        raise config.error(
            "quantization_config",
            f"quantization_config is {files.shown(quantized)}, but quantized weights cannot be read",
            "Use the unquantized model, in float32, bfloat16 or float16",
        )
    if config.flag("use_bidirectional_attention", False):
        raise config.error(
            "use_bidirectional_attention",
            "use_bidirectional_attention is true, but a policy attends to the past alone",
            "Use another model",
        )
    found = replace(FAMILIES[family](config), dtype=dtype)
    if not classifier:
        return found
    labels = _labels(config)
    if labels not in (1, None):
        raise config.error(
            "id2label",
            f"it is a classifier with {labels} labels, but a reward is one number",
            "Use a model that was trained with num_labels=1",
        )
    return replace(found, tied_embeddings=True)


def context(folder: Path) -> int | None:
    """The most tokens that the model was made for, prompt and response together; None where config.json is silent."""
    config = _Config(Path(folder) / "config.json", read_config(folder))
    return None if config.values.get("max_position_embeddings") is None else config.whole("max_position_embeddings")


def pad_token_id(folder: Path) -> int | None:
    """The token that transformers' sequence classifiers take for padding, wherever it stands; None if there is none.

    Raises:
      InputError: if it is not a whole number.
    """
    config = _Config(Path(folder) / "config.json", read_config(folder))
    default = 0 if _family(config)[0].startswith("Gemma") else None
    # A null is no padding, unlike a missing key.
    found = config.values.get("pad_token_id", default)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise config.error(
            "pad_token_id", f"pad_token_id is {found!r}, not a whole number", "Restore the model's own config.json"
        )
    return found


def is_classifier(folder: Path) -> bool:
    """Whether the directory holds a sequence classifier, and not a language model."""
    return _family(_Config(Path(folder) / "config.json", read_config(folder)))[1]


def classifier_config(folder: Path, *, pad_token_id: int | None) -> dict[str, Any]:
    """config.json of a sequence classifier with one label, whose trunk is the language model in the folder.

    Args:
      pad_token_id: the token that stands for padding wherever it is: the score is read at the last other one.
    """
    values = read_config(folder)
    family, _ = _family(_Config(Path(folder) / "config.json", values))
    name = "Gemma3TextForSequenceClassification" if family == "Gemma3" else f"{family}ForSequenceClassification"
    return {
        **values,
        "architectures": [name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_token_id,
    }


def _family(config: "_Config") -> tuple[str, bool]:
    """The key into FAMILIES, and whether the model is a sequence classifier."""
    names = config.values.get("architectures")
    if names is None:
        model_type = config.values.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise config.error(
                "model_type",
                f"model_type is {files.shown(model_type)} and architectures is missing",
                f"Supported types are {', '.join(MODEL_TYPES)}",
            )
        return MODEL_TYPES[model_type], False
    if names == ["Gemma3TextForSequenceClassification"]:
        return "Gemma3", True
    for family in FAMILIES:
        if names == [f"{family}ForCausalLM"]:
            return family, False
        if names == [f"{family}ForSequenceClassification"] and family != "Gemma3":  # which would read images too
            return family, True
    raise config.error(
        "architectures",
        f"architectures is {files.shown(names)}, which is not supported",
        f"Supported are {', '.join(f'{family}ForCausalLM' for family in FAMILIES)} (SmolLM2 is a Llama), and their "
        "ForSequenceClassification with one label (Gemma3TextForSequenceClassification)",
    )


def _labels(config: "_Config") -> int | None:
    """How many labels config.json gives a classifier; None where it is silent, as transformers leaves it for two."""
    names = config.values.get("id2label")
    if names is None:
        return None if config.values.get("num_labels") is None else config.whole("num_labels")
    if not isinstance(names, dict):
        raise config.error("id2label", f"id2label is {files.shown(names)}, not an object of named labels", RESTORE)
    return len(names)


def _llama(config: "_Config") -> Architecture:
    heads = config.whole("num_attention_heads")
    bias = config.flag("attention_bias", False)
    return _assemble(
        config,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", heads),
        head_dim=_head_dim(config, heads),
        windows=_same_window(config, None),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _mistral(config: "_Config") -> Architecture:
    heads = config.whole("num_attention_heads")
    return _assemble(
        config,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", 8, null=heads),
        head_dim=_head_dim(config, heads),
        windows=_same_window(config, config.window(4096)),
    )


def _qwen2(config: "_Config") -> Architecture:
    heads = config.whole("num_attention_heads")
    return _assemble(
        config,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", 32, null=heads),
        head_dim=_head_dim(config, heads),
        windows=_qwen_windows(config),
        qkv_bias=True,
    )


def _qwen3(config: "_Config") -> Architecture:
    heads = config.whole("num_attention_heads")
    bias = config.flag("attention_bias", False)
    return _assemble(
        config,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", 32, null=heads),
        head_dim=config.whole("head_dim", 128),
        windows=_qwen_windows(config),
        query_key_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def _gemma2(config: "_Config") -> Architecture:
    return _gemma(
        config,
        sliding_every=2,
        attention_softcap=config.softcap("attn_logit_softcapping", 50.0),
        logits_softcap=config.softcap("final_logit_softcapping", 30.0),
    )


def _gemma3(config: "_Config") -> Architecture:
    # Its attention has no soft-cap, whatever the file says.
    return _gemma(
        config,
        sliding_every=config.whole("sliding_window_pattern", 6),
        logits_softcap=config.softcap("final_logit_softcapping", None),
        query_key_norm=True,
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
        ropes=_gemma3_ropes(config),
    )


def _gemma(
    config: "_Config", *, sliding_every: int, defaults: dict[str, int] | None = None, **differences: Any
) -> Architecture:
    """Gemma 2 and 3: every `sliding_every`-th layer is global, the others have a window."""
    defaults = defaults or {}
    count = config.whole("num_hidden_layers", defaults.get("num_hidden_layers"))
    width = config.whole("hidden_size", defaults.get("hidden_size"))
    heads = config.whole("num_attention_heads", defaults.get("num_attention_heads"))
    bias = config.flag("attention_bias", False)
    types = _layer_types(config, [LAYER_TYPES[(index + 1) % sliding_every != 0] for index in range(count)])
    return _assemble(
        config,
        defaults=defaults,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", 4, null=heads),
        head_dim=config.whole("head_dim", 256),
        windows=_windows(config, types, config.window(4096)),
        tied_embeddings=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=width**0.5,
        query_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=1.0,
        post_norms=True,
        qkv_bias=bias,
        output_bias=bias,
        **differences,
    )


FAMILIES: dict[str, Callable[["_Config"], Architecture]] = {
    "Llama": _llama,
    "Mistral": _mistral,
    "Qwen2": _qwen2,
    "Qwen3": _qwen3,
    "Gemma2": _gemma2,
    "Gemma3": _gemma3,
}
MODEL_TYPES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}


def _assemble(
    config: "_Config",
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windows: list[tuple[str, int | None]],
    defaults: dict[str, int] | None = None,
    tied_embeddings: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    embedding_scale: float = 1.0,
    query_scale: float | None = None,
    ropes: dict[str, Rope] | None = None,
    **differences: Any,
) -> Architecture:
    """What all families read alike, with what they do not; `tied_embeddings` and `activation` are defaults."""
    defaults = defaults or {}
    if heads % kv_heads:
        raise config.error(
            "num_attention_heads",
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}, which does not divide it",
            RESTORE,
        )
    if head_dim % 2:
        raise config.error(
            "head_dim",
            f"head_dim is {head_dim}, but rotary positions turn pairs of dimensions",
            RESTORE,
        )
    ropes = _ropes(config, 10_000.0) if ropes is None else ropes
    # Of those that some layer uses: a model without windows may leave the other out.
    rotary = {kind: _frequencies(config, ropes.get(kind), head_dim) for kind in dict(windows)}
    key, name = activation
    name = name if config.values.get(key) is None else config.values[key]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise config.error(
            key,
            f"{key} is {files.shown(name)}, which is not supported",
            f"Supported activations are {', '.join(ACTIVATIONS)}",
        )
    return Architecture(
        vocabulary_size=config.whole("vocab_size", defaults.get("vocab_size")),
        width=config.whole("hidden_size", defaults.get("hidden_size")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=config.whole("intermediate_size", defaults.get("intermediate_size")),
        layers=tuple(Layer(window, rotary[kind]) for kind, window in windows),
        tied_embeddings=config.flag("tie_word_embeddings", tied_embeddings),
        embedding_scale=embedding_scale,
        query_scale=head_dim**-0.5 if query_scale is None else query_scale,
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[name],
        **differences,
    )


def _head_dim(config: "_Config", heads: int) -> int:
    width = config.whole("hidden_size")
    if config.values.get("head_dim") is not None:
        return config.whole("head_dim")
    if width % heads:
        raise config.error(
            "hidden_size",
            f"hidden_size is {width}, which does not divide by num_attention_heads = {heads}, and head_dim is missing",
            RESTORE,
        )
    return width // heads


def _same_window(config: "_Config", window: int | None) -> list[tuple[str, int | None]]:
    return [("full_attention", window)] * config.whole("num_hidden_layers")


def _qwen_windows(config: "_Config") -> list[tuple[str, int | None]]:
    window = config.window(4096) if config.flag("use_sliding_window", False) else None
    first = config.whole("max_window_layers", 28, least=0)
    count = config.whole("num_hidden_layers")
    default = [LAYER_TYPES[window is not None and index >= first] for index in range(count)]
    return _windows(config, _layer_types(config, default), window)


def _layer_types(config: "_Config", default: list[str]) -> list[str]:
    types = config.values.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != len(default):
        raise config.error(
            "layer_types",
            f"layer_types is {files.shown(types)}, but num_hidden_layers is {len(default)}",
            "Give each layer a type, or none",
        )
    for index, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise config.error(
                "layer_types",
                f"layer_types[{index}] is {files.shown(kind)}, which is not supported",
                f"Supported are {', '.join(LAYER_TYPES)}",
            )
    return types


def _windows(config: "_Config", types: list[str], window: int | None) -> list[tuple[str, int | None]]:
    if "sliding_attention" in types and window is None:
        raise config.error(
            "layer_types",
            f"layer_types[{types.index('sliding_attention')}] is 'sliding_attention', but there is no sliding_window "
            "(or use_sliding_window is false)",
            "Give the window's size in tokens",
        )
    return [(kind, window if kind == "sliding_attention" else None) for kind in types]


def _ropes(config: "_Config", theta: float) -> dict[str, Rope]:
    """Rotary parameters of each layer type, `rope_theta` among them."""
    theta = config.number("rope_theta", theta)
    parameters = config.group("rope_scaling") or config.group("rope_parameters")
    if not any(kind in parameters for kind in LAYER_TYPES):
        return {kind: {"rope_theta": theta} | parameters for kind in LAYER_TYPES}
    return {kind: {"rope_theta": theta} | parameters[kind] for kind in LAYER_TYPES if parameters.get(kind) is not None}


def _gemma3_ropes(config: "_Config") -> dict[str, Rope]:
    """Two thetas; what scales the rope is for the global layers alone."""
    parameters = config.group("rope_parameters")
    if parameters and not any(kind in parameters for kind in LAYER_TYPES):
        raise config.error(
            "rope_parameters",
            f"rope_parameters is {files.shown(parameters)}, but Gemma 3 has one for each of {', '.join(LAYER_TYPES)}",
            RESTORE,
        )
    globally, locally = ({} if parameters.get(kind) is None else parameters[kind] for kind in LAYER_TYPES)
    return {
        "full_attention": {"rope_theta": config.number("rope_theta", 1_000_000.0)}
        | globally
        | config.group("rope_scaling"),
        "sliding_attention": {"rope_theta": config.number("rope_local_base_freq", 10_000.0)} | locally,
    }


def _frequencies(config: "_Config", parameters: Rope | None, head_dim: int) -> tuple[float, ...]:
    """Radians a position, scaled as `rope_type` says.

    `linear` divides all by the factor (Chen et al. 2023, arXiv 2306.15595). `llama3` keeps waves much shorter than the
    context of pretraining, divides those much longer by the factor, and interpolates between (Llama 3.1's reference).
    """
    if parameters is None:
        raise config.error(
            "rope_parameters",
            "a layer type is left out of rope_parameters",
            "Layers without positions are not supported",
        )
    own = _Config(config.file, parameters, "rope_parameters.")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    for values in (parameters, config.values):
        partial = values.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            raise config.error(
                "partial_rotary_factor",
                f"partial_rotary_factor is {files.shown(partial)}",
                "Only heads that are rotated whole are supported",
            )
    base = rotary_frequencies(head_dim, own.number("rope_theta"))
    if kind == "default":
        return base
    if kind == "linear":
        factor = own.number("factor")
        return tuple(frequency / factor for frequency in base)
    if kind != "llama3":
        raise own.error(
            "rope_type",
            f"the rope type is {files.shown(kind)}, which is not supported",
            "Supported are default, linear and llama3",
        )
    factor, low, high = (own.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise own.error(
            "low_freq_factor",
            f"low_freq_factor is {low:g} and high_freq_factor {high:g}, but it must be the larger",
            RESTORE,
        )
    context = own.number("original_max_position_embeddings", config.number("max_position_embeddings", 2048))
    context = config.number("original_max_position_embeddings", context)

    def scaled(frequency: float) -> float:
        waves = context * frequency / (2 * math.pi)  # in the context of pretraining
        kept = min(max((waves - low) / (high - low), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / factor)

    return tuple(map(scaled, base))


class _Config:
    """Values of a `config.json`, each checked as it is read, with errors that name the file and the key."""

    def __init__(self, file: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.file, self.values, self.prefix = file, values, prefix

    def error(self, key: str, problem: str, fix: str) -> InputError:
        value = self.values.get(key)
        return InputError(
            f"{self.file}: {problem}.", field=f"{self.file}: {self.prefix}{key}", value=value, remedy=f"{fix}."
        )

    def whole(self, key: str, default: int | None = None, *, null: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `default` where the key is missing, `null` (else it) where it is null."""
        if null is not None and key in self.values and self.values[key] is None:
            return null
        value, most = self._get(key, default), AT_MOST.get(key, OTHERWISE_AT_MOST)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, f"a whole number above {least - 1}")
        if value > most:
            raise self._wrong(key, f"a whole number of at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number in its range of RANGES."""
        value, (low, high) = self._get(key, default), RANGES[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def group(self, key: str) -> dict[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict) or not all(
            value.get(kind) is None or isinstance(value[kind], dict) for kind in LAYER_TYPES
        ):
            raise self._wrong(key, "an object of named values")
        return value

    def window(self, default: int) -> int | None:
        """Tokens of `sliding_window`; null, unlike a missing key, is no window."""
        if "sliding_window" in self.values and self.values["sliding_window"] is None:
            return None
        return self.whole("sliding_window", default)

    def softcap(self, key: str, default: float | None) -> float | None:
        """Null, unlike a missing key, is no cap."""
        value = self.values.get(key, default)
        return None if value is None else self.number(key, default)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, f"{self.prefix}{key} is missing", RESTORE)
        return value

    def _wrong(self, key: str, wanted: str) -> InputError:
        return self.error(key, f"{self.prefix}{key} is {files.shown(self.values.get(key))}, not {wanted}", RESTORE)
