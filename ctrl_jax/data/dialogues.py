"""The embedded dialogues as a TFDS dataset: generated from a seed, nothing downloaded, no TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ctrl_jax.data import builders
from ctrl_jax.data.conversations import Record, parse
from ctrl_jax.data.language import gold_reward, requests, sample_reply, side_of
from ctrl_jax.data.splits import SPLITS
from ctrl_jax.errors import InputError

HELD_OUT = 0.1
"""Share of a side's prompts in validation, and in test."""


@dataclass(eq=False)
class DialoguesConfig(tfds.core.BuilderConfig):
    side: str = "helpful"
    seed: int = 0
    count: int = 12_000
    """Dialogues of the train split; validation and test have a tenth, and at least one for each of their prompts."""


def config(side: str, *, seed: int, count: int) -> DialoguesConfig:
    """The builder config of one set of dialogues; its name tells sets apart in a data directory."""
    side_of(side)
    if count < 1:
        raise InputError(
            f"The number of dialogues is {count}", field="data.dialogues", value=count, remedy="it must be at least 1."
        )
    if seed < 0:
        raise InputError(
            f"The seed of the dialogues is {seed}", field="data.seed", value=seed, remedy="it must be 0 or greater."
        )
    return DialoguesConfig(name=f"{side}_{seed}_{count}", side=side, seed=seed, count=count)


class Dialogues(tfds.core.GeneratorBasedBuilder):
    """Dialogues in hh-rlhf's text form, with preference pairs drawn from the gold reward.

    Of each record, `response` is a demonstration; `chosen` and `rejected` are two more, put in order by Bradley-Terry
    on the gold reward (whose unit is the log-odds). The splits' prompts are disjoint, and a split visits its prompts in
    turn. Record i of a split depends on the seed and i alone, so that a larger count extends a smaller one.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads a plain list)
        DialoguesConfig(name="helpful", side="helpful"),
        DialoguesConfig(name="harmless", side="harmless"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=builders.features("prompt", "response", "chosen", "rejected"),
            supervised_keys=("prompt", "response"),
            description="Generated dialogues with preference pairs from a gold reward in closed form.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, builders.Texts]]]:
        return {split: builders.texts(records(self.builder_config, split)) for split in SPLITS}

    def _generate_examples(
        self, examples: Iterator[tuple[int, builders.Texts]]
    ) -> Iterator[tuple[int, builders.Texts]]:
        return examples


def records(config: DialoguesConfig, split: str) -> Iterator[Record]:
    """The records of a split."""
    known = list(requests(config.side))
    held_out = round(HELD_OUT * len(known))
    bounds = {"validation": (0, held_out), "test": (held_out, 2 * held_out), "train": (2 * held_out, len(known))}
    start, stop = bounds[split]
    order = np.random.default_rng((config.seed, len(bounds))).permutation(len(known))[start:stop]
    count = config.count if split == "train" else max(len(order), config.count // 10)
    for i in range(count):
        rng = np.random.default_rng((config.seed, list(bounds).index(split), i))
        request, prompt = known[order[i % len(order)]]
        response, first, second = (sample_reply(request, rng) for _ in range(3))
        while second == first:
            second = sample_reply(request, rng)
        log_odds = gold_reward(prompt, first) - gold_reward(prompt, second)
        chosen, rejected = (first, second) if rng.random() < 1 / (1 + np.exp(-log_odds)) else (second, first)
        yield Record(parse(prompt), response, chosen, rejected)


def load(side: str, *, seed: int, count: int, data_dir: Path) -> dict[str, list[Record]]:
    """The records of every split (`train`, `validation`, `test`), prepared in `data_dir` on first use.

    Errors: InputError for an unknown side, a negative seed, or a count below 1.
    """
    builder = builders.prepared(Dialogues, config(side, seed=seed, count=count), data_dir)
    return {
        split: [Record(parse(row["prompt"]), row["response"], row["chosen"], row["rejected"]) for row in rows]
        for split, rows in builders.read(builder).items()
    }
