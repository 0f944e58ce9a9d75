"""What best-of-N jailbreaking does to a prompt, so that each attempt asks anew (Hughes et al. 2024, 2412.03556)."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ctrl_jax.data.conversations import Conversation, transcript

SIGMA = 0.4
"""The paper's strength."""
_FIRST, _LAST = 32, 126
"""Printable ASCII."""


def attempts(conversation: Conversation, count: int, *, sigma: float, seed: int) -> list[Conversation]:
    """The conversation `count` times, its last turn augmented each time by draws of (seed, conversation, attempt)."""
    *before, last = conversation
    name = int.from_bytes(hashlib.blake2s(transcript(conversation).encode(), digest_size=8).digest(), "big")
    found = []
    for attempt in range(count):
        random = np.random.default_rng([seed, name, attempt])
        found.append((*before, replace(last, content=augmented(last.content, sigma=sigma, random=random))))
    return found


def augmented(text: str, *, sigma: float, random: np.random.Generator) -> str:
    """The text with its words scrambled, its letters' case flipped, and characters shifted.

    Each word of more than three characters has its inner ones in another order with probability √σ; then each letter is
    of the other case with probability √σ; then each printable ASCII character is the one before or behind it with
    probability σ³, where that is printable too. White space between words is not scrambled. σ in [0, 1]; 0 leaves the
    text as it is.
    """
    words = [_scrambled(word, random) if random.random() < sigma**0.5 else word for word in _words(text)]
    flipped = "".join(
        one.swapcase() if one.isalpha() and random.random() < sigma**0.5 else one for one in "".join(words)
    )
    return "".join(_shifted(one, random) if random.random() < sigma**3 else one for one in flipped)


def _words(text: str) -> Sequence[str]:
    """Words and the white space between them, in turn."""
    found: list[str] = []
    for one in text:
        if found and one.isspace() == found[-1].isspace():
            found[-1] += one
        else:
            found.append(one)
    return found


def _scrambled(word: str, random: np.random.Generator) -> str:
    if len(word) <= 3 or word.isspace():
        return word
    inner = [word[1 + int(place)] for place in random.permutation(len(word) - 2)]
    return word[0] + "".join(inner) + word[-1]


def _shifted(character: str, random: np.random.Generator) -> str:
    code = ord(character) + int(random.choice((-1, 1)))
    return chr(code) if _FIRST <= ord(character) <= _LAST and _FIRST <= code <= _LAST else character
