"""A sequence classifier from a Hugging Face directory."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import Conversation
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.forms import Format
from ctrl_jax.data.pipelines import padded
from ctrl_jax.devices import partitioning
from ctrl_jax.errors import InputError
from ctrl_jax.models import attention, huggingface, networks, weights
from ctrl_jax.models.lora import Lora
from ctrl_jax.rewards.reward import ROUNDING, Reward, scorer
from ctrl_jax.runtime import hosts
from ctrl_jax.types import Prompts, Responses

FIELD = "reward_model.path"
BUCKET = 32
"""A classifier reads its own tokens padded to this or the next power of two, so that few programs are compiled."""


def reward(
    folder: Path, corpus: Corpus, mesh: Mesh, *, dtype: Literal["float32", "bfloat16"], field: str = FIELD
) -> Reward:
    """A sequence classifier with one label, which reads the conversation in its own tokens and template.

    It scores what transformers' classifier of that directory scores: the finished conversation as its template writes
    it, which is what it was trained on, at the last token that is not `pad_token_id`. Where a model pads with the token
    that ends a turn, that is the token before. A policy's own reward model, which is trained here, reads the policy's
    tokens instead, prompt and response as they are sampled. Of plain texts it reads prompt and response as one text.

    Args:
      folder: in the form of Hugging Face; its weights and tokenizer are part of the fingerprint.
      corpus: has the texts of prompts and responses.
      mesh: the devices that hold the weights and divide a batch.
      dtype: what is computed in.
      field: of the configuration, which the folder is the value of; named in errors.

    Raises:
      InputError: if the folder has no such classifier; from the score, if a text is longer than its context.
    """
    architecture = huggingface.architecture(folder, dtype=dtype)
    check_format(folder, corpus.format, field=field)
    tokenizer = pretrained_tokenizers.load(folder, embedding_rows=architecture.vocabulary_size, format=corpus.format)
    if not huggingface.is_classifier(folder):
        raise InputError(
            f"{field} is {folder}, whose config.json is not a sequence classifier's",
            field=field,
            value=str(folder),
            remedy="give one with a single label, or leave the option out to train a reward model.",
        )
    place = partial(partitioning.sharding, mesh)
    trunk = weights.load(folder, architecture, place=place)
    head = weights.load_reward_head(folder, architecture, place=place)
    params = {"params": {"trunk": trunk, "head": head}}
    network = scorer(networks.create(architecture, Lora(), fused_attention=attention.has_kernel(mesh)), mesh)
    pad, context = huggingface.pad_token_id(folder), huggingface.context(folder)

    def tokens_of(conversation: Conversation, text: str) -> list[int]:
        tokens = _without_padding(tokenizer.encode_conversation(conversation, text), pad)
        if context is not None and len(tokens) > context:
            raise InputError(
                f"A prompt with its response has {len(tokens)} tokens of the classifier at {field} "
                f"{folder}, which was made for {context} (max_position_embeddings in its config.json). The response "
                f"begins with {text[:60]!r}.",
                field=field,
                value=len(tokens),
                remedy="Lower `data.prompt_length` or `data.response_length`, or give a classifier with a longer "
                "context.",
            )
        return tokens

    def score(prompts: Prompts, responses: Responses) -> Any:
        prompts, responses = hosts.addressable((prompts, responses))
        pairs = zip(corpus.conversations(prompts), corpus.texts(responses), strict=True)
        return network(
            params, *_divided([[tokens_of(said, text) for text in texts] for said, texts in pairs], prompts.ids)
        )

    fingerprint = f"classifier-{weights.fingerprint(folder)}-{tokenizer.fingerprint}"
    return Reward(score, fingerprint, name=str(folder), tolerance=ROUNDING[dtype])


def check_format(folder: Path, format: Format, *, field: str = FIELD) -> None:
    """Refuses a classifier of conversations where prompts are plain texts, which its template cannot write.

    Raises:
      InputError: naming `field`, whose value the folder is.
    """
    if format == "plain" and pretrained_tokenizers.has_template(folder):
        raise InputError(
            f"`{field}` is {folder}, whose chat template makes it a judge of conversations, and `data.format` is plain",
            field=field,
            value=str(folder),
            remedy="give a classifier of texts, which has no template, or `data.format=chat`.",
        )


def _without_padding(tokens: list[int], pad: int | None) -> list[int]:
    """Up to the last token that is no padding; of padding alone transformers reads the first."""
    last = next((i for i in reversed(range(len(tokens))) if tokens[i] != pad), 0)
    return tokens[: last + 1]


def _divided(rows: Sequence[Sequence[list[int]]], ids: Any) -> tuple[Prompts, Responses]:
    """[B][N] sequences: as prompts the beginning that a row's sequences share, which is read once, and the rest."""
    shared = [_shared(row) for row in rows]
    prompts, prompt_lengths = _bucketed([row[0][:length] for row, length in zip(rows, shared, strict=True)])
    tokens, lengths = _bucketed([tokens[length:] for row, length in zip(rows, shared, strict=True) for tokens in row])
    shape = (len(rows), len(rows[0]))
    return Prompts(prompts, prompt_lengths, ids), Responses(tokens.reshape(*shape, -1), lengths.reshape(shape))


def _shared(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with, but at most all but the last of one: there its score is read."""
    columns = zip(*(tokens[:-1] for tokens in sequences), strict=False)
    return len([*itertools.takewhile(lambda column: len(set(column)) == 1, columns)])


def _bucketed(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    return padded(rows, 1 << (max(BUCKET, *map(len, rows)) - 1).bit_length(), 0)
