"""OpenAI's comparisons of TL;DR summaries as a TFDS dataset: downloaded, or read from a local copy.

Stiennon et al. 2020, "Learning to summarize from human feedback", arXiv 2009.01325; published beside
github.com/openai/summarize-from-feedback.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ctrl_jax.data import builders, jsonl, rows
from ctrl_jax.data.conversations import Conversation, Record, Turn
from ctrl_jax.data.downloads import fetch, fingerprint
from ctrl_jax.data.forms import Format
from ctrl_jax.data.splits import Loaded, arranged, defect
from ctrl_jax.errors import InputError

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/{file}.json"
# The comparisons of Reddit posts; the other published files compare summaries of news. Their checksums are not known:
# the size is checked against what the server announces, and each line against the schema.
BATCHES = (*(f"batch{i}" for i in range(3, 21)), "batch22")
SPLITS = {"train": "train", "valid1": "validation", "valid2": "test"}
"""As they are published, and here."""


@dataclass(eq=False)
class TldrConfig(tfds.core.BuilderConfig):
    folder: Path | None = None
    """A local copy; None downloads."""


class Tldr(tfds.core.GeneratorBasedBuilder):
    """Pairs of summaries of a Reddit post, of which people chose one.

    Each example has the post as a request for a summary, and the two summaries. `info.metadata` has the rows that were
    read, and those that were dropped, by reason.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [TldrConfig(name="comparisons")]  # noqa: RUF012 (TFDS reads a list)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=builders.features("prompt", "chosen", "rejected"),
            description="Human preferences between two summaries of a Reddit post.",
            homepage="https://github.com/openai/summarize-from-feedback",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, builders.Texts]]]:
        if self.builder_config.folder is None:
            folder = Path(dl_manager.download_dir) / "tldr"
            found = {batch: fetch(URL.format(file=batch), folder / f"{batch}.json") for batch in BATCHES}
        else:
            found = files(self.builder_config.folder)
        loaded = records(found)
        self.info.metadata.update(rows=loaded.rows, dropped=loaded.dropped, origin=loaded.origin)
        return {split: builders.texts(kept, _request) for split, kept in loaded.records.items() if kept}

    def _generate_examples(
        self, examples: Iterator[tuple[int, builders.Texts]]
    ) -> Iterator[tuple[int, builders.Texts]]:
        return examples


def load(*, path: Path | None, data_dir: Path, format: Format = "chat") -> Loaded:
    """The comparisons, prepared in `data_dir` on first use. The demonstration is the chosen summary.

    Where the format is plain, a summary begins with the space that stands between `TL;DR:` and its first word.

    Errors: InputError for a path without comparisons, a row that is not of the published schema (with its file and
    line), or a download that fails.
    """
    config: TldrConfig | str = "comparisons"
    if path is not None:
        config = TldrConfig(name=f"comparisons_{fingerprint(files(path))}", folder=path)
    loaded = builders.loaded(builders.prepared(Tldr, config, data_dir), _conversation)
    if format == "chat":
        return loaded
    return replace(loaded, records={split: [*map(_spaced, found)] for split, found in loaded.records.items()})


def files(path: Path) -> dict[str, Path]:
    """By name, the files of a local copy: a folder's `batch*` files, or its `comparisons/`'s, or the path itself.

    Errors: InputError where there is none; it says what was looked for.
    """
    if path.is_file():
        return {"batch": path}
    for folder in (path, path / "comparisons"):
        found = [file for end in (".json", *jsonl.SUFFIXES) for file in folder.glob(f"batch*{end}") if file.is_file()]
        if found:
            return {file.name: file for file in sorted(found)}
    raise InputError(
        f"There are no comparisons of summaries at {path}: no batch*.json (or .jsonl, .jsonl.gz) there, nor in its "
        "folder comparisons.",
        field="data.path",
        value=str(path),
        remedy=f"Give `data.path` a folder that has them, such as {BATCHES[0]}.json, or leave it out to download.",
    )


def records(files: Mapping[str, Path]) -> Loaded:
    """The comparisons of all files, defective ones dropped and counted.

    Errors: InputError with the file and line where a row is not of the published schema.
    """
    dropped = Counter[str]()
    published: dict[str, list[Record]] = {split: [] for split in SPLITS.values()}
    for path in files.values():
        for place, row in jsonl.rows(path):
            split, pair = read_row(row, place)
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                published[split].append(pair)
    return arranged(published, dropped)


def read_row(row: rows.Row, place: str) -> tuple[str, Record | str]:
    """The split of a comparison, and its pair or why it is defective.

    Errors: InputError with the place where the row is not of the published schema.
    """
    info, summaries, choice = (row.get(name) for name in ("info", "summaries", "choice"))
    published = rows.text_of(row, "split", place)
    if published not in SPLITS:
        raise InputError(
            f"{place}: the split is {rows.shown(published)}",
            field=place,
            value=published,
            remedy=f"it is one of {', '.join(SPLITS)}.",
        )
    if not isinstance(info, dict):
        problem = f"{place}: 'info' is {rows.shown(info)}"
        raise InputError(problem, field=place, value=info, remedy="it must be an object with the post.")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(it, dict) for it in summaries)):
        problem = f"{place}: 'summaries' is {rows.shown(summaries)}"
        remedy = "it must be a list of two objects with a 'text' each."
        raise InputError(problem, field=place, value=summaries, remedy=remedy)
    if type(choice) is not int or choice not in (0, 1):
        raise InputError(
            f"{place}: 'choice' is {rows.shown(choice)}",
            field=place,
            value=choice,
            remedy="it is 0 or 1, the index of the better summary.",
        )
    split = SPLITS[published]
    if "article" in info and "post" not in info:
        return split, "not a Reddit post"
    subreddit, title, post = (rows.text_of(info, name, f"{place}, 'info'") for name in ("subreddit", "title", "post"))
    if not post.strip():
        return split, "empty post"
    texts = [rows.text_of(summary, "text", f"{place}, 'summaries'").strip() for summary in summaries]
    pair = Record(_conversation(request(subreddit, title, post)), chosen=texts[choice], rejected=texts[1 - choice])
    return split, defect(pair) or pair


def request(subreddit: str, title: str, post: str) -> str:
    """A post as the paper's models read it."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _spaced(record: Record) -> Record:
    return replace(record, response=f" {record.response}", chosen=f" {record.chosen}", rejected=f" {record.rejected}")


def _conversation(request: str) -> Conversation:
    return (Turn("user", request),)


def _request(conversation: Conversation) -> str:
    return conversation[0].content
