"""The data stage: the records, their tokenizer, and both as arrays."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ctrl_jax import config
from ctrl_jax.data import pipelines, sources, tokenizers
from ctrl_jax.data.conversations import Conversation, Record, Written, messages, transcript
from ctrl_jax.data.rows import shown
from ctrl_jax.data.splits import Loaded
from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import DONE, Stage, fingerprint, write_bytes
from ctrl_jax.types import Examples, PreferencePairs, Prompts, Responses


@dataclass(frozen=True)
class Corpus:
    data: config.Data
    records: dict[str, list[Record]]
    """By split: train, validation, test. Their prompts do not overlap."""
    tokenizer: tokenizers.Tokenizer
    origin: str = ""
    """How many rows gave the records, and where the splits come from."""
    vocabulary: str | None = None
    """What is wrong with the vocabulary's size, where the tokenizer is a stand-in for one that cannot be trained."""

    def key(self, *splits: str) -> str:
        """Names all that a stage may take of these splits: their records, the tokens of these, and their lengths."""
        # Not the source, nor its seed and size: the records are what they gave.
        lengths = {name: getattr(self.data, name) for name in ("prompt_length", "long_prompts", "response_length")}
        records = {split: self.digests[split] for split in splits}
        return fingerprint({**lengths, "tokenizer": self.tokenizer.fingerprint, "records": records})

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each split's records, whatever fields they have."""
        return {split: _digest(records) for split, records in self.records.items()}

    @property
    def demonstrations(self) -> Examples:
        found = self.first_demonstrations(None)
        self._say_left_out("demonstrations", found)
        return found.examples

    def first_demonstrations(self, count: int | None) -> pipelines.ExampleSet:
        """The first `count` of the train split that can be learned from, or all."""
        return pipelines.demonstrations(
            self.records["train"], self.tokenizer, field=self.data.demonstrations, count=count, **self._lengths
        )

    def pairs(self, split: str) -> PreferencePairs:
        found = self.first_pairs(split, None)
        self._say_left_out(f"{split} preference pairs", found)
        return found.examples

    def first_pairs(self, split: str, count: int | None) -> pipelines.ExampleSet:
        """The first `count` of a split that can be learned from, or all."""
        return pipelines.preference_pairs(self.records[split], self.tokenizer, count=count, **self._lengths)

    def has_pairs(self, split: str) -> bool:
        """Whether the split has a pair that can be learned from."""
        try:
            return bool(self.first_pairs(split, 1).examples.prompts.ids.size)
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
            prompt_length=self.data.prompt_length,
            long_prompts=self.data.long_prompts,
            count=count,
        )
        if len(found.texts) < count:
            raise InputError(
                f"{count} {split} prompts are asked for, but {self.data.source} has {len(found.texts)} of at most "
                f"{self.data.prompt_length} tokens, and {found.dropped} that are longer. Ask for fewer "
                "(--calibration.prompts, --evaluation.prompts), let longer ones in (--data.prompt-length, or "
                "--data.long-prompts truncate), or give more data (--data.dialogues, --data.path)."
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
                        f"and {shown(value)}, and the reward function asks for one. Mend the rows, or let the function "
                        "leave that column out: name the columns it needs instead of **columns."
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
        data = self.data
        names = ("prompt_length", "response_length", "long_prompts")
        return {name: getattr(data, name) for name in names}

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

    def _say_left_out(self, what: str, found: pipelines.ExampleSet) -> None:
        data, kept = self.data, len(found.examples.prompts.ids)
        if found.dropped:
            say(f"{found.dropped} {what} left out: their prompt has more than {data.prompt_length} tokens.")
        if found.equal:
            say(
                f"{found.equal} {what} left out: their replies are equal in the first {data.response_length} tokens "
                "(--data.response-length)."
            )
        if found.empty:
            say(f"{found.empty} {what} left out: a reply has no token.")
        if found.unended:
            say(
                f"{found.unended} of {kept} {what} ({found.unended / kept:.1%}) do not end within "
                f"{data.response_length} tokens, and are cut there: what is learned from them has no end "
                "(--data.response-length)."
            )


def prepare(data: config.Data, stage: Stage, tokenizer: tokenizers.Tokenizer | None) -> Corpus:
    """Generates, downloads or reads the records, and trains a tokenizer on them where the model brings none."""
    vocabulary = None
    with stage.exclusive(), hosts.first_then_others():
        if hosts.first() and not stage.complete:
            _discard_unfinished(stage)
        loaded = sources.load(data, stage.directory / "tfds")
        sizes = {split: len(rows) for split, rows in loaded.records.items()}
        origin = _origin(data, loaded, sizes)
        if tokenizer is None:
            tokenizer, vocabulary = _trained(data, loaded, stage)
        if not stage.complete and vocabulary is None:
            if not data.generated:
                say(origin)
            stage.finish({**sizes, "dropped": loaded.dropped})
    return Corpus(data, loaded.records, tokenizer, origin=origin, vocabulary=vocabulary)


def _discard_unfinished(stage: Stage) -> None:
    """Leaves of what an earlier process prepared only what it downloaded: nothing tells whether the rest is whole."""
    prepared = stage.directory / "tfds"
    if prepared.exists():
        say(f"{stage.directory} was left without its {DONE}: it is prepared anew.", style="yellow")
    for path in [*prepared.glob("*"), stage.directory / tokenizers.FILENAME]:
        if path.is_dir() and path.name != "downloads":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _origin(data: config.Data, loaded: Loaded, sizes: Mapping[str, int]) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in loaded.dropped.items())
    return (
        f"{data.source}: {loaded.rows} rows gave {sizes['train']} records to train on, {sizes['validation']} for "
        f"validation and {sizes['test']} to test on"
        + (f" ({loaded.origin})" if loaded.origin else "")
        + (f"; dropped: {dropped}." if dropped else ".")
    )


def _trained(data: config.Data, loaded: Loaded, stage: Stage) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer; or the largest that the data holds, which is not kept, and what is wrong with the size."""
    path = stage.directory / tokenizers.FILENAME
    if not path.exists():
        texts = [" ".join((transcript(record.prompt), *_replies(record))) for record in loaded.records["train"]]
        try:
            trained = tokenizers.train(texts, vocabulary_size=data.vocabulary_size or config.VOCABULARY)
        except tokenizers.VocabularyTooLarge as error:
            trained = tokenizers.train(texts, vocabulary_size=error.bound)
            if data.vocabulary_size is not None:
                return trained, str(error)
            say(f"The vocabulary has {error.bound} pieces instead of {config.VOCABULARY}: the data holds no more.")
        write_bytes(path, trained.model)
    return tokenizers.load(stage.directory), None


def _replies(record: Record) -> list[str]:
    """What the model may have to write: the response, or the replies of the pair where there is none."""
    if record.response is not None:
        return [record.response]
    return [text or "" for text in (record.chosen, record.rejected)]


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
