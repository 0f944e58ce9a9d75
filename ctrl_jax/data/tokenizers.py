"""What the project asks of a tokenizer, and a SentencePiece tokenizer trained on the dialogues, lossless for any text.

Tokenizers that come with a model are in `pretrained_tokenizers`.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from ctrl_jax.data.conversations import ASSISTANT, HUMAN, Conversation
from ctrl_jax.data.forms import FORMS, PLAIN, Format
from ctrl_jax.errors import InputError

FILENAME = "tokenizer.model"

# A character without a piece is written as its code point in hexadecimal digits between these two. It costs 18 pieces,
# where SentencePiece's own byte fallback costs 256: half of a small vocabulary, and of the softmax over it.
_ESCAPE, _END = "⟦", "⟧"
_DIGITS = "0123456789abcdef"
_SPACE = "▁"
"""How SentencePiece writes a space; the character itself is escaped."""

_PART = 2048
"""Characters of a text that are looked at together."""


class VocabularyTooLarge(InputError):
    """Texts that hold fewer pieces than are asked for."""

    def __init__(self, asked: int, bound: int):
        super().__init__(
            f"A vocabulary of {asked} pieces is more than these texts have",
            field="data.vocabulary_size",
            value=asked,
            remedy=f"set data.vocabulary_size to at most {bound}, or train the tokenizer on more varied text.",
        )
        self.bound = bound
        """The most pieces that they hold."""


class Tokenizer(Protocol):
    """Conversations and replies to token ids, and a reply's ids to its text."""

    @property
    def vocabulary_size(self) -> int:
        """All ids are below it."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows up. It may be one of `eos_ids`: lengths say which tokens are real."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Any of them ends a response; `encode_response` writes the first."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal ids for every text."""
        ...

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """The conversation as the model reads it, with what it expects to stand first, up to where the reply begins."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """A reply's tokens as they follow a prompt, and the token that ends it. White space around a reply in a
        conversation is left out."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a reply that may go on, in a conversation without the space before its first word. Special tokens
        have no text."""
        ...

    def decode_response(self, ids: Iterable[int]) -> str:
        """The text of a whole reply: the reverse of `encode_response`."""
        ...


class TrainedTokenizer:
    """Text to token ids and back, without loss for every text that UTF-8 can hold.

    Conversations become transcripts; where the format is plain, a prompt is the text of its one turn.

    The two markers of hh-rlhf's turns are one token each. A space belongs to the word that it precedes, so that the
    first word of a reply has one.
    """

    def __init__(self, model: bytes, format: Format = "chat"):
        """From the bytes of a SentencePiece model. Errors: InputError where they are not one of `train`'s."""
        self.model = model
        self._form = FORMS[format]
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
            pieces = {self._pieces.id_to_piece(i) for i in range(self.vocabulary_size)}
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InputError(
                "The tokenizer's bytes are not a SentencePiece model",
                field="model",
                value=model,
                remedy="train it again.",
            ) from error
        characters = {" "} | {piece for piece in pieces if len(piece) == 1} - {_ESCAPE, _END, _SPACE}
        self._marker_or_unknown = re.compile(f"{HUMAN}|{ASSISTANT}|[^{re.escape(''.join(sorted(characters)))}]")
        if not pieces.issuperset((*_DIGITS, _ESCAPE, _END, HUMAN, ASSISTANT)):
            raise InputError(
                "The SentencePiece model lacks the markers of a conversation, or the pieces that spell other "
                "characters",
                field="model",
                value=FILENAME,
                remedy="train the tokenizer again.",
            )

    @property
    def vocabulary_size(self) -> int:
        return self._pieces.vocab_size()

    @property
    def pad_id(self) -> int:
        return self._pieces.pad_id()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self._pieces.eos_id(),)

    @property
    def fingerprint(self) -> str:
        """Names the model and its format: equal for equal bytes and formats alone."""
        of_model = hashlib.blake2s(self.model, digest_size=8).hexdigest()
        return f"{of_model}-plain" if self._form is PLAIN else of_model

    def encode(self, text: str) -> list[int]:
        """Token ids, without an end of text."""
        return self._pieces.encode(self._marker_or_unknown.sub(_escaped, text))

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """The tokens of the transcript, or of the plain text, up to where the reply begins."""
        return self.encode(self._form.prompt(conversation))

    def encode_response(self, text: str) -> list[int]:
        """The tokens of the text, in a transcript behind a space, and EOS; of an empty text EOS alone."""
        return [*self.encode(self._form.reply(text)), *self.eos_ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids, in a transcript without the one space that may lead it. PAD and EOS have none."""
        text = self._pieces.decode([int(i) for i in ids]).removeprefix(self._form.lead)
        return re.sub(f"{_ESCAPE}([0-9a-f]{{1,6}}){_END}", _unescaped, text)

    def decode_response(self, ids: Iterable[int]) -> str:
        """The text of a whole reply."""
        return self._form.trimmed(self.decode(ids))

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model` into a folder."""
        (folder / FILENAME).write_bytes(self.model)


def load(folder: Path, format: Format = "chat") -> TrainedTokenizer:
    """The tokenizer saved in a folder. Errors: InputError where there is none."""
    path = folder / FILENAME
    if not path.is_file():
        raise InputError(
            f"There is no tokenizer at {path}",
            field=str(path),
            value=None,
            remedy="train it again, or name the folder that has one.",
        )
    return TrainedTokenizer(path.read_bytes(), format)


def train(texts: Sequence[str], *, vocabulary_size: int, format: Format = "chat") -> TrainedTokenizer:
    """A unigram model (Kudo 2018, arXiv 1804.10959) of exactly `vocabulary_size` pieces; equal texts give equal bytes.

    Errors: InputError where the texts have no word, or too few or too many pieces for that size; it names the bound.
    """
    texts = [part for text in texts for part in _parts(text.replace(_ESCAPE, "").replace(_END, ""))]
    words = dict.fromkeys(word for text in texts for word in re.findall(r"[^\W_]+", text))
    if not words:
        raise InputError(
            f"The {len(texts)} texts to train the tokenizer on have no words",
            field="texts",
            value=len(texts),
            remedy="give it dialogues.",
        )
    # Only strings that occur in two different surroundings are candidates for pieces, and each distinct word is looked
    # at once: without these lines the commonest words would be cut in two.
    surroundings = (f" {word}{mark}" for word in words if len(word) < _PART for mark in ("", ".", ","))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, *surroundings]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary_size,
            hard_vocab_limit=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # A word and the mark after it may be one piece: replies get a fifth shorter.
            split_by_unicode_script=False,
            # Of the characters that occur, all but 1 in 100,000 get a piece; the rest are spelled.
            character_coverage=0.99999,
            required_chars=_DIGITS,
            user_defined_symbols=[HUMAN, ASSISTANT, "\n", _ESCAPE, _END],
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=2**20,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _vocabulary_error(str(error), vocabulary_size) from error
    return TrainedTokenizer(model.getvalue(), format)


