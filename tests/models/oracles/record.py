"""Records what transformers computes: `python -m tests.models.oracles.record`, where the extra `oracle` is installed.

With names as arguments (`chats`, `configs`, `llama`, ...) only these files are made again.

Small models of each family, float32, eager attention, on the CPU. Every sequence is read alone, without padding or
cache. `configs.json` is how transformers reads config files that leave out keys or use older ones. `adapters.json` is
what peft makes of a base and an adapter that holds more than factors of projections.
"""

import json
import sys
import tempfile
from pathlib import Path

import jinja2
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.models.oracles import cases, chats

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": cases.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
GEMMA3 = SIZES | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    },
}
CASES = {
    "llama": SIZES | {"model_type": "llama", "num_attention_heads": 2, "rope_parameters": LLAMA3},
    "llama_biases": SIZES
    | {
        "model_type": "llama",
        "head_dim": 6,
        "rope_parameters": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-2,
    },
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 4},
    "qwen2": SIZES
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 10},
    "gemma2": SIZES
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": GEMMA3,
    "llama_classifier": SIZES | {"model_type": "llama", "num_labels": 1},
    "gemma3_classifier": GEMMA3 | {"num_labels": 1},
}

# Config files as they are found: older keys, and little of what is the default.
FOUND = {
    "llama 2": SIZES | {"model_type": "llama", "num_key_value_heads": None, "rope_scaling": None},
    "llama 3.1": SIZES
    | {
        "model_type": "llama",
        "rope_theta": 500_000.0,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    },
    "llama with the older name of a rope type": SIZES
    | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama 3 that leaves out the context": SIZES
    | {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "mistral 0.1": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    | {"model_type": "mistral", "num_attention_heads": 16},
    "mistral 0.3": SIZES | {"model_type": "mistral", "sliding_window": None, "rope_theta": 1_000_000.0},
    "qwen 2.5": SIZES
    | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
        "rope_theta": 1_000_000.0,
    },
    "qwen 2 with windows": SIZES
    | {"model_type": "qwen2", "num_hidden_layers": 30, "use_sliding_window": True, "rope_theta": 1_000_000.0},
    "qwen 3": SIZES | {"model_type": "qwen3", "rope_theta": 1_000_000.0, "rope_scaling": None},
    "qwen 3 with biases": SIZES | {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "gemma 2": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3},
    "gemma 2 without caps": SIZES
    | {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma 3 4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma 3 1b": SIZES
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 9,
        "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
    },
}

# Options of peft.LoraConfig beside r, alpha and the projection. Llama here ties its embeddings, Qwen 3 does not.
BASES = {"tied": "llama_biases", "untied": "qwen3"}
ADAPTERS = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding and head, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm"]},
    "a projection": {"modules_to_save": ["up_proj"]},
    "tokens": {"trainable_token_indices": [3, 17, 1]},
    "tokens of each": {"trainable_token_indices": {"embed_tokens": [3, 17, 1], "lm_head": [5]}},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [3, 17]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [3, 17]}},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "factors of both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "factors scaled by the root of the rank": {"use_rslora": True},
}


def saved(config: transformers.PreTrainedConfig) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def config_of(values: dict) -> transformers.PreTrainedConfig:
    # Through a file, since that is what is read, and what is renamed on the way.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return AutoConfig.from_pretrained(folder)


def record(name: str, values: dict) -> dict:
    classifier = name in cases.CLASSIFIERS
    factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    values = dict(values)
    labels = {"num_labels": values.pop("num_labels")} if classifier else {}
    config = AutoConfig.for_model(values.pop("model_type"), **values, **labels)
    model = factory.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config_values = json.loads((Path(folder) / "config.json").read_text())
        with transformers.modeling_utils.safe_open(str(Path(folder) / "model.safetensors"), framework="pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    weights = {key: torch.from_numpy(cases.tensor(key, tuple(shape), config_values)) for key, shape in shapes.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()

    recorded = []
    for prompt, length, responses in zip(cases.PROMPTS, cases.PROMPT_LENGTHS, cases.RESPONSES, strict=True):
        rows = []
        for response in responses:
            tokens = torch.tensor([[*prompt[:length], *response]])
            with torch.no_grad():
                logits = model(tokens).logits[0]
            rows.append(logits[0].item() if classifier else logits[length - 1 : -1].tolist())
        recorded.append(rows)
    return {
        "transformers": transformers.__version__,
        "config": config_values,
        "tensors": shapes,
        ("scores" if classifier else "logits"): recorded,
    }


def record_adapter(base: str, options: dict) -> dict:
    """Names and shapes as peft saves them; then its logits with `cases.tensor` as their values."""
    case = cases.read(base)
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = Path(folder) / "base", Path(folder) / "adapter"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(case["config"]))
        save_file(cases.tensors(case), model / "model.safetensors", {"format": "pt"})

        def fresh() -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

        settings = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | options))
        peft.get_peft_model(fresh(), settings).save_pretrained(adapter)
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
        shapes = {name: list(tensor.shape) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        tensors = cases.adapter_tensors(shapes, config, case["config"])
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
        adapted = peft.PeftModel.from_pretrained(fresh(), adapter).eval()
    tokens = [*cases.PROMPTS[0], *cases.RESPONSES[0, 0]]
    with torch.no_grad():
        logits = adapted(torch.tensor([tokens])).logits[0, cases.P - 1 : -1].tolist()
    return {"peft": peft.__version__, "base": base, "config": config, "tensors": shapes, "logits": logits}


def record_chats(name: str) -> dict:
    """Of each prompt, the ids up to its reply, and of each reply the ids and the score of the finished conversation.

    A prompt that the template refuses is null.
    """
    with tempfile.TemporaryDirectory() as parent:
        config = AutoConfig.from_pretrained(chats.write(Path(parent) / "config", name, {}))
        model = AutoModelForSequenceClassification.from_config(config)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        folder = chats.write(Path(parent) / "model", name, shapes)
        # AutoTokenizer would put the rules of the model's family in the place of the file's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def ids(turns: tuple, **options: bool) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    def score(tokens: list[int]) -> float:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits.item()

    recorded: list[dict | None] = []
    for prompt, replies in zip(chats.PROMPTS, chats.REPLIES, strict=True):
        try:
            before = ids(prompt, add_generation_prompt=True)
        except jinja2.TemplateError:
            recorded.append(None)
            continue
        finished = [ids((*prompt, ("assistant", reply)), add_generation_prompt=False) for reply in replies]
        scores = [score(tokens) for tokens in finished]
        recorded.append({"prompt": before, "finished": finished, "scores": scores})
    return {"transformers": transformers.__version__, "tensors": shapes, "chats": recorded}


def rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write(name: str, entries: dict) -> None:
    lines = [
        f"{json.dumps(key)}: {json.dumps(rounded(value), separators=(',', ':'))}" for key, value in entries.items()
    ]
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(*names: str) -> None:
    for name, values in CASES.items():
        if not names or name in names:
            write(name, record(name, values))
    if not names or "chats" in names:
        write("chats", {name: record_chats(name) for name in chats.FAMILIES})
    if not names or "configs" in names:
        found = {name: {"given": values, "read": saved(config_of(values))} for name, values in FOUND.items()}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
        (HERE / "configs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    if not names or "adapters" in names:
        record_adapters()


def record_adapters() -> None:
    adapters = {
        f"{name} ({kind})": record_adapter(base, options)
        for kind, base in BASES.items()
        for name, options in ADAPTERS.items()
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps({key: rounded(part) for key, part in value.items()}, sort_keys=True)}"
        for name, value in adapters.items()
    ]
    (HERE / "adapters.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
