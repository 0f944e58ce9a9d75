"""transformers' `generate`, with its dynamic or its static cache, eager as it is on CPU by default, or compiled."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.cases import Case, prompt_tokens
from benchmarks.worker import Turn


def prepare(case: Case, turn: Turn) -> str:
    """torch's name of the device, which is told how to count its memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    if case.device == "cpu":
        return "cpu"
    turn.peak_bytes = torch.cuda.max_memory_allocated
    return "cuda"


def log_prob(model: Any, tokens: torch.Tensor) -> float:
    """Mean log-prob of tokens [P] after the first."""
    with torch.inference_mode():
        law = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)
    return float(law.gather(-1, tokens[1:, None]).mean())


def run(case: Case, folder: Path, turn: Turn, *, cache: str, compiled: bool = False) -> None:
    device = prepare(case, turn)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype))
    model = model.to(device).eval()
    prompts = torch.from_numpy(prompt_tokens(case, model.config.vocab_size)).long().to(device)
    turn.log_prob = log_prob(model, prompts[0])
    while True:
        turn()
        with torch.inference_mode():
            sequences = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=case.samples,
                max_new_tokens=case.new_tokens,
                eos_token_id=None,
                cache_implementation=cache,
                disable_compile=not compiled,
            )
        if case.device == "gpu":
            torch.cuda.synchronize()
        assert sequences.shape == (case.rows, case.prompt_length + case.new_tokens)
