"""From records to the numpy pytrees of `types`, and batches of them from a resumable grain pipeline."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import grain
import jax
import numpy as np

from ctrl_jax.data.conversations import Conversation, Record, transcript
from ctrl_jax.data.tokenizers import Tokenizer
from ctrl_jax.errors import InputError
from ctrl_jax.types import Examples, Prompts, Responses

Tree = TypeVar("Tree")


LongPrompts = Literal["drop", "truncate"]
Demonstrations = Literal["response", "chosen"]
"""The field of a record that is learned from."""


@dataclass(frozen=True)
class PromptSet:
    prompts: Prompts
    """Host arrays; ids are distinct."""
    conversations: tuple[Conversation, ...]
    """[B], whole even where the tokens are cut."""
    texts: tuple[str, ...]
    """[B] their transcripts, whatever the tokenizer makes of them."""
    dropped: int = 0
    """Distinct prompts that were left out because they are too long."""


@dataclass(frozen=True)
class ExampleSet:
    examples: Examples
    dropped: int = 0
    """Records that were left out because their prompt is too long."""
    empty: int = 0
    """Records that were left out because a reply has no token."""
    equal: int = 0
    """Pairs that were left out because their replies have the same tokens, as far as they are kept."""
    unended: int = 0
    """Of the examples, those of which no reply ends within the longest response: they are cut."""
    cut: int = 0
    """Of the examples, those whose prompt is too long, and lost its beginning."""


def prompts(
    records: Sequence[Record], tokenizer: Tokenizer, *, prompt_length: int, long_prompts: LongPrompts = "drop",
    count: int | None = None,
) -> PromptSet:  # fmt: skip
    """The distinct prompts of records, in the order of their first appearance; the first `count` that fit, if given.

    A prompt of more than `prompt_length` tokens is dropped and counted, or cut on the left: it loses its oldest turns,
    and only if the last alone is too long are tokens cut, of a chat model the template's beginning with them. Of two
    texts with one id (a chance of 1 in 4e9 a pair) the first stays.

    Errors: InputError where there is no record, a prompt is empty, or every prompt is too long.
    """
    fitted = _Fitted(tokenizer, prompt_length, long_prompts)
    seen = set[int]()
    kept: list[Conversation] = []
    for text, record in _with_texts(records):
        if len(kept) == count:
            break
        (prompt_id,) = prompt_ids([text]).tolist()
        if prompt_id not in seen and fitted.fits(text, record.prompt):
            kept.append(record.prompt)
        seen.add(prompt_id)
    texts = tuple(map(transcript, kept))
    return PromptSet(fitted.prompts(texts), tuple(kept), texts, fitted.too_long)


def prompt_ids(texts: Sequence[str]) -> Any:
    """[B] uint32: the first four bytes of each text's BLAKE2s, so that an id depends on the text alone."""
    digests = b"".join(hashlib.blake2s(text.encode(), digest_size=4).digest() for text in texts)
    return np.frombuffer(digests, "<u4").astype(np.uint32)


def demonstrations(
    records: Sequence[Record], tokenizer: Tokenizer, *, prompt_length: int, response_length: int,
    long_prompts: LongPrompts = "drop", field: Demonstrations = "response", count: int | None = None,
) -> ExampleSet:  # fmt: skip
    """Examples with N = 1, the records' `response` or what `field` names; the first `count`, if given.

    Responses are cut at `response_length` tokens, the EOS counted. One without a token is dropped and counted.

    Errors: as `prompts`; and where no record has a response.
    """
    having = [record for record in records if getattr(record, field) is not None]
    if records and not having:
        raise InputError(
            f"None of the {len(records)} records has a demonstration to fine-tune on{_what_there_is(records)}.",
            field="data.demonstrations",
            value=field,
            remedy=f"Give the rows a {field!r}{_or_chosen(records)}, or leave the fine-tuning of the model at "
            "`model.path` out by `sft.steps=0`.",
        )
    return _examples(having, (field,), tokenizer, prompt_length, response_length, long_prompts, count)


