"""google-tunix's sampler."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer
from tunix.generate import sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params

from benchmarks.cases import Case, prompt_tokens, read_sizes, spell
from benchmarks.worker import Turn


def load(folder: Path, mesh: jax.sharding.Mesh | None = None) -> llama.Llama3:
    sizes = read_sizes(folder)
    # tunix 0.1.7 rotates by a theta of a million, whatever the configuration says.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=sizes.rope_theta)
    config = llama.ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocabulary_size,
        embed_dim=sizes.width,
        hidden_dim=sizes.mlp_width,
        num_heads=sizes.heads,
        head_dim=sizes.head_dim,
        num_kv_heads=sizes.kv_heads,
        rope_theta=int(sizes.rope_theta),
        norm_eps=sizes.norm_epsilon,
        weight_tying=sizes.tied,
    )
    return llama_params.create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)


def log_prob(model: llama.Llama3, tokens: jax.Array) -> float:
    """Mean log-prob of tokens [P] after the first."""
    size = tokens.size - 1
    mask = jnp.tril(jnp.ones((1, size, size), bool))
    logits, _ = model(tokens[None, :-1], jnp.arange(size)[None], None, mask)
    return float(jnp.take_along_axis(jax.nn.log_softmax(logits[0]), tokens[1:, None], axis=-1).mean())


def run(case: Case, folder: Path, turn: Turn) -> None:
    model = load(folder)
    config = model.config
    sample = sampler.Sampler(
        model,
        AutoTokenizer.from_pretrained(folder),
        sampler.CacheConfig(
            case.prompt_length + case.new_tokens, config.num_layers, config.num_kv_heads, config.head_dim
        ),
    )
    turn.log_prob = log_prob(model, jnp.asarray(prompt_tokens(case, config.vocab_size)[0]))
    texts = [spell(prompt) for prompt in prompt_tokens(case, config.vocab_size) for _ in range(case.samples)]
    step = 0
    while True:
        turn()
        step += 1
        output = sample(
            texts,
            max_generation_steps=case.new_tokens,
            max_prompt_length=case.prompt_length,
            temperature=1.0,
            top_p=1.0,
            seed=step,
            # No token has this id.
            eos_tokens=[-1],
        )
        assert sum(len(tokens) for tokens in output.tokens) == case.tokens
