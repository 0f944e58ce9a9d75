"""Preference pairs that are put in order by a wrong preference, for a reward model that is wrong in a known way.

A policy that climbs such a reward gains by the reward model, and at some KL begins to lose by the gold reward: reward
hacking, or overoptimisation (Gao et al. 2022, arXiv 2210.10760).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ctrl_jax.data.conversations import Record
from ctrl_jax.errors import InputError

LENGTH = "length"
SPLITS = ("train", "validation")
"""What is learned from, and what the learning is stopped by. The test pairs judge the reward model, and stay right."""


class Corrupted(NamedTuple):
    records: dict[str, list[Record]]
    ordered: int
    """Pairs that the wrong preference put in order."""
    turned: int
    """Of these, those whose order is another now."""


def corrupt(records: Mapping[str, Sequence[Record]], *, share: float, prefers: str, seed: int) -> Corrupted:
    """Puts a share of the pairs of the splits SPLITS in order by a preference that has nothing to do with their worth.

    Which pairs follows from the seed, and those of a smaller share are among those of a larger. Pairs that the
    preference cannot tell apart stay as they are.

    Args:
      records: by split.
      share: of the records, in [0, 1].
      prefers: `length`, the longer reply in characters, or a word, the reply that has it, in lower or upper case.
      seed: of the choice.

    Raises:
      InputError: if there are no pairs, or the preference tells none apart.
    """
    found: dict[str, list[Record]] = {split: list(rows) for split, rows in records.items()}
    pairs = ordered = turned = apart = 0
    for index, split in enumerate(SPLITS):
        draws = np.random.default_rng((seed, index)).random(len(found[split]))
        for i, record in enumerate(found[split]):
            if record.chosen is None or record.rejected is None:
                continue
            pairs += 1
            gain = _worth(record.chosen, prefers) - _worth(record.rejected, prefers)
            apart += gain != 0
            if gain == 0 or draws[i] >= share:
                continue
            ordered += 1
            if gain < 0:
                turned += 1
                found[split][i] = replace(record, chosen=record.rejected, rejected=record.chosen)
    if not pairs:
        raise InputError(
            f"`data.corrupted` is {share:g}, and the data has no preference pairs",
            field="data.corrupted",
            value=share,
            remedy="leave it out, or give pairs: rows with `chosen` and `rejected`.",
        )
    if not apart:
        raise InputError(
            f"No pair has one reply that `data.corrupted_prefers` = {prefers!r} prefers",
            field="data.corrupted_prefers",
            value=prefers,
            remedy="give `length`, or a word that one of the replies of some pairs has.",
        )
    return Corrupted(found, ordered, turned)


def _worth(reply: str, prefers: str) -> int:
    if prefers == LENGTH:
        return len(reply)
    # A word ends where no letter follows; a mark such as "!" may stand beside one.
    ends = [r"\b" if re.match(r"\w", prefers[at]) else "" for at in (0, -1)]
    return int(re.search(ends[0] + re.escape(prefers) + ends[1], reply, re.IGNORECASE) is not None)