def preference_pairs(
    records: Sequence[Record], tokenizer: Tokenizer, *, prompt_length: int, response_length: int,
    long_prompts: LongPrompts = "drop", count: int | None = None,
) -> ExampleSet:  # fmt: skip
    """Examples with N = 2, the records' `chosen` before `rejected`; otherwise as `demonstrations`.

    A pair whose replies have the same tokens, as far as they are kept, is dropped and counted.
    """
    having = [record for record in records if record.chosen is not None and record.rejected is not None]
    if records and not having:
        raise InputError(
            f"None of the {len(records)} records has a preference pair to train the reward model "
            f"on{_what_there_is(records)}.",
            field="reward_model.path",
            value=None,
            remedy="Give the rows 'chosen' and 'rejected', or a reward that needs no pairs: `reward_model.path` or "
            "`reward_model.function`.",
        )
    fields = ("chosen", "rejected")
    return _examples(having, fields, tokenizer, prompt_length, response_length, long_prompts, count)


def _what_there_is(records: Sequence[Record]) -> str:
    demonstrations = sum(record.response is not None for record in records)
    pairs = sum(record.chosen is not None for record in records)
    if not demonstrations and not pairs:
        return ": they have prompts alone"
    return f": {demonstrations} have a response, {pairs} a pair"


def _or_chosen(records: Sequence[Record]) -> str:
    pairs = any(record.chosen is not None for record in records)
    return ", learn from the chosen replies by `data.demonstrations=chosen`" if pairs else ""


def decoded(responses: Responses, tokenizer: Tokenizer) -> list[list[str]]:
    """[B][N] texts of responses; in conversations without the white space around them."""
    tokens, lengths = np.asarray(responses.tokens), np.asarray(responses.lengths)
    return [
        [tokenizer.decode_response(row[:length]) for row, length in zip(rows, row_lengths, strict=True)]
        for rows, row_lengths in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]


def _examples(
    records: Sequence[Record], fields: Sequence[str], tokenizer: Tokenizer, prompt_length: int, response_length: int,
    long_prompts: LongPrompts, count: int | None,
) -> ExampleSet:  # fmt: skip
    fitted = _Fitted(tokenizer, prompt_length, long_prompts)
    texts: list[str] = []
    responses: list[list[int]] = []
    long = empty = equal = unended = cut = 0
    for text, record in _with_texts(records):
        if len(texts) == count:
            break
        if not fitted.fits(text, record.prompt):
            long += 1
            continue
        replies = [tokenizer.encode_response(getattr(record, field))[:response_length] for field in fields]
        if any(reply[0] in tokenizer.eos_ids for reply in replies):
            empty += 1
        elif len(replies) == 2 and replies[0] == replies[1]:
            equal += 1
        else:
            texts.append(text)
            responses += replies
            unended += all(reply[-1] not in tokenizer.eos_ids for reply in replies)
            cut += fitted.is_cut(text)
    if not texts and not long:
        raise InputError(
            f"None of {len(records)} records is left to learn {' and '.join(fields)} from: {equal} have replies that "
            f"are equal as far as `data.response_length` {response_length} keeps them, {empty} a reply without a "
            "token.",
            field="data.response_length",
            value=response_length,
            remedy="Raise `data.response_length`, or mend the rows.",
        )
    prompts = fitted.prompts(texts)
    tokens, lengths = padded(responses, response_length, tokenizer.pad_id)
    shape = (len(texts), len(fields))
    examples = Examples(prompts, Responses(tokens.reshape(*shape, response_length), lengths.reshape(shape)))
    return ExampleSet(examples, long, empty, equal, unended, cut)


