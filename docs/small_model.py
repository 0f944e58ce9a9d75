"""A small language model to try things with: a Llama of 0.3 M parameters that writes the embedded dialogues.

`write("models/small")` makes it in less than a minute on two CPU cores, and downloads nothing: a tokenizer and random
weights, fine-tuned on generated dialogues, as a Hugging Face directory.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ctrl_jax.config import Calibration, Data, Evaluation, Experiment, Model, Policy, Supervised
from ctrl_jax.data import dialogues, tokenizers
from ctrl_jax.data.conversations import transcript
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.models import huggingface, weights
from ctrl_jax.pipeline import sft
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write(folder: str | Path, *, steps: int = 200) -> Path:
    """Writes the model, unless it is there."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    start = folder.with_name(f"{folder.name}-start")
    _write_start(start)
    workspace = Workspace(
        Experiment(
            "small",
            data=Data(prompt_length=40, response_length=48),
            model=Model(path=str(start)),
            sft=Supervised(steps=steps, batch_size=32, learning_rate=4e-3, warmup_steps=20),
            calibration=Calibration(prompts=32),
            policy=Policy(prompts_per_step=32),
            evaluation=Evaluation(prompts=16),
        ),
        folder.with_name(f"{folder.name}-run"),
        folder.with_name(f"{folder.name}-stages"),
        make_mesh(1),
    )
    run = prepare(workspace)
    trained = sft.run(run)
    beside = [start / name for name in ("tokenizer.model", "tokenizer_config.json")]
    weights.save(folder, trained.params["params"], run.architecture, huggingface.read_config(start), beside=beside)
    return folder


def prompts(folder: str | Path, split: str) -> list[str]:
    """What people ask in the dialogues."""
    records = dialogues.load("helpful", seed=0, count=2_000, data_dir=Path(folder).with_name("small-prompts"))[split]
    return list(dict.fromkeys(record.prompt[-1].content for record in records))


def _write_start(folder: Path) -> None:
    """The directory with a tokenizer of the dialogues and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    records = dialogues.load("helpful", seed=0, count=2_000, data_dir=folder.with_name("small-prompts"))["train"]
    trained = tokenizers.train(
        [f"{transcript(record.prompt)} {record.response}" for record in records], vocabulary_size=CONFIG["vocab_size"]
    )
    (folder / "tokenizer.model").write_bytes(trained.model)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    random = np.random.default_rng(0)
    shapes = {
        name: target.stored
        for name, target in weights.targets(huggingface.architecture(folder, dtype="float32")).items()
    }
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else random.normal(0, 0.08, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
