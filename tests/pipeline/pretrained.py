"""A tiny Hugging Face directory, of random weights and a tokenizer of single bytes."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from ctrl_jax.models import huggingface, weights
from tests.models.oracles import cases

BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,  # more rows than the tokenizer has pieces, as in many models
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 257,
    "dtype": "float32",
}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def write_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_model(folder: Path, **changes: Any) -> Path:
    """The directory; `changes` are to its config.json. A classifier has a score.weight as well."""
    config = CONFIG | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    wanted = weights.targets(huggingface.architecture(folder, dtype="float32"))
    shapes = {name: target.stored for name, target in wanted.items()}
    if huggingface.is_classifier(folder):
        shapes["score.weight"] = (1, config["hidden_size"])
    tensors = {name: cases.tensor(name, shape, config) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder
