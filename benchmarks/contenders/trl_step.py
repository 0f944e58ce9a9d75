"""TRL's RLOO and GRPO trainers, without gradient checkpointing: in float32, or on a GPU in its mixed precision."""

import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.cases import Case, even_share, prompt_tokens, spell
from benchmarks.contenders.transformers_sampling import log_prob, prepare
from benchmarks.worker import Turn


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(even_share(ids)) for ids in completion_ids]


class Boundary(TrainerCallback):
    def __init__(self, turn: Turn):
        self._turn = turn

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turn()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._turn()


def run(case: Case, folder: Path, turn: Turn, *, algorithm: str, micro_batches: int) -> None:
    if algorithm == "rloo":
        from trl import RLOOConfig as Config
        from trl import RLOOTrainer as Trainer
    else:
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

    device = prepare(case, turn)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device)
    tokens = prompt_tokens(case, model.config.vocab_size)
    turn.log_prob = log_prob(model.eval(), torch.from_numpy(tokens[0]).long().to(device))
    prompts = [spell(prompt) for prompt in tokens]
    config = Config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case.rows // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=case.samples,
        max_completion_length=case.new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # In TRL's mixed precision the static cache is of another type than what is written to it.
        cache_implementation="static" if case.device == "cpu" else None,
        num_iterations=1,
        beta=0.05,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=1_000_000,
        use_cpu=case.device == "cpu",
        bf16=case.dtype == "bfloat16",
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[Boundary(turn)],
    )
    trainer.train()
