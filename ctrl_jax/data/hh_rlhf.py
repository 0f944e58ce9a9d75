"""Anthropic's hh-rlhf as a TFDS dataset: downloaded from its published place, or read from a local copy.

Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF", arXiv 2204.05862. Contains offensive text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ctrl_jax.data import builders, jsonl, rows
from ctrl_jax.data.conversations import Record, parse, turns
from ctrl_jax.data.downloads import fetch, fingerprint
from ctrl_jax.data.splits import Loaded, collected, defect
from ctrl_jax.errors import InputError

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{file}.jsonl.gz"

# Bytes and sha256 of the published files. Where they are not known, the size is checked against what the server
# announces, and each line by being read.
PUBLISHED: dict[str, tuple[int | None, str | None]] = {
    "helpful-base/train": (16_200_131, "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4"),
    "helpful-base/test": (875_191, "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b"),
    "helpful-online/train": (20_127_228, "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a"),
    "helpful-online/test": (None, None),
    "helpful-rejection-sampled/train": (25_697_148, "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64"),
    "helpful-rejection-sampled/test": (None, None),
    "harmless-base/train": (None, None),
    "harmless-base/test": (742_801, None),
}
ORIGIN = "hh-rlhf's own files"
SUBSETS = tuple(dict.fromkeys(file.split("/")[0] for file in PUBLISHED))


@dataclass(eq=False)
class HhRlhfConfig(tfds.core.BuilderConfig):
    subset: str = ""
    folder: Path | None = None
    """A local copy; None downloads."""


class HhRlhf(tfds.core.GeneratorBasedBuilder):
    """Pairs of dialogues that differ in their last reply, of which people chose one.

    Each example has the common turns as a transcript, and the two replies. `info.metadata` has the rows that were read,
    and those that were dropped, by reason. The published test split stays as it is, save for its defective rows; see
    `splits.arranged` for the others.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [HhRlhfConfig(name=subset, subset=subset) for subset in SUBSETS]  # noqa: RUF012 (TFDS reads a list)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=builders.features("prompt", "chosen", "rejected"),
            description="Human preferences between two replies of an assistant.",
            homepage="https://huggingface.co/datasets/Anthropic/hh-rlhf",
            license="MIT",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, builders.Texts]]]:
        config = self.builder_config
        if config.folder is None:
            found = {split: _download(config.subset, split, dl_manager.download_dir) for split in ("train", "test")}
        else:
            found = files(config.folder, config.subset)
        loaded = collected({split: jsonl.rows(file) for split, file in found.items()}, read_row, ORIGIN)
        self.info.metadata.update(rows=loaded.rows, dropped=loaded.dropped, origin=loaded.origin)
        return {split: builders.texts(kept) for split, kept in loaded.records.items() if kept}

    def _generate_examples(
        self, examples: Iterator[tuple[int, builders.Texts]]
    ) -> Iterator[tuple[int, builders.Texts]]:
        return examples


def load(subset: str, *, path: Path | None, data_dir: Path) -> Loaded:
    """The records of a subset, prepared in `data_dir` on first use. The demonstration is the chosen reply.

    Errors: InputError for a path without the subset's files, a file that is not what it should be (with its line), or a
    download that fails.
    """
    config: HhRlhfConfig | str = subset
    if path is not None:
        config = HhRlhfConfig(name=f"{subset}_{fingerprint(files(path, subset))}", subset=subset, folder=path)
    return builders.loaded(builders.prepared(HhRlhf, config, data_dir), parse)


def files(path: Path, subset: str) -> dict[str, Path]:
    """By split, the files of a subset in a local copy: as published, flat, or the path itself if it is a file.

    Errors: InputError where there is none; it says what was looked for.
    """
    if path.is_file():
        return {"train": path}
    published = {
        split: file
        for split in ("train", "test")
        for suffix in jsonl.SUFFIXES
        if (file := path / subset / f"{split}{suffix}").is_file()
    }
    flat = [file for suffix in jsonl.SUFFIXES if (file := path / f"{subset}{suffix}").is_file()]
    if not published and not flat:
        raise InputError(
            f"There is no {subset} of hh-rlhf at {path}: neither {subset}/train.jsonl.gz or {subset}/test.jsonl.gz, "
            f"as published, nor {subset}.jsonl.gz (.jsonl will do as well).",
            field="data.path",
            value=str(path),
            remedy="Give `data.path` a folder that has them, or leave it out to download.",
        )
    return published or {"train": flat[0]}


def read_row(row: rows.Row, place: str) -> Record | str:
    """The pair of a row of two dialogues, or why it is defective. Errors: InputError where it has no two texts."""
    chosen, rejected = (turns(rows.text_of(row, name, place)) for name in ("chosen", "rejected"))
    if any(not dialogue or dialogue[-1].role != "assistant" for dialogue in (chosen, rejected)):
        return "no assistant turn last"
    if chosen[:-1] != rejected[:-1]:
        return "prompts differ"
    prompt = chosen[:-1]
    pair = Record(prompt, chosen=chosen[-1].content.strip(), rejected=rejected[-1].content.strip())
    if reason := defect(pair):
        return reason
    if any(not turn.content.strip() for turn in prompt):
        return "empty turn"
    # Some chat templates take nothing else than user, assistant, ..., user.
    if len(prompt) % 2 == 0 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(prompt)):
        return "turns do not alternate"
    return pair


def _download(subset: str, split: str, folder: Path) -> Path:
    file = f"{subset}/{split}"
    size, sha256 = PUBLISHED[file]
    return fetch(URL.format(file=file), Path(folder) / "hh_rlhf" / f"{file}.jsonl.gz", size=size, sha256=sha256)
