"""The data stage: the records, their tokenizer, and both as arrays."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rich.markup import escape

from ctrl_jax import config
from ctrl_jax.data import pipelines, sources, tokenizers
from ctrl_jax.data.conversations import Conversation, Record, transcript
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
        found = pipelines.demonstrations(
            self.records["train"],
            self.tokenizer,
            prompt_length=self.data.prompt_length,
            response_length=self.data.response_length,
            long_prompts=self.data.long_prompts,
        )
        self._tell_dropped("demonstrations", found.dropped)
        return found.examples

    def pairs(self, split: str) -> PreferencePairs:
        found = pipelines.preference_pairs(
            self.records[split],
            self.tokenizer,
            prompt_length=self.data.prompt_length,
            response_length=self.data.response_length,
            long_prompts=self.data.long_prompts,
        )
        self._tell_dropped(f"{split} preference pairs", found.dropped)
        return found.examples

    def has_pairs(self, split: str) -> bool:
        return any(record.rejected is not None for record in self.records[split])

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
        """What the prompts [B] are, told by their ids."""
        return [self._by_id[prompt_id] for prompt_id in np.asarray(prompts.ids).tolist()]

    def remember(self, prompts: pipelines.PromptSet) -> None:
        """Makes prompts from elsewhere known to `conversations`."""
        self._by_id.update(zip(prompts.prompts.ids.tolist(), prompts.conversations, strict=True))

    @cached_property
    def _by_id(self) -> dict[int, Conversation]:
        # Backwards: of two texts with one id `prompts` keeps the first.
        prompts = [record.prompt for records in self.records.values() for record in records][::-1]
        return dict(zip(pipelines.prompt_ids([*map(transcript, prompts)]).tolist(), prompts, strict=True))

    def _tell_dropped(self, what: str, dropped: int) -> None:
        if dropped:
            say(f"{dropped} {what} left out: their prompt has more than {self.data.prompt_length} tokens.")


def prepare(data: config.Data, stage: Stage, tokenizer: tokenizers.Tokenizer | None) -> Corpus:
    """Generates, downloads or reads the records, and trains a tokenizer on them where the model brings none."""
    with stage.exclusive(), hosts.first_then_others():
        if hosts.first() and not stage.complete:
            _discard_unfinished(stage)
        loaded = sources.load(data, stage.directory / "tfds")
        if tokenizer is None:
            tokenizer = _trained(data, loaded, stage)
        if not stage.complete:
            if loaded.dropped:
                reasons = ", ".join(f"{count} {reason}" for reason, count in loaded.dropped.items())
                say(f"{data.source}: {loaded.rows} rows, of which were dropped: {reasons}.")
            stage.finish({**{split: len(rows) for split, rows in loaded.records.items()}, "dropped": loaded.dropped})
    return Corpus(data, loaded.records, tokenizer)


def _discard_unfinished(stage: Stage) -> None:
    """Leaves of what an earlier process prepared only what it downloaded: nothing tells whether the rest is whole."""
    prepared = stage.directory / "tfds"
    if prepared.exists():
        say(f"[yellow]{escape(str(stage.directory))} was left without its {DONE}: it is prepared anew.")
    for path in [*prepared.glob("*"), stage.directory / tokenizers.FILENAME]:
        if path.is_dir() and path.name != "downloads":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _trained(data: config.Data, loaded: Loaded, stage: Stage) -> tokenizers.Tokenizer:
    path = stage.directory / tokenizers.FILENAME
    if not path.exists():
        texts = [f"{transcript(record.prompt)} {record.response or ''}" for record in loaded.records["train"]]
        write_bytes(path, tokenizers.train(texts, vocabulary_size=data.vocabulary_size).model)
    return tokenizers.load(stage.directory)


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
