"""Tokenizers that come with a model, in a Hugging Face directory.

The pieces are learnt from tokenizer.json (byte-level BPE and the like) or from tokenizer.model (SentencePiece), the
special tokens from the .json files beside it, and the form of a conversation from a chat template; a directory without
one holds a base model, which reads hh-rlhf's transcripts.

Plain text never becomes a control token, whoever wrote it: both kinds of `_Vocabulary` encode `Pieces`, in which
control tokens stand apart.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ctrl_jax.data import downloads
from ctrl_jax.data.chat_templates import ChatTemplate, Pieces
from ctrl_jax.data.conversations import Conversation, transcript
from ctrl_jax.errors import InputError

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load(folder: Path, *, embedding_rows: int) -> "PretrainedTokenizer":
    """The tokenizer of a model's directory; `embedding_rows` are the ids that the model knows.

    tokenizer.json goes before tokenizer.model. Any token that generation_config.json (or else config.json), the
    tokenizer's configuration or the chat template ends a reply with ends a response; a chat model's `encode_response`
    writes the template's, a base model's the tokenizer's `eos_token`. Without a pad token, rows are filled with that.

    Errors: InputError naming the file, where one is missing, corrupt, or at odds with the others or the embedding.
    """
    settings = _json(folder / "tokenizer_config.json")
    special = _special(folder, settings, embedding_rows)
    vocabulary = _vocabulary(folder, settings, special)
    if vocabulary.size > embedding_rows:
        raise InputError(
            f"The tokenizer of {folder} has a vocabulary of {vocabulary.size}, but the model's embedding has "
            f"{embedding_rows} rows; take the tokenizer that was published with these weights."
        )
    texts = {i: text for text, i in vocabulary.controls.items()}
    by_id = {role: texts[ids[0]] for role, ids in special.ids.items() if ids and ids[0] in texts}
    variables = {**by_id, **special.roles}
    template = None
    if found := _template(folder, settings):
        source, file = found
        template = ChatTemplate(source, file=file, controls=vocabulary.controls, variables=variables)
    ends = (template and template.end_of_turn, special.roles.get("eos_token"))
    eos_ids = [*(vocabulary.controls[text] for text in ends if text in vocabulary.controls), *special.ids["eos_token"]]
    if not eos_ids:
        raise InputError(
            f"Nothing in {folder} names a token that ends a reply: eos_token is {special.roles.get('eos_token')!r}, "
            "which the tokenizer does not have. Give eos_token in tokenizer_config.json, or eos_token_id in "
            "generation_config.json."
        )
    named_pad = vocabulary.controls.get(special.roles.get("pad_token", ""))
    return PretrainedTokenizer(
        vocabulary,
        template,
        bos_ids=_bos_ids(settings, vocabulary, variables.get("bos_token")),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=named_pad if named_pad is not None else [*special.ids["pad_token"], *eos_ids][0],
        fingerprint=_fingerprint(folder, special),
    )


def _fingerprint(folder: Path, special: "_Special") -> str:
    # Of config.json, which is mostly the model's, the special tokens' ids alone.
    beside = {name: path for name, path in files(folder).items() if name != "config.json"}
    ids = json.dumps(special.ids, sort_keys=True)
    return hashlib.blake2s(f"{downloads.fingerprint(beside)} {ids}".encode(), digest_size=8).hexdigest()


def files(folder: Path) -> dict[str, Path]:
    """By name, the files of a model's directory that `load` reads, as far as they are there."""
    # config.json has ends of a reply too; of both vocabularies the first is used.
    names = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    ]
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    found = [*(folder / name for name in names), *templates]
    return {str(path.relative_to(folder)): path for path in found if path.is_file()}


