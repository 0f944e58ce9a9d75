"""The data stage: the dialogues, their tokenizer, and both as arrays."""

from dataclasses import dataclass

import jax

from ctrl_jax import config
from ctrl_jax.data import dialogues, pipelines, tokenizers
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.stages import Stage, write_bytes
from ctrl_jax.types import Examples, PreferencePairs, Responses


@dataclass(frozen=True)
class Corpus:
    data: config.Data
    records: dict[str, list[dialogues.Record]]
    """By split: train, validation, test. Their prompts do not overlap."""
    tokenizer: tokenizers.Tokenizer
    stage: str

    @property
    def demonstrations(self) -> Examples:
        return pipelines.demonstrations(self.records["train"], self.tokenizer, **self._lengths)

    def pairs(self, split: str) -> PreferencePairs:
        return pipelines.preference_pairs(self.records[split], self.tokenizer, **self._lengths)

    def prompts(self, split: str, count: int) -> pipelines.PromptSet:
        """The first `count` distinct prompts of a split.

        Raises:
          InputError: if the split has fewer.
        """
        found = pipelines.prompts(self.records[split], self.tokenizer, prompt_length=self.data.prompt_length)
        if len(found.texts) < count:
            raise InputError(
                f"{count} {split} prompts are asked for, but the dialogues have {len(found.texts)}; ask for at most "
                "that many (--calibration.prompts, --evaluation.prompts), or generate more (--data.dialogues)."
            )
        return pipelines.PromptSet(jax.tree.map(lambda x: x[:count], found.prompts), found.texts[:count])

    def texts(self, responses: Responses) -> list[list[str]]:
        """The text of every response: [B][N]."""
        return pipelines.decoded(responses, self.tokenizer)

    @property
    def _lengths(self) -> dict[str, int]:
        return {"prompt_length": self.data.prompt_length, "response_length": self.data.response_length}


def prepare(data: config.Data, stage: Stage) -> Corpus:
    """Generates the dialogues and trains the tokenizer on them, or reads both."""
    with stage.exclusive():
        records = dialogues.load(data.side, seed=data.seed, count=data.dialogues, data_dir=stage.directory / "tfds")
        path = stage.directory / tokenizers.FILENAME
        if not stage.complete:
            texts = [f"{record['prompt']} {record['response']}" for record in records["train"]]
            write_bytes(path, tokenizers.train(texts, vocabulary_size=data.vocabulary_size).model)
            stage.finish({split: len(rows) for split, rows in records.items()})
    return Corpus(data, records, tokenizers.load(stage.directory), stage.directory.name)