def _with_texts(records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    if not records:
        raise InputError(
            "There are no records to take prompts from. A small file may leave a split empty",
            field="data.path",
            value=None,
            remedy="give it more rows, or a folder with train, validation and test of your own.",
        )
    for i, record in enumerate(records):
        if not record.prompt or not record.prompt[-1].content.strip():
            raise InputError(
                f"The prompt of record {i} is empty",
                field=f"the prompt of record {i}",
                value=record.prompt,
                remedy="give it a text or leave the record out.",
            )
        yield transcript(record.prompt), record


class _Fitted:
    """The tokens of prompts that fit into `length`, by transcript; each distinct prompt is encoded once."""

    def __init__(self, tokenizer: Tokenizer, length: int, long_prompts: LongPrompts):
        self._tokenizer = tokenizer
        self._length = length
        self._long_prompts = long_prompts
        self._tokens: dict[str, list[int]] = {}
        self._sizes: dict[str, int] = {}
        """Of the prompts that are too long, in tokens."""
        self._cut: set[str] = set()

    def fits(self, text: str, conversation: Conversation) -> bool:
        if text in self._sizes:
            return False
        if text not in self._tokens:
            tokens = self._tokenizer.encode_prompt(conversation)
            if len(tokens) > self._length and self._long_prompts == "drop":
                self._sizes[text] = len(tokens)
                return False
            if len(tokens) > self._length:
                self._cut.add(text)
                tokens = self._truncated(conversation)
            self._tokens[text] = tokens
        return True

    def is_cut(self, text: str) -> bool:
        """Whether a prompt that fits does so without its beginning."""
        return text in self._cut

    def _truncated(self, conversation: Conversation) -> list[int]:
        """Without its oldest turns, as many as it takes; a last turn that alone is too long loses its beginning."""
        system = [turn for turn in conversation[:1] if turn.role == "system"]
        starts = [i for i, turn in enumerate(conversation) if turn.role == "user"]
        tokens: list[int] = []
        for start in starts[1:] or starts:
            tokens = self._tokenizer.encode_prompt((*system, *conversation[start:]))
            if len(tokens) <= self._length:
                break
        return tokens[-self._length :]

    @property
    def too_long(self) -> int:
        return len(self._sizes)

    def prompts(self, texts: Sequence[str]) -> Prompts:
        if not texts:
            shortest = min(self._sizes, key=self._sizes.__getitem__)
            raise InputError(
                f"No prompt fits: all {self.too_long} have more than {self._length} tokens, the shortest "
                f"{self._sizes[shortest]}: {shortest.strip()!r}.",
                field="data.prompt_length",
                value=self._length,
                remedy="Set `data.prompt_length` to at least that, or `data.long_prompts=truncate`.",
            )
        tokens, lengths = padded([self._tokens[text] for text in texts], self._length, self._tokenizer.pad_id)
        return Prompts(tokens, lengths, prompt_ids(texts))


def padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Any, Any]:
    """(tokens [rows, length], lengths [rows]) of rows of tokens: numpy arrays, where a device's are asked for."""
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
                "data, batch size, seed or order differ.",
                field="fingerprint",
                value=saved,
                remedy="Resume with the configuration of the run that saved it, or start afresh in another work "
                "directory.",
            )
        self._indices.set_state(state["position"])


def batches(
    arrays: Tree, *, batch_size: int, seed: int, shuffle: bool = True, distinct: bool = False,
    process_index: int = 0, process_count: int = 1,
) -> Batches[Tree]:  # fmt: skip
    """Endless batches over the leading axis of a pytree of numpy arrays; every epoch in a new order.

    An array that is a memory map stays on disk, and a batch reads its own rows alone; only the fingerprint reads all of
    it once, a part at a time.

    A batch may have the last rows of one epoch and the first of the next, and among these a row twice. Where they are
    `distinct`, it has not: what is left of an epoch, less than a batch, is left out.

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
        raise InputError(
            f"A batch of {batch_size} cannot be taken from {size} rows",
            field="batch_size",
            value=batch_size,
            remedy=f"use a batch size in 1..{size}.",
        )
    if batch_size % process_count:
        raise InputError(
            f"A batch of {batch_size} rows does not divide among {process_count} processes",
            field="batch_size",
            value=batch_size,
            remedy="use a multiple of them.",
        )
    order = grain.MapDataset.range(size).seed(seed)
    if shuffle:
        order = order.shuffle()
    # One thread less is one source of nondeterminism less, and faster for records this small.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if distinct:
        order = order.batch(batch_size, drop_remainder=True).repeat()
    else:
        order = order.repeat().batch(batch_size, drop_remainder=True)
    indices = iter(order.to_iter_dataset(read))
    share = batch_size // process_count
    return Batches(
        arrays,
        indices,
        _fingerprint(leaves, batch_size, seed, shuffle, *([distinct] if distinct else [])),
        slice(process_index * share, (process_index + 1) * share),
    )


def _fingerprint(leaves: Sequence[np.ndarray], *settings: int) -> str:
    digest = hashlib.blake2s(repr(settings).encode(), digest_size=8)
    for leaf in leaves:
        digest.update(f"{leaf.shape} {leaf.dtype}".encode())
        rows = max(1, 2**24 // max(1, leaf[:1].nbytes))
        for start in range(0, len(leaf), rows):
            digest.update(np.ascontiguousarray(leaf[start : start + rows]).data)
    return digest.hexdigest()
