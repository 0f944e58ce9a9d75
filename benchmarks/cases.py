"""What is timed: the models, the shapes, and who takes part. Nothing here imports a contender."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from ctrl_jax.errors import InputError

Task = Literal["sampling", "step"]
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Sizes:
    """A Llama, as far as its work depends on it."""

    vocabulary_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    rope_theta: float
    norm_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def body(self) -> int:
        """Parameters of the layers' matrices: all that a token is multiplied with before the output projection."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary_size * self.width * (1 if self.tied else 2)
        return self.body + embeddings + (2 * self.layers + 1) * self.width


MODELS = {
    "tiny": Sizes(4096, 256, 688, 4, 8, 8, tied=False, rope_theta=10_000.0),
    "smollm2": Sizes(49152, 576, 1536, 30, 9, 3, tied=True, rope_theta=100_000.0),
    "llama1b": Sizes(128256, 2048, 8192, 16, 32, 8, tied=True, rope_theta=500_000.0),
}
"""A model small enough that everything but its products shows, the shape of SmolLM2-135M, and that of Llama 3.2 1B."""


@dataclass(frozen=True)
class Case:
    """One comparison. All rows have the same lengths, and no token ends a response."""

    task: Task
    model: str
    prompts: int
    samples: int
    prompt_length: int
    new_tokens: int
    repeats: int
    contenders: tuple[str, ...]
    """Who takes part unless others are asked for."""
    device: Device = "cpu"

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of activations and of the weights that are sampled from; what is trained is in float32."""
        return "bfloat16" if self.device == "gpu" else "float32"

    @property
    def shape(self) -> str:
        return f"{self.model}-{self.prompts}x{self.samples}"

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        """New tokens of one repetition."""
        return self.rows * self.new_tokens


@dataclass(frozen=True)
class Contender:
    label: str
    package: str
    """Whose version is reported."""
    module: str
    """Under benchmarks/contenders/."""
    options: dict[str, Any] = field(default_factory=dict)


CONTENDERS: dict[Task, dict[str, Contender]] = {
    "sampling": {
        "ctrl_jax": Contender("ctrl_jax", "ctrl_jax", "ctrl_jax_sampling"),
        # As the other library in JAX has it, where ctrl_jax makes a device of each core for a small model.
        "ctrl_jax_one": Contender("ctrl_jax, 1 device", "ctrl_jax", "ctrl_jax_sampling", {"devices": 1}),
        "transformers_dynamic": Contender(
            "transformers, dynamic", "transformers", "transformers_sampling", {"cache": "dynamic"}
        ),
        "transformers_static": Contender(
            "transformers, static", "transformers", "transformers_sampling", {"cache": "static"}
        ),
        # What `generate` does with a static cache by itself on a GPU.
        "transformers_compiled": Contender(
            "transformers, compiled", "transformers", "transformers_sampling", {"cache": "static", "compiled": True}
        ),
        "tunix": Contender("tunix", "google-tunix", "tunix_sampling"),
    },
    "step": {
        "ctrl_jax": Contender("ctrl_jax", "ctrl_jax", "ctrl_jax_step", {"micro_batches": None}),
        "trl_rloo": Contender("TRL RLOO", "trl", "trl_step", {"algorithm": "rloo", "micro_batches": 1}),
        "trl_grpo": Contender("TRL GRPO", "trl", "trl_step", {"algorithm": "grpo", "micro_batches": 1}),
        "tunix_grpo": Contender("tunix GRPO", "google-tunix", "tunix_step", {"micro_batches": 1}),
        # The same updates in other micro-batches: ctrl_jax chooses by itself, the others take what they are given.
        "ctrl_jax_whole": Contender("ctrl_jax in 1 part", "ctrl_jax", "ctrl_jax_step", {"micro_batches": 1}),
        "trl_rloo_micro": Contender(
            "TRL RLOO in 8 parts", "trl", "trl_step", {"algorithm": "rloo", "micro_batches": 8}
        ),
        "trl_grpo_micro": Contender(
            "TRL GRPO in 8 parts", "trl", "trl_step", {"algorithm": "grpo", "micro_batches": 8}
        ),
        "tunix_grpo_micro": Contender("tunix GRPO in 8 parts", "google-tunix", "tunix_step", {"micro_batches": 8}),
    },
}

SAMPLERS = ("ctrl_jax", "transformers_dynamic", "transformers_static", "tunix")
TRAINERS = ("ctrl_jax", "trl_rloo", "trl_grpo", "tunix_grpo", "trl_grpo_micro")
# Of TRL's two the faster; tunix keeps 14 GB between steps at this shape, too much beside the others.
LARGE_TRAINERS = ("ctrl_jax", "trl_grpo", "trl_grpo_micro")

CASES = (
    Case("sampling", "tiny", 64, 4, 32, 48, repeats=5, contenders=(*SAMPLERS, "ctrl_jax_one")),
    Case("sampling", "smollm2", 1, 16, 64, 64, repeats=3, contenders=SAMPLERS),
    Case("sampling", "smollm2", 8, 8, 64, 64, repeats=2, contenders=SAMPLERS),
    Case("step", "tiny", 64, 4, 32, 48, repeats=3, contenders=TRAINERS),
    Case("step", "smollm2", 8, 4, 64, 48, repeats=2, contenders=LARGE_TRAINERS),
)

GPU_SAMPLERS = ("ctrl_jax", "transformers_dynamic", "transformers_compiled")

GPU_CASES = (
    Case("sampling", "smollm2", 1, 16, 64, 64, repeats=5, contenders=GPU_SAMPLERS, device="gpu"),
    Case("sampling", "smollm2", 8, 8, 64, 64, repeats=5, contenders=GPU_SAMPLERS, device="gpu"),
    Case("sampling", "llama1b", 32, 16, 128, 128, repeats=5, contenders=GPU_SAMPLERS, device="gpu"),
    Case("step", "llama1b", 32, 16, 128, 128, repeats=3, contenders=LARGE_TRAINERS, device="gpu"),
)


def prompt_tokens(case: Case, vocabulary_size: int) -> np.ndarray:
    """[B, P] random tokens, the same for every contender."""
    return np.random.default_rng(0).integers(0, vocabulary_size, (case.prompts, case.prompt_length), dtype=np.int32)


def even_share(tokens: np.ndarray) -> np.ndarray:
    """The reward that costs nothing: the share of even tokens, over the last axis."""
    return (np.asarray(tokens) % 2 == 0).mean(-1)


def read_sizes(folder: Path) -> Sizes:
    """Sizes of a Hugging Face directory of a plain Llama.

    Raises:
      InputError: if it is another model, which not all contenders can read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    plain = (
        config.get("model_type") == "llama"
        and config.get("head_dim") in (None, width // heads)
        and not config.get("rope_scaling")
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
    )
    if not plain:
        raise InputError(
            f"{folder} holds a {config.get('model_type')!r} model, or a Llama with biases, scaled rope or another head "
            "size; the contenders share plain Llamas only. Give one of those, such as SmolLM2."
        )
    rope = config.get("rope_parameters") or config
    return Sizes(
        vocabulary_size=config["vocab_size"],
        width=width,
        mlp_width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        tied=config.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", 10_000.0),
        norm_epsilon=config.get("rms_norm_eps", 1e-5),
    )


def prepare(name: str, model: Path | None, cache: Path) -> Path:
    """The Hugging Face directory that all contenders read: random weights of `name`, or those of `model`.

    The tokenizer spells token i as the number i, so that libraries which want text get the same tokens. Its EOS and PAD
    lie past the model's vocabulary: nothing that is sampled ends a response.
    """
    sizes = MODELS[name] if model is None else read_sizes(model)
    folder = cache / (name if model is None else f"given-{model.resolve().name}")
    complete = folder / "complete"
    if complete.exists() and model is None:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if model is None:
        save_file(random_weights(sizes), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        for file in model.glob("*.safetensors*"):
            (folder / file.name).symlink_to(file.resolve())
    write_config(sizes, folder)
    write_tokenizer(sizes.vocabulary_size, folder)
    complete.touch()
    return folder


def random_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal with standard deviation 0.02, norms of 1, under the names and shapes of Hugging Face's Llama."""
    rng = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(0.02)

    ones = np.ones(sizes.width, np.float32)
    tensors = {"model.embed_tokens.weight": matrix(sizes.vocabulary_size, sizes.width), "model.norm.weight": ones}
    keys, queries = sizes.kv_heads * sizes.head_dim, sizes.heads * sizes.head_dim
    shapes = {
        "self_attn.q_proj": (queries, sizes.width),
        "self_attn.k_proj": (keys, sizes.width),
        "self_attn.v_proj": (keys, sizes.width),
        "self_attn.o_proj": (sizes.width, queries),
        "mlp.gate_proj": (sizes.mlp_width, sizes.width),
        "mlp.up_proj": (sizes.mlp_width, sizes.width),
        "mlp.down_proj": (sizes.width, sizes.mlp_width),
    }
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{part}.weight": matrix(*shape) for part, shape in shapes.items()}
        tensors |= {f"{prefix}.{part}.weight": ones for part in ("input_layernorm", "post_attention_layernorm")}
    if not sizes.tied:
        tensors["lm_head.weight"] = matrix(sizes.vocabulary_size, sizes.width)
    return tensors


def write_config(sizes: Sizes, folder: Path) -> None:
    """config.json without token ids: a generation stops at its length alone."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary_size,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope_theta,
        "tie_word_embeddings": sizes.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(vocabulary_size: int, folder: Path) -> None:
    special = ("<eos>", "<pad>")
    words = {str(token): token for token in range(vocabulary_size)}
    words |= {token: vocabulary_size + index for index, token in enumerate(special)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": words[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for token in special
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def spell(tokens: Sequence[int] | np.ndarray) -> str:
    return " ".join(str(int(token)) for token in tokens)
