"""Splits with disjoint prompts, and the account of what was left out on the way."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrl_jax.data.conversations import Record, transcript

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Loaded:
    """What a source of data gave."""

    records: dict[str, list[Record]]
    """By split: train, validation, test. No prompt is in two of them; a split may be empty."""
    rows: int
    """Rows that were read, the dropped ones among them."""
    dropped: dict[str, int]
    """Rows that were left out, by reason."""
    origin: str = ""
    """Where the splits come from, in words."""


def defect(record: Record) -> str | None:
    """Why a record cannot be learned from, or None."""
    replies = [text for text in (record.response, record.chosen, record.rejected) if text is not None]
    if not all(text.strip() for text in replies):
        return "empty response"
    if record.chosen is not None and record.chosen == record.rejected:
        return "chosen equals rejected"
    return None


def collected(
    rows: Mapping[str, Iterable[tuple[str, dict[str, Any]]]], read: Callable[[dict[str, Any], str], Record | str],
    origin: str = "",
) -> Loaded:  # fmt: skip
    """The records of each split's (place, row); `read` makes one of a row and its place, or says why it is dropped."""
    dropped = Counter[str]()
    published: dict[str, list[Record]] = {}
    for split, placed in rows.items():
        published[split] = []
        for place, row in placed:
            record = read(row, place)
            if isinstance(record, str):
                dropped[record] += 1
            else:
                published[split].append(record)
    return arranged(published, dropped, origin)


def arranged(published: Mapping[str, Sequence[Record]], dropped: Mapping[str, int], origin: str = "") -> Loaded:
    """Train, validation and test from what a source publishes of them; `dropped` is what it left out itself, `origin`
    names its files.

    One published split alone (or none called train) is cut into 80, 10 and 10 %, by a hash of the conversation's
    opening user turn, so that what begins alike stays together. Beside train and test, validation is such a 5 % of
    train; beside train and validation, test is half of the latter. A record whose prompt is in test leaves the other
    two splits, and one whose prompt is in validation leaves train: they are counted.
    """
    found = {name: list(published.get(name, ())) for name in SPLITS}
    cut = ""
    if not found["train"] or not (found["validation"] or found["test"]):
        cut = "cut into 80, 10 and 10 % by a hash of each conversation's opening"
        everything = [record for name in SPLITS for record in found[name]]
        found["train"], held_out = _cut(everything, 0.8)
        found["validation"], found["test"] = _cut(held_out, 0.9)
    elif not found["validation"]:
        cut = "of train 5 % cut off for validation, by a hash of each conversation's opening"
        found["train"], found["validation"] = _cut(found["train"], 0.95)
    elif not found["test"]:
        cut = "validation cut in half for test, by a hash of each conversation's opening"
        found["validation"], found["test"] = _cut(found["validation"], 0.5)

    counts, seen = Counter(dropped), set[str]()
    for name in reversed(SPLITS):
        texts = [transcript(record.prompt) for record in found[name]]
        kept = [record for record, text in zip(found[name], texts, strict=True) if text not in seen]
        counts["prompt in another split"] += len(texts) - len(kept)
        found[name] = kept
        seen.update(texts)
    rows = sum(map(len, found.values())) + counts.total()
    dropped = {reason: count for reason, count in counts.items() if count}
    return Loaded(found, rows, dropped, ": ".join(filter(None, (origin, cut))))


def _cut(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """The records whose opening's hash, uniform in [0, 1), is below `share`; and the others."""
    below: list[Record] = []
    above: list[Record] = []
    for record in records:
        (below if _hash(record) < share else above).append(record)
    return below, above


def _hash(record: Record) -> float:
    return uniform(next((turn.content for turn in record.prompt if turn.role == "user"), ""))


def uniform(text: str) -> float:
    """A number in [0, 1) that a text alone decides: of many texts they are uniform."""
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=8).digest(), "little") / 2**64