def _parts(text: str) -> list[str]:
    """The text in parts: SentencePiece takes time with the square of what repeats itself within one."""
    return [text[start : start + _PART] for start in range(0, len(text), _PART)]


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[0] in (HUMAN, ASSISTANT) else f"{_ESCAPE}{ord(match[0]):x}{_END}"


def _unescaped(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    # A sampled text may name what is no character; a lone surrogate could not be printed.
    valid = code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF
    return chr(code) if valid else match[0]


def _vocabulary_error(error: str, vocabulary_size: int) -> InputError:
    if bound := re.search(r"value <= (\d+)", error):
        return VocabularyTooLarge(vocabulary_size, int(bound[1]))
    if bound := re.search(r"required_chars[^\d]*\d+ vs (\d+)", error):
        return InputError(
            f"A vocabulary of {vocabulary_size} pieces is too small to hold the characters of these texts",
            field="data.vocabulary_size",
            value=vocabulary_size,
            remedy=f"set data.vocabulary_size to more than {bound[1]}.",
        )
    return InputError(
        f"SentencePiece cannot train {vocabulary_size} pieces on these texts: {error.rstrip('.')}",
        field="data.vocabulary_size",
        value=vocabulary_size,
        remedy="set another `data.vocabulary_size`, or give more texts.",
    )
