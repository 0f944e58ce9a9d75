"""SmolLM2-135M-Instruct beside transformers, on real dialogues; for where both are at hand."""

import gzip
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.models import huggingface, weights
from ctrl_jax.models.decoder import Decoder, policy
from ctrl_jax.types import Prompts, Responses

HH = Path(os.environ.get("CTRL_JAX_HH_RLHF", "none")) / "helpful-base.jsonl.gz"
FOLDER = Path(os.environ.get("CTRL_JAX_SMOLLM2", "none"))
REPLY = "\n\nAssistant:"
P, T = 96, 160
EOS = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="set CTRL_JAX_SMOLLM2 to the directory of SmolLM2-135M-Instruct"),
    pytest.mark.skipif(not HH.exists(), reason="set CTRL_JAX_HH_RLHF to a directory of published hh-rlhf files"),
]


@pytest.fixture(scope="module")
def oracle():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_grad_enabled(False)
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    architecture = huggingface.architecture(FOLDER, dtype="float32")
    return Decoder(architecture), {"params": weights.load(FOLDER, architecture)}


@pytest.fixture(scope="module")
def dialogues():
    with gzip.open(HH, "rt", encoding="utf-8") as rows:
        return [json.loads(row)["chosen"] for row in rows]


def prompts(sequences):
    tokens = np.zeros((len(sequences), P), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.array([len(ids) for ids in sequences])
    return Prompts(jnp.array(tokens), lengths, jnp.arange(len(sequences), dtype=jnp.uint32))


def test_greedy_continuations_are_those_of_transformers(oracle, tokenizer, model, dialogues):
    import torch

    new = 32
    asked = [text[: text.rindex(REPLY)].removeprefix("\n\nHuman: ") for text in dialogues if text.count(REPLY) == 1]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in asked
    ]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    encoded = [ids for ids in encoded if len(ids) <= P][:20]
    assert len(encoded) == 20 and len({len(ids) for ids in encoded}) > 5

    decoder, variables = model
    pure, batch = policy(decoder), prompts(encoded)
    features, cache = jax.jit(pure.prefill)(variables, batch)
    own = pure.start(cache, 1, new)
    decode, unembed = jax.jit(pure.decode), jax.jit(pure.unembed)
    features, found = features[:, None], []
    for index in range(new):
        found.append(unembed(variables, features).argmax(-1))
        features, own = decode(variables, cache, own, batch.lengths, found[-1], jnp.asarray(index))
    found = np.stack(found, axis=-1)[:, 0]

    for ids, ours in zip(encoded, found, strict=True):
        generated = oracle.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=EOS)
        expected = generated[0, len(ids) :].tolist()
        assert len(expected) == new or expected[-1] == EOS
        assert ours[: len(expected)].tolist() == expected


def test_perplexity_is_that_of_transformers(oracle, tokenizer, model, dialogues):
    import torch

    decoder, variables = model

    @jax.jit
    def log_probs(variables, prompts, responses):
        logits = jax.nn.log_softmax(decoder.apply(variables, prompts, responses))
        return jnp.take_along_axis(logits, responses.tokens[..., None], axis=-1)[..., 0]

    sums, counts = np.zeros(2), 0
    for text in dialogues[:100]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        split = min(len(ids) // 3, P)
        prompt, response = ids[:split], ids[split : split + T]
        padded = jnp.array([[[*response, *[0] * (T - len(response))]]])
        ours = log_probs(variables, prompts([prompt]), Responses(padded, jnp.array([[len(response)]])))
        logits = oracle(torch.tensor([[*prompt, *response]])).logits[0, split - 1 : -1]
        theirs = torch.log_softmax(logits.double(), -1)[range(len(response)), response]
        sums += np.asarray(ours)[0, 0, : len(response)].sum(dtype=np.float64), theirs.sum().item()
        counts += len(response)
    ours, theirs = np.exp(-sums / counts)
    print(f"perplexity {ours:.6f} here, {theirs:.6f} in transformers, over {counts} tokens")
    assert ours == pytest.approx(theirs, rel=1e-3)
