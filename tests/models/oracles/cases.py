"""What recorder and tests share: tokens, and weights that are a function of a tensor's name and shape.

Each recorded case is a JSON file here, written by record.py: `config` as transformers saves it, the shape of every
tensor in its checkpoint, and the logits (or scores) of its model with these weights.
"""

import json
import zlib
from pathlib import Path

import numpy as np

VOCABULARY = 40
P, T = 9, 8
# Two prompts, one padded, with two responses each. They run past the windows of 4 tokens, in prompt and response.
PROMPT_LENGTHS = (9, 5)
_DRAWS = np.random.RandomState(0)
PROMPTS = _DRAWS.randint(1, VOCABULARY, (2, P))
RESPONSES = _DRAWS.randint(1, VOCABULARY, (2, 2, T))

CAUSAL = ("llama", "llama_biases", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
CLASSIFIERS = ("llama_classifier", "gemma3_classifier")


def read(name: str) -> dict:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def tensor(name: str, shape: tuple[int, ...], config: dict) -> np.ndarray:
    """float32. RandomState, because its draws are promised to stay the same."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        # Gemma stores what is added to 1.
        draws = 0.3 * draws + (0 if config["model_type"].startswith("gemma") else 1)
    elif name.endswith(".bias"):
        draws = 0.5 * draws
    else:
        # Large enough that attention is far from uniform, and that soft-caps bend what they cap.
        draws = 2 * draws / shape[-1] ** 0.5
    return draws.astype(np.float32)


def tensors(case: dict) -> dict[str, np.ndarray]:
    return {name: tensor(name, tuple(shape), case["config"]) for name, shape in case["tensors"].items()}


def adapter_tensors(shapes: dict, adapter_config: dict, base_config: dict) -> dict[str, np.ndarray]:
    """Of an adapter. Where it ensures that embedding and head are one, they have one value, as peft saves them."""
    one = adapter_config.get("ensure_weight_tying", False)
    tables = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    return {
        name: tensor(tables[0] if one and name in tables else name, tuple(shape), base_config)
        for name, shape in shapes.items()
    }
