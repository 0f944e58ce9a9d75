"""The records of an experiment with their tokenizer: prompts, demonstrations and pairs as arrays, and back as text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ctrl_jax.data import pipelines, tokenizers
from ctrl_jax.data.conversations import Conversation, Record, Written, messages, transcript
from ctrl_jax.data.forms import Format
from ctrl_jax.data.rows import shown
from ctrl_jax.errors import InputError
from ctrl_jax.types import Prompts, Responses


@dataclass(frozen=True)
class Corpus:
    records: dict[str, list[Record]]
    """By split: train, validation, test. Their prompts do not overlap."""
    tokenizer: tokenizers.Tokenizer
    prompt_length: int
    """P: the longest prompt, in tokens."""
    response_length: int
    """T: the longest response, in tokens."""
    long_prompts: pipelines.LongPrompts = "drop"
    format: Format = "chat"
    """What a prompt is. The tokenizer writes it so."""
    source: str = "the data"
    """Names where the records come from, in messages."""
    origin: str = ""
    """How many rows gave the records, and where the splits come from."""
    vocabulary: str | None = None
    """What is wrong with the vocabulary's size, where the tokenizer is a stand-in for one that cannot be trained."""

    def contents(self, *splits: str) -> dict[str, Any]:
        """All that a stage may take of these splits: their records, the tokenizer, and the lengths of their tokens."""
        # Not the source, nor its seed and size: the records are what they gave.
        lengths = {name: getattr(self, name) for name in ("prompt_length", "long_prompts", "response_length")}
        records = {split: self.digests[split] for split in splits}
        return {**lengths, "tokenizer": self.tokenizer.fingerprint, "records": records}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each split's records, whatever fields they have."""
        return {split: _digest(records) for split, records in self.records.items()}

    def demonstrations(self, field: pipelines.Demonstrations, *, count: int | None = None) -> pipelines.ExampleSet:
        """What of the train split can be learned from, or the first `count` of that."""
        return pipelines.demonstrations(
            self.records["train"], self.tokenizer, field=field, count=count, **self._lengths
        )

    def pairs(
        self, split: str, *, count: int | None = None, long_prompts: pipelines.LongPrompts | None = None
    ) -> pipelines.ExampleSet:
        """The preference pairs of a split that can be learned from, or the first `count` of these.

        `long_prompts` says what becomes of longer prompts; by default what becomes of all others.
        """
        lengths = {**self._lengths, "long_prompts": long_prompts or self.long_prompts}
        return pipelines.preference_pairs(self.records[split], self.tokenizer, count=count, **lengths)

    def has_pairs(self, split: str, *, long_prompts: pipelines.LongPrompts | None = None) -> bool:
        """Whether the split has a pair that can be learned from."""
        try:
            return bool(self.pairs(split, count=1, long_prompts=long_prompts).examples.prompts.ids.size)
        except InputError:
            return False

    def prompts(self, split: str, count: int) -> pipelines.PromptSet:
        """The first `count` distinct prompts of a split that fit.

        Raises:
          InputError: if the split has fewer.
        """
        found = pipelines.prompts(
            self.records[split],
            self.tokenizer,
            prompt_length=self.prompt_length,
            long_prompts=self.long_prompts,
            count=count,
        )
        if len(found.texts) < count:
            raise InputError(
                f"{count} {split} prompts are asked for, but {self.source} has {len(found.texts)} of at most "
                f"{self.prompt_length} tokens, and {found.dropped} that are longer.",
                field=f"{split} prompts",
                value=count,
                remedy="Ask for fewer (`calibration.prompts`, `evaluation.prompts`), let longer ones in "
                "(`data.prompt_length`, or `data.long_prompts=truncate`), or give more data (`data.dialogues`, "
                "`data.path`).",
            )
        return found

    def texts(self, responses: Responses) -> list[list[str]]:
        """The text of every response: [B][N]."""
        return pipelines.decoded(responses, self.tokenizer)

    def conversations(self, prompts: Prompts) -> list[Conversation]:
        """The conversations of prompts [B], by their ids."""
        return [record.prompt for record in self.asked(prompts)]

    def asked(self, prompts: Prompts) -> list[Record]:
        """The first record of each of the prompts [B], by their ids: the prompt as it is written."""
        ids = np.asarray(prompts.ids).tolist()
        return [self._by_id.get(prompt_id) or self._elsewhere[prompt_id] for prompt_id in ids]

    def remember(self, prompts: pipelines.PromptSet) -> bool:
        """Makes prompts from elsewhere known to `conversations`; whether all of them are the data's own."""
        ids = prompts.prompts.ids.tolist()
        for prompt_id, conversation in zip(ids, prompts.conversations, strict=True):
            self._elsewhere[prompt_id] = Record(conversation, written=self._as_written(conversation))
        return all(prompt_id in self._by_id for prompt_id in ids)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """What the rows say beside prompts and replies."""
        return tuple(
            dict.fromkeys(name for records in self.records.values() for row in records for name in row.columns)
        )

    def values(self, names: Sequence[str]) -> dict[int, dict[str, Any]]:
        """The columns `names` of every prompt, by its id; None where no row of the prompt has a value.

        Raises:
          InputError: if rows of one prompt have different values.
        """
        by_text: dict[str, dict[str, Any]] = {}
        for record in (record for of_split in self.records.values() for record in of_split):
            values = by_text.setdefault(transcript(record.prompt), dict.fromkeys(names))
            for name in names:
                value, before = record.columns.get(name), values[name]
                if None not in (value, before) and repr(before) != repr(value):
                    raise InputError(
                        f"The prompt {shown(record.prompt[-1].content)} has two values of {name!r}, {shown(before)} "
                        f"and {shown(value)}, and the reward function asks for one.",
                        field=name,
                        value=(before, value),
                        remedy="Mend the rows, or let the function leave that column out: name the columns it needs "
                        "instead of **columns.",
                    )
                values[name] = before if value is None else value
        # Backwards: of two texts with one id `prompts` keeps the first.
        ids = pipelines.prompt_ids([*by_text]).tolist()
        return dict(zip(ids[::-1], [*by_text.values()][::-1], strict=True))

    @staticmethod
    def id_of(record: Record) -> int:
        """The id of a record's prompt."""
        return int(pipelines.prompt_ids([transcript(record.prompt)])[0])

    @cached_property
    def _lengths(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("prompt_length", "response_length", "long_prompts")}

    @cached_property
    def _by_id(self) -> dict[int, Record]:
        # Backwards: of two texts with one id `prompts` keeps the first.
        records = [record for of_split in self.records.values() for record in of_split][::-1]
        texts = [transcript(record.prompt) for record in records]
        return dict(zip(pipelines.prompt_ids(texts).tolist(), records, strict=True))

    @cached_property
    def _elsewhere(self) -> dict[int, Record]:
        """Prompts that are not of the data, by id."""
        return {}

    def _as_written(self, conversation: Conversation) -> Written | None:
        """A prompt from elsewhere in the form that the data's have."""
        example = next(record for of_split in self.records.values() for record in of_split)
        if isinstance(example.written, list):
            return messages(conversation)
        transcribed = example.asked == transcript(example.prompt)
        return conversation[0].content if len(conversation) == 1 and not transcribed else None


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
