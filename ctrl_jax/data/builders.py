"""Preparing and reading the TFDS data sets, without TensorFlow and without its chatter."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ctrl_jax.data.conversations import Conversation, Record, transcript
from ctrl_jax.data.splits import SPLITS, Loaded

Texts = dict[str, str]


def features(*names: str) -> Any:
    """A text a name."""
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})


def texts(records: Iterable[Record], prompt: Callable[[Conversation], str] = transcript) -> Iterator[tuple[int, Texts]]:
    """Records as TFDS stores them, numbered: the text of the prompt, and of the replies that there are."""
    for i, record in enumerate(records):
        replies = {"response": record.response, "chosen": record.chosen, "rejected": record.rejected}
        yield i, {"prompt": prompt(record.prompt)} | {name: text for name, text in replies.items() if text is not None}


def prepared(builder: type[tfds.core.GeneratorBasedBuilder], config: Any, data_dir: Path) -> Any:
    """The builder of a configuration, or of a built-in one by name; its data prepared in `data_dir` on first use."""
    with _quiet():
        made = builder(config=config, data_dir=data_dir, file_format="array_record")
        made.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return made


def read(builder: Any) -> dict[str, list[Texts]]:
    """The rows of every split of a prepared builder."""
    return {
        split: [{name: text.decode() for name, text in row.items()} for row in source]
        for split, source in builder.as_data_source().items()
    }


def loaded(builder: Any, conversation: Callable[[str], Conversation]) -> Loaded:
    """The records of a prepared builder of pairs, whose prompts are texts that `conversation` reads.

    The demonstration is the chosen reply.
    """
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for split, rows in read(builder).items():
        for row in rows:
            prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
            records[split].append(Record(conversation(prompt), chosen, chosen, rejected, written=prompt))
    metadata = builder.info.metadata
    # Data that an older version prepared says nothing of its splits.
    return Loaded(records, metadata["rows"], metadata["dropped"], metadata.get("origin", ""))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's prints and progress bars, and without its warning that the configuration is not a built-in one."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)