class PretrainedTokenizer:
    """A vocabulary and a form of conversation."""

    def __init__(
        self, vocabulary: "_Vocabulary", template: ChatTemplate | None, *, bos_ids: Sequence[int],
        eos_ids: tuple[int, ...], pad_id: int, fingerprint: str,
    ):  # fmt: skip
        self.vocabulary_size = vocabulary.size
        self.pad_id = pad_id
        self.eos_ids = eos_ids
        self.fingerprint = fingerprint
        self._vocabulary = vocabulary
        self._template = template
        self._bos_ids = bos_ids
        self._lead = template.lead if template else " "
        # What a reply may follow, the likelier first, with its ids. Where a token would span the border, as after a
        # prompt that ends in a space, the second serves: a new line joins no word.
        befores = (template.before_reply if template else ["Assistant:"], ["\n"])
        self._befores = [(before, vocabulary.encode(before)) for before in befores]
        self.after_response = vocabulary.encode([template.after_turn]) if template and template.after_turn else []
        """What a template writes after a reply has ended: a classifier's score is read there."""

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """A chat model's prompt is what its template writes, BOS included or not; a base model's is BOS, if its
        tokenizer adds one, and the transcript. Errors: InputError where the template fails."""
        if self._template:
            return self._vocabulary.encode(self._template.pieces(conversation))
        return [*self._bos_ids, *self._vocabulary.encode([transcript(conversation)])]

    def encode_response(self, text: str) -> list[int]:
        return [*self._continuation(f"{self._lead}{text.strip()}".rstrip()), self.eos_ids[0]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode([int(i) for i in ids if i not in self.eos_ids]).removeprefix(" ")

    def _continuation(self, text: str) -> list[int]:
        """A text's tokens as they are in the middle of one: alone, it might get a space that opens a text."""
        for before, ids in self._befores:
            together = self._vocabulary.encode([*before[:-1], before[-1] + text])
            if together[: len(ids)] == ids:
                return together[len(ids) :]
        return self._vocabulary.encode([text])


@dataclass(frozen=True)
class _Special:
    """What the .json files beside a tokenizer say of its special tokens."""

    roles: Mapping[str, str]
    """Texts by role, such as bos_token."""
    ids: Mapping[str, Sequence[int]]
    """Ids by role."""
    others: Sequence[str]

    def has(self, text: str, i: int) -> bool:
        return text in self.roles.values() or text in self.others or any(i in ids for ids in self.ids.values())


def _special(folder: Path, settings: Mapping[str, Any], embedding_rows: int) -> _Special:
    model = {**_known(_json(folder / "config.json")), **_known(_json(folder / "generation_config.json"))}
    names = {**_known(_json(folder / "special_tokens_map.json")), **_known(settings)}
    return _Special(
        roles={role: text for role in _ROLES if (text := _text(names.get(role)))},
        ids={role: _ids(folder, role, model.get(f"{role}_id"), embedding_rows) for role in _ROLES[:4]},
        others=[
            text
            for key in ("additional_special_tokens", "extra_special_tokens")
            for entry in _listed(names.get(key))
            if (text := _text(entry))
        ],
    )


class _Vocabulary(Protocol):
    contents: bytes
    """Of the tokenizer's file."""
    size: int
    """One more than the greatest id."""
    controls: dict[str, int]
    """The control tokens' ids, by their texts."""
    bos_ids: list[int]
    """What the file says that a text begins with."""

    def encode(self, pieces: Pieces) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def _vocabulary(folder: Path, settings: Mapping[str, Any], special: _Special) -> _Vocabulary:
    added = _added(folder, settings)
    if (path := folder / "tokenizer.json").is_file():
        return _JsonVocabulary(path, added, special)
    if (path := folder / "tokenizer.model").is_file():
        return _SentencePieceVocabulary(path, added, special, legacy=settings.get("legacy") is not False)
    raise InputError(
        f"{folder} has neither tokenizer.json nor tokenizer.model; copy one from where the model was published. Other "
        "forms (vocab.json with merges.txt) become a tokenizer.json by transformers' save_pretrained."
    )


class _JsonVocabulary:
    """tokenizer.json, read by the tokenizers library.

    Its control tokens are renamed by a secret, so that no text matches one; `encode` writes the secret names where
    `Pieces` have control tokens. All else is the library's ordinary encoding of one text.
    """

    def __init__(self, path: Path, added: Mapping[int, Mapping[str, Any]], special: _Special):
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"{path} is read by the tokenizers library, which is not installed; run `make setup EXTRA=hf`."
            ) from error
        self.contents = path.read_bytes()
        data = _parsed(path, self.contents)
        try:
            self.controls, names = _renamed(data, added, special)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # The library raises plain Exception, and a damaged file lacks any of the fields.
            raise InputError(
                f"{path} is not a tokenizer that the tokenizers library {tokenizers.__version__} reads "
                f"({type(error).__name__}: {error}). Copy it again from where the model was published."
            ) from error
        self._names = names
        vocabulary = self._tokenizer.get_vocab()
        for text, i in self.controls.items():
            if (found := vocabulary.get(names[text])) != i:
                raise InputError(
                    f"The special token {text!r} has the id {i} by {path} or the tokenizer_config.json beside it, but "
                    f"would get {found}; the files do not belong together. Copy both from one place."
                )
        self.size = 1 + max(vocabulary.values())
        plain = self._tokenizer.encode("x", add_special_tokens=False).ids
        whole = self._tokenizer.encode("x").ids
        starts = (k for k in range(len(whole)) if whole[k : k + len(plain)] == plain)
        self.bos_ids: list[int] = whole[: next(starts, 0)]

    def encode(self, pieces: Pieces) -> list[int]:
        text = "".join(self._names[piece] if i % 2 else piece for i, piece in enumerate(pieces))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _renamed(
    data: dict[str, Any], added: Mapping[int, Mapping[str, Any]], special: _Special
) -> tuple[dict[str, int], dict[str, str]]:
    """Gives the control tokens of a tokenizer.json, changed in place, secret names: (ids, names) by their texts."""
    model = data["model"]
    pieces = model["vocab"]
    # A list has the unigram model's pairs of piece and score.
    vocabulary = pieces if isinstance(pieces, dict) else {piece: i for i, (piece, _) in enumerate(pieces)}
    entries = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    for i, entry in added.items():
        entries[i] = {**entries.get(i, _PLAIN), **entry, "id": i}
    present = {entry["content"] for entry in entries.values()}
    for text in special.roles.values():
        if text in vocabulary and text not in present:
            entries[vocabulary[text]] = {**_PLAIN, "id": vocabulary[text], "content": text}
    secret = secrets.token_hex(16)
    controls: dict[str, int] = {}
    names: dict[str, str] = {}
    for i, entry in entries.items():
        text = entry["content"]
        if entry["special"] or special.has(text, i):
            controls[text], names[text] = i, f"<{secret}{i}>"
            # A control token is itself wherever it stands, and before the text is normalized.
            entry |= {"content": names[text], "special": True, "normalized": False, "single_word": False}
    data["added_tokens"] = [entries[i] for i in sorted(entries)]
    data["truncation"] = data["padding"] = None
    if isinstance(pieces, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in pieces.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if merges := model.get("merges"):
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    return controls, names


_PLAIN = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


class _SentencePieceVocabulary:
    """tokenizer.model, read by SentencePiece, with the tokens that the .json files add to it.

    Pieces that are control tokens by those files (Gemma's <start_of_turn>) become control symbols of the model, which
    it finds in no text and writes in none.
    """

    def __init__(self, path: Path, added: Mapping[int, Mapping[str, Any]], special: _Special, *, legacy: bool):
        """`legacy`: a text after a control token gets the space that opens a text, too."""
        self.contents = path.read_bytes()
        # Its classes are made when the module is loaded.
        protos: Any = sentencepiece_model_pb2
        kinds = protos.ModelProto.SentencePiece
        proto = protos.ModelProto()
        try:
            proto.ParseFromString(self.contents)
            if not (proto.pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
                raise ValueError("it ends too early")
            pieces = len(proto.pieces)
            self.controls: dict[str, int] = {}
            for i, piece in enumerate(proto.pieces):
                if piece.type == kinds.USER_DEFINED:
                    named = special.has(piece.piece, i) or (i in added and added[i]["special"])
                    piece.type = kinds.CONTROL if named else piece.type
                if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
                    self.controls[piece.piece] = i
            prefix = proto.normalizer_spec.add_dummy_prefix
            processors = {flag: _processor(proto, add_dummy_prefix=flag) for flag in {False, prefix}}
            self._opening = processors[prefix]
            self._after_control = processors[prefix and legacy]
            self._middle = processors[False]
        except Exception as error:  # protobuf's DecodeError is no ValueError, SentencePiece raises RuntimeError.
            raise InputError(
                f"{path} is not a SentencePiece model ({error}). Copy it again from where the model was published."
            ) from error
        self._unknown = proto.trainer_spec.unk_id
        beyond = {i: entry for i, entry in added.items() if i >= pieces}
        self.controls |= {
            entry["content"]: i for i, entry in beyond.items() if entry["special"] or special.has(entry["content"], i)
        }
        self._added = {entry["content"]: i for i, entry in beyond.items() if entry["content"] not in self.controls}
        self._texts = {i: text for text, i in self._added.items()}
        words = "|".join(re.escape(text) for text in sorted(self._added, key=len, reverse=True))
        self._word = re.compile(f"({words or '(?!)'})")
        self._pieces = pieces
        self.size = max(pieces, *(i + 1 for i in beyond), 0)
        bos = self._middle.bos_id()
        self.bos_ids = [bos] if bos >= 0 else []

    def encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.controls[piece])
            else:
                for j, text in enumerate(self._word.split(piece)):
                    if j % 2:
                        ids.append(self._added[text])
                    elif text:
                        # A space after an ordinary token would be a loss: it is in the middle of a text.
                        ids += (self._middle if j else self._after_control if i else self._opening).encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        texts: list[str] = []
        run: list[int] = []
        for i in chain(ids, [-1]):
            if 0 <= i < self._pieces:
                # An unknown piece has no text; SentencePiece would write ⁇.
                run += [i] if i != self._unknown else []
            else:
                texts += [self._middle.decode(run), self._texts.get(i, "")]
                run = []
        return "".join(texts)


def _processor(proto: Any, *, add_dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def _bos_ids(settings: Mapping[str, Any], vocabulary: _Vocabulary, bos: str | None) -> list[int]:
    """What a base model's text begins with: by tokenizer_config.json, or else by the tokenizer's own file."""
    wanted = settings.get("add_bos_token")
    if wanted is None:
        return vocabulary.bos_ids
    return [vocabulary.controls[bos]] if wanted and bos and bos in vocabulary.controls else []


def _template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, Path] | None:
    """(source, file) of the chat template; a file of its own goes before tokenizer_config.json."""
    if (path := folder / "chat_template.jinja").is_file():
        return _utf8(path, path.read_bytes()), path
    path = folder / "chat_template.json"
    found = _json(path).get("chat_template")
    if found is None:
        path = folder / "tokenizer_config.json"
        found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") if len(named) != 1 else next(iter(named.values()))
        if found is None:
            raise InputError(
                f"{path} has the chat templates {', '.join(map(str, named)) or '(none)'}, and none is named default; "
                "write the one to use into chat_template.jinja beside it."
            )
    if found is None:
        return None
    if not isinstance(found, str):
        raise InputError(f"chat_template in {path} is {found!r:.80}; it must be a text, or a list of named templates.")
    return found, path


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens by id that tokenizer_config.json, or the older added_tokens.json, has beside the tokenizer's file."""
    path = folder / "added_tokens.json"
    entries = {i: {"content": text} for text, i in _json(path).items()}
    try:
        path = folder / "tokenizer_config.json"
        for i, entry in (settings.get("added_tokens_decoder") or {}).items():
            known = {key: entry[key] for key in ("content", *_PLAIN) if key in entry}
            entries[int(i)] = {**entries.get(int(i), {}), **known}
        added = {i: {"special": False, **entry, "content": str(entry["content"])} for i, entry in entries.items()}
        if any(not isinstance(i, int) or i < 0 for i in added):
            raise ValueError("an id is no whole number from 0")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The added tokens of {path} are malformed ({type(error).__name__}: {error}); an entry is "
            '"id": {"content": text, "special": true or false}. Copy the file again.'
        ) from error
    return added


def _ids(folder: Path, role: str, value: Any, embedding_rows: int) -> list[int]:
    """Ids of a role in config.json and generation_config.json: a number, a list, or nothing (-1 is one)."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i >= embedding_rows:
            raise InputError(
                f"{role}_id is {value!r} in {folder}/generation_config.json or config.json; the model's embedding has "
                f"{embedding_rows} rows, so ids are whole numbers from 0 to {embedding_rows - 1}."
            )
    return [i for i in ids if i >= 0]


def _text(token: Any) -> str | None:
    """A special token is written as a text, or as an AddedToken's fields."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no file."""
    return _parsed(path, path.read_bytes()) if path.is_file() else {}


def _parsed(path: Path, contents: bytes) -> dict[str, Any]:
    text = _utf8(path, contents)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}. Mend it, or copy it again.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {data!r:.80}; a JSON object is expected. Copy it again.")
    return data


def _utf8(path: Path, contents: bytes) -> str:
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} is 0x{contents[error.start]:02x}. Save it as UTF-8, or copy it "
            "again."
        ) from error
