"""From records to the numpy pytrees of `types`, and batches of them from a resumable grain pipeline."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np

from ctrl_jax.data.language import ASSISTANT, HUMAN, as_prompt
from ctrl_jax.data.tokenizers import Tokenizer
from ctrl_jax.errors import InputError
from ctrl_jax.types import Examples, Prompts, Responses

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class PromptSet:
    prompts: Prompts
    """Host arrays; ids are distinct."""
    texts: tuple[str, ...]
    """[B] as hh-rlhf writes them, up to where the reply begins."""


def prompts(records: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, prompt_length: int) -> PromptSet:
    """The distinct prompts of records, in the order of their first appearance; field `prompt`.

    A request without hh-rlhf's markers is rendered as a conversation's opening turn. Of two texts with one id (a chance
    of 1 in 4e9 a pair) the first stays.

    Errors: InputError where there is no record, a prompt is empty, or a prompt has more than `prompt_length` tokens.
    """
    texts = _rendered(records)
    first = sorted(np.unique(prompt_ids(texts), return_index=True)[1].tolist())
    texts = [texts[i] for i in first]
    return PromptSet(_tokenized(texts, tokenizer, prompt_length), tuple(texts))


def prompt_ids(texts: Sequence[str]) -> Any:
    """[B] uint32: the first four bytes of each text's BLAKE2s, so that an id depends on the text alone."""
    digests = b"".join(hashlib.blake2s(text.encode(), digest_size=4).digest() for text in texts)
    return np.frombuffer(digests, "<u4").astype(np.uint32)


def demonstrations(
    records: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, prompt_length: int, response_length: int
) -> Examples:
    """Examples with N = 1, the field `response`. Responses end in EOS, and are cut at `response_length` tokens.

    Errors: as `prompts`.
    """
    return _examples(records, ("response",), tokenizer, prompt_length, response_length)


def preference_pairs(
    records: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, prompt_length: int, response_length: int
) -> Examples:
    """Examples with N = 2, the field `chosen` before `rejected`; otherwise as `demonstrations`."""
    return _examples(records, ("chosen", "rejected"), tokenizer, prompt_length, response_length)


def decoded(responses: Responses, tokenizer: Tokenizer) -> list[list[str]]:
    """[B][N] texts of responses, without the space before their first word."""
    tokens, lengths = np.asarray(responses.tokens), np.asarray(responses.lengths)
    return [
        [tokenizer.decode(row[:length]).strip() for row, length in zip(rows, row_lengths, strict=True)]
        for rows, row_lengths in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]


def _examples(
    records: Sequence[Mapping[str, str]], fields: Sequence[str], tokenizer: Tokenizer, prompt_length: int,
    response_length: int,
) -> Examples:  # fmt: skip
    prompts = _tokenized(_rendered(records), tokenizer, prompt_length)
    responses = [
        [*tokenizer.encode(f" {record[field].strip()}".rstrip()), tokenizer.eos_id]
        for record in records
        for field in fields
    ]
    tokens, lengths = _padded([tokens[:response_length] for tokens in responses], response_length, tokenizer.pad_id)
    shape = (len(records), len(fields))
    return Examples(prompts, Responses(tokens.reshape(*shape, response_length), lengths.reshape(shape)))


def _rendered(records: Sequence[Mapping[str, str]]) -> list[str]:
    if not records:
        raise InputError("There are no records to take prompts from; give at least one.")
    texts = []
    for i, record in enumerate(records):
        text = record["prompt"]
        if not text.replace(HUMAN, "").replace(ASSISTANT, "").strip():
            raise InputError(f"The prompt of record {i} is empty ({text!r}); give it a text or leave the record out.")
        texts.append(text if HUMAN in text else as_prompt(text.strip()))
    return texts


def _tokenized(texts: Sequence[str], tokenizer: Tokenizer, prompt_length: int) -> Prompts:
    encoded = [tokenizer.encode(text) for text in texts]
    longest = max(encoded, key=len)
    if len(longest) > prompt_length:
        raise InputError(
            f"A prompt has {len(longest)} tokens, but the context holds {prompt_length}; shorten it or set "
            f"data.prompt_length to at least {len(longest)}. It is {texts[encoded.index(longest)].strip()!r}."
        )
    tokens, lengths = _padded(encoded, prompt_length, tokenizer.pad_id)
    return Prompts(tokens, lengths, prompt_ids(texts))


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Any, Any]:
    """(tokens [rows, length], lengths [rows]): numpy arrays, where the types of a device's arrays are asked for."""
    tokens = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


class Batches(Generic[Tree]):
    """An endless iterator over batches, whose place can be saved and set. See `batches`."""

    def __init__(self, arrays: Tree, indices: Any, fingerprint: str, share: slice):
        self._arrays = arrays
        self._indices = indices
        self._fingerprint = fingerprint
        self._share = share

    def __iter__(self) -> Iterator[Tree]:
        return self

    def __next__(self) -> Tree:
        index = np.asarray(next(self._indices))[self._share]
        return jax.tree.map(lambda array: array[index], self._arrays)

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch, as JSON can hold it, with the fingerprint of the pipeline."""
        return {"position": self._indices.get_state(), "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place. Errors: InputError where another pipeline saved it."""
        saved = state.get("fingerprint")
        if saved != self._fingerprint:
            raise InputError(
                f"The saved data position belongs to the pipeline {saved}, and this one is {self._fingerprint}: its "
                "data, batch size, seed or order differ. Resume with the configuration of the run that saved it, or "
                "start afresh in another work directory."
            )
        self._indices.set_state(state["position"])


def batches(
    arrays: Tree, *, batch_size: int, seed: int, shuffle: bool = True, process_index: int = 0, process_count: int = 1
) -> Batches[Tree]:
    """Endless batches over the leading axis of a pytree of numpy arrays; every epoch in a new order.

    The order depends on the data's length, the batch size and the seed alone. `batch_size` counts the rows of all
    processes: process i of n gets the i-th n-th of each batch, so that together they see what one process would, and a
    saved state is good for any number of processes.

    Errors: InputError where there are fewer rows than a batch has, or a batch does not divide among the processes.
    """
    leaves = jax.tree.leaves(arrays)
    rows = {len(leaf) for leaf in leaves}
    if len(rows) != 1:
        raise ValueError(f"The arrays must share their leading axis; they have {sorted(rows)} rows.")
    (size,) = rows
    if not 1 <= batch_size <= size:
        raise InputError(f"A batch of {batch_size} cannot be taken from {size} rows; use a batch size in 1..{size}.")
    if batch_size % process_count:
        raise InputError(
            f"A batch of {batch_size} rows does not divide among {process_count} processes; use a multiple of them."
        )
    order = grain.MapDataset.range(size).seed(seed)
    if shuffle:
        order = order.shuffle()
    # One thread less is one source of nondeterminism less, and faster for records this small.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    indices = iter(order.repeat().batch(batch_size, drop_remainder=True).to_iter_dataset(read))
    share = batch_size // process_count
    return Batches(
        arrays,
        indices,
        _fingerprint(leaves, batch_size, seed, shuffle),
        slice(process_index * share, (process_index + 1) * share),
    )


def _fingerprint(leaves: Sequence[np.ndarray], *settings: int) -> str:
    digest = hashlib.blake2s(repr(settings).encode(), digest_size=8)
    for leaf in leaves:
        digest.update(f"{leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
