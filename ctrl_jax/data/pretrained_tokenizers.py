"""Tokenizers that come with a model, in a Hugging Face directory.

The pieces are learnt from tokenizer.json (byte-level BPE and the like) or from tokenizer.model (SentencePiece), the
special tokens from the .json files beside it, and the form of a conversation from a chat template; a directory without
one holds a base model, which reads hh-rlhf's transcripts. Where the format is plain, a prompt is one text, and the
template is not used.

Plain text never becomes a control token, whoever wrote it: both kinds of `_Vocabulary` encode `Pieces`, in which
control tokens stand apart.
"""

import contextlib
import hashlib
import json
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ctrl_jax.data import downloads
from ctrl_jax.data.chat_templates import ChatTemplate, Pieces, any_of
from ctrl_jax.data.conversations import Conversation
from ctrl_jax.data.forms import FORMS, PLAIN, Form, Format
from ctrl_jax.errors import InputError

# Far above what models are published with: 35 MB (Gemma 3), 1.2 MB (its tokenizer_config.json) and 30 kB.
_TOKENIZER_BYTES, _SETTINGS_BYTES, _TEMPLATE_BYTES = 2**28, 2**25, 2**20
_RULE, _RULES, _REWRITTEN = 10_000, 200, 1_000_000
"""The most characters of one text in a tokenizer's rules (GPT-4o's pattern of a word has 400), the most rules, and the
most characters that they make of a text that is a few times as long as themselves."""
_FORM = 2
"""Part of the fingerprint: raised where conversations become other tokens, so that what was made of the former is not
taken for what would be made now."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load(folder: Path, *, embedding_rows: int, format: Format = "chat") -> "PretrainedTokenizer":
    """The tokenizer of a model's directory; `embedding_rows` are the ids that the model knows.

    tokenizer.json goes before tokenizer.model. Any token that generation_config.json (or else config.json), the
    tokenizer's configuration or the chat template ends a reply with ends a response; a chat model's `encode_response`
    writes the template's, a base model's the tokenizer's `eos_token`. Without a pad token, rows are filled with that.

    Errors: InputError naming the file, where one is missing, no regular file, too large, corrupt, or at odds with the
    others or the embedding; and where anything else fails on the way.
    """
    with _explained(f"The tokenizer of {folder} cannot be used"):
        return _load(folder, embedding_rows, format)


def has_template(folder: Path) -> bool:
    """Whether a model's directory has a chat template. Errors: InputError where its files cannot be read."""
    return template_source(folder) is not None


def template_source(folder: Path) -> str | None:
    """The source of its chat template, if it has one. Errors: as `has_template`."""
    found = _template(folder, _json(folder / "tokenizer_config.json"))
    return None if found is None else found[0]


def padding_token(folder: Path, *, embedding_rows: int, ends: Collection[int]) -> tuple[str, int] | None:
    """A control token that can pad rows and is none of the `ends` of a reply: the pad token, or else another that the
    files name; as (text, id). None where there is none.

    Errors: InputError where the files cannot be read.
    """
    settings = _json(folder / "tokenizer_config.json")
    special = _special(folder, settings, embedding_rows)
    controls = _vocabulary(folder, settings, special).controls
    named = (special.roles.get(role) for role in ("pad_token", "unk_token", "bos_token", *_ROLES))
    texts = [text for text in (*named, *controls) if text in controls]
    return next(((text, controls[text]) for text in texts if controls[text] not in ends), None)


def _load(folder: Path, embedding_rows: int, format: Format) -> "PretrainedTokenizer":
    settings = _json(folder / "tokenizer_config.json")
    special = _special(folder, settings, embedding_rows)
    vocabulary = _vocabulary(folder, settings, special)
    if vocabulary.size > embedding_rows:
        raise InputError(
            f"The tokenizer of {folder} has a vocabulary of {vocabulary.size}, but the model's embedding has "
            f"{embedding_rows} rows",
            field=str(folder),
            value=vocabulary.size,
            remedy="take the tokenizer that was published with these weights.",
        )
    texts = {i: text for text, i in vocabulary.controls.items()}
    by_id = {role: texts[ids[0]] for role, ids in special.ids.items() if ids and ids[0] in texts}
    variables = {**by_id, **special.roles}
    template = None
    if format == "chat" and (found := _template(folder, settings)):
        source, file = found
        template = ChatTemplate(source, file=file, controls=vocabulary.controls, variables=variables)
    ends = (template and template.end_of_turn, special.roles.get("eos_token"))
    eos_ids = [*(vocabulary.controls[text] for text in ends if text in vocabulary.controls), *special.ids["eos_token"]]
    if not eos_ids:
        raise InputError(
            f"Nothing in {folder} names a token that ends a reply: eos_token is "
            f"{special.roles.get('eos_token')!r:.80}, which the tokenizer does not have.",
            field=str(folder),
            value=special.roles.get("eos_token"),
            remedy="Give eos_token in tokenizer_config.json, or eos_token_id in generation_config.json.",
        )
    named_pad = vocabulary.controls.get(special.roles.get("pad_token", ""))
    return PretrainedTokenizer(
        vocabulary,
        template,
        FORMS[format],
        bos_ids=_bos_ids(settings, vocabulary, variables.get("bos_token")),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=named_pad if named_pad is not None else [*special.ids["pad_token"], *eos_ids][0],
        fingerprint=_fingerprint(folder, special) + ("" if format == "chat" else f"-{format}"),
    )


def _fingerprint(folder: Path, special: "_Special") -> str:
    # Of config.json, which is mostly the model's, the special tokens' ids alone.
    beside = {name: path for name, path in files(folder).items() if name != "config.json"}
    ids = json.dumps(special.ids, sort_keys=True)
    return hashlib.blake2s(f"{_FORM} {downloads.fingerprint(beside)} {ids}".encode(), digest_size=8).hexdigest()


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
        self, vocabulary: "_Vocabulary", template: ChatTemplate | None, form: Form, *, bos_ids: Sequence[int],
        eos_ids: tuple[int, ...], pad_id: int, fingerprint: str,
    ):  # fmt: skip
        # Some models end replies with an id that only their embedding knows.
        self.vocabulary_size = max(vocabulary.size, *(i + 1 for i in (pad_id, *eos_ids)))
        self.pad_id = pad_id
        self.eos_ids = eos_ids
        self.fingerprint = fingerprint
        self._vocabulary = vocabulary
        self._template = template
        self._form = form
        self._bos_ids = bos_ids
        # The text of what the template writes around a reply, which is no part of the reply's.
        self._lead = "".join(template.lead[::2]) if template else form.lead
        self._trail = template.trail if template else ""
        # What a reply may follow, the likelier first, with its ids. Where a token would span the border, as after a
        # prompt that ends in a space, the second serves: a new line joins no word.
        befores = (template.before_reply if template else ["Assistant:"], ["\n"])
        self._befores = [(before, vocabulary.encode(before)) for before in befores]

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """A chat model's prompt is what its template writes, BOS included or not; a base model's is BOS, if its
        tokenizer adds one, and the transcript or plain text. Errors: InputError where the template fails."""
        if self._template:
            return self._vocabulary.encode(self._template.pieces(conversation))
        return [*self._bos_ids, *self._vocabulary.encode([self._form.prompt(conversation)])]

    def encode_response(self, text: str) -> list[int]:
        """The tokens that follow a prompt's in the finished conversation, up to the one that ends the turn.

        Of a chat model these are all that its template writes there (`ChatTemplate.reply`), so that training, which
        sees them after `encode_prompt`, and sampling, which continues it, agree.
        """
        pieces = self._template.reply(self._form.trimmed(text)) if self._template else [self._form.reply(text)]
        return [*self._continuation(pieces), self.eos_ids[0]]

    def encode_conversation(self, conversation: Conversation, reply: str) -> list[int]:
        """The finished conversation, for a model that judges it and has seen nothing else in its training.

        A chat model's is what its template writes without a generation prompt, token by token what transformers'
        `apply_chat_template` gives, so that BOS stands there once or not at all, as in the template. A base model's is
        the prompt and the response; of plain texts, both as one text, without an end. Errors: as `encode_prompt`.
        """
        if self._template:
            return self._vocabulary.encode(self._template.finished(conversation, reply))
        if self._form is PLAIN:
            whole = self._form.prompt(conversation) + self._form.reply(reply)
            return [*self._bos_ids, *self._vocabulary.encode([whole])]
        return [*self.encode_prompt(conversation), *self.encode_response(reply)]

    def decode(self, ids: Iterable[int]) -> str:
        text = self._vocabulary.decode([int(i) for i in ids if i not in self.eos_ids])
        lead = self._lead if self._lead and text.startswith(self._lead) else self._form.lead
        return text.removeprefix(lead).removesuffix(self._trail)

    def decode_response(self, ids: Iterable[int]) -> str:
        return self._form.trimmed(self.decode(ids))

    def _continuation(self, pieces: Pieces) -> list[int]:
        """The tokens of pieces as they are in the middle of a text: alone, they might get a space that opens one."""
        for before, ids in self._befores:
            together = self._vocabulary.encode([*before[:-1], before[-1] + pieces[0], *pieces[1:]])
            if together[: len(ids)] == ids:
                return together[len(ids) :]
        return self._vocabulary.encode(pieces)


@dataclass(frozen=True)
class _Special:
    """What the .json files beside a tokenizer say of its special tokens."""

    roles: Mapping[str, str]
    """Texts by role, such as bos_token."""
    ids: Mapping[str, Sequence[int]]
    """Ids by role."""
    others: Sequence[str]

    def has(self, text: str, i: int) -> bool:
        return text in self._texts or i in self._all_ids

    @cached_property
    def _texts(self) -> set[str]:
        return {*self.roles.values(), *self.others}

    @cached_property
    def _all_ids(self) -> set[int]:
        return {i for ids in self.ids.values() for i in ids}


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
    if (contents := _contents(path := folder / "tokenizer.json", _TOKENIZER_BYTES)) is not None:
        return _JsonVocabulary(path, contents, added, special)
    if (contents := _contents(path := folder / "tokenizer.model", _TOKENIZER_BYTES)) is not None:
        legacy = settings.get("legacy") is not False
        return _SentencePieceVocabulary(path, contents, added, special, legacy=legacy)
    raise InputError(
        f"{folder} has neither tokenizer.json nor tokenizer.model",
        field=str(folder),
        value=None,
        remedy="copy one from where the model was published. Other forms (vocab.json with merges.txt) become a "
        "tokenizer.json by transformers' save_pretrained.",
    )


class _JsonVocabulary:
    """tokenizer.json, read by the tokenizers library.

    Its control tokens are renamed by a secret, so that no text matches one; `encode` writes the secret names where
    `Pieces` have control tokens. All else is the library's ordinary encoding of one text.
    """

    def __init__(self, path: Path, contents: bytes, added: Mapping[int, Mapping[str, Any]], special: _Special):
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"{path} is read by the tokenizers library, which is not installed",
                field=str(path),
                value=None,
                remedy="run `make setup EXTRA=hf`.",
            ) from error
        self.contents = contents
        data = _parsed(path, contents)
        # A damaged file lacks any of the fields.
        with _explained(f"{path} is not a tokenizer that the tokenizers library {tokenizers.__version__} reads"):
            _check_rules(path, data)
            self.controls, names = _renamed(data, added, special)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        self._path = path
        self._names = names
        vocabulary = self._tokenizer.get_vocab()
        for text, i in self.controls.items():
            if (found := vocabulary.get(names[text])) != i:
                raise InputError(
                    f"The special token {text!r:.80} has the id {i} by {path} or the tokenizer_config.json beside it, "
                    f"but would get {found}; the files do not belong together.",
                    field=str(path),
                    value=found,
                    remedy="Copy both from one place.",
                )
        self.size = 1 + max(vocabulary.values())
        plain = self._tokenizer.encode("x", add_special_tokens=False).ids
        whole = self._tokenizer.encode("x").ids
        starts = (k for k in range(len(whole)) if whole[k : k + len(plain)] == plain)
        self.bos_ids: list[int] = whole[: next(starts, 0)]

    def encode(self, pieces: Pieces) -> list[int]:
        text = "".join(self._names[piece] if i % 2 else piece for i, piece in enumerate(pieces))
        with _encoding(self._path, pieces):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        with _explained(f"A response cannot be decoded by {self._path}"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)


def _check_rules(path: Path, data: Mapping[str, Any]) -> None:
    """Refuses rules by which a short text would take all memory: the library has no limits of its own.

    The rules that rewrite a text are applied one by one to a text that has all that they look for.

    Errors: InputError naming the rule that is long, or makes a long text.
    """
    parts = {part: data.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    model = data.get("model")
    if isinstance(model, dict):
        parts["model"] = {key: value for key, value in model.items() if isinstance(value, str)}
    values = [found for part, value in parts.items() for found in _values(value, part)]
    texts = [(place, value) for place, value in values if isinstance(value, str)]
    for place, text in texts:
        # A table of characters, in base64.
        if len(text) > _RULE and not place.endswith(".precompiled_charsmap"):
            raise _excess(path, f"has a text of {len(text)} characters at {place}", f"rules have at most {_RULE}")
    rules = [(place, value) for place, value in values if isinstance(value, dict) and _rewrites(place, value)]
    if len(rules) > _RULES:
        raise _excess(path, f"has {len(rules)} rules that rewrite a text", f"{_RULES} are the most")
    found = (text for place, text in texts if place.startswith(("normalizer.", "decoder.")) and len(text) <= _RULE)
    written = f"x{''.join(found)}"[: _REWRITTEN // 10]
    for place, rule in rules:
        written = _normalizer(rule).normalize_str(written)
        if len(written) > _REWRITTEN:
            made = f"makes a short text {len(written)} characters long by its rule {place}"
            raise _excess(path, made, f"{_REWRITTEN} are the most")


def _rewrites(place: str, rule: Mapping[str, Any]) -> bool:
    kind = rule.get("type")
    return kind == "Replace" or (place.startswith("normalizer") and isinstance(kind, str) and kind != "Sequence")


def _normalizer(rule: Mapping[str, Any]) -> Any:
    import tokenizers

    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    return tokenizers.Tokenizer.from_str(
        json.dumps({"model": model, "added_tokens": [], "normalizer": rule})
    ).normalizer


def _excess(path: Path, what: str, most: str) -> InputError:
    return InputError(
        f"{path} {what}; {most}.",
        field=str(path),
        value=what,
        remedy="Copy it again from where the model was published.",
    )


def _values(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """All values within a JSON value, and itself, with their places."""
    yield place, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _values(part, f"{place}.{key}")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns any error into an InputError that says `what` and why. Signals and interrupts pass."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{what} ({type(error).__name__}: {str(error)[:500]}).",
            field="tokenizer",
            value=what,
            remedy="Copy it again from where the model was published.",
        ) from error


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
    if model.get("dropout"):
        # It would give a text other tokens each time.
        model["dropout"] = None
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


@contextlib.contextmanager
def _encoding(path: Path, pieces: Pieces) -> Iterator[None]:
    with _explained(f"A text cannot be encoded by {path}"):
        try:
            yield
        except Exception:
            if half := re.search("[\ud800-\udfff]", "".join(pieces)):
                raise InputError(
                    f"A text has U+{ord(half[0]):04X}, half of a character, which {path} cannot encode.",
                    field=str(path),
                    value=half[0],
                    remedy="Remove it from the prompt or response, or from the special tokens or the chat template "
                    "beside that file.",
                ) from None
            raise


class _SentencePieceVocabulary:
    """tokenizer.model, read by SentencePiece, with the tokens that the .json files add to it.

    Pieces that are control tokens by those files (Gemma's <start_of_turn>) become control symbols of the model, which
    it finds in no text and writes in none.
    """

    def __init__(
        self, path: Path, contents: bytes, added: Mapping[int, Mapping[str, Any]], special: _Special, *, legacy: bool
    ):
        """`legacy`: a text after a control token gets the space that opens a text, too."""
        self.contents = contents
        self._path = path
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
                f"{path} is not a SentencePiece model ({error}).",
                field=str(path),
                value=str(error),
                remedy="Copy it again from where the model was published.",
            ) from error
        self._unknown = proto.trainer_spec.unk_id
        beyond = {i: entry for i, entry in added.items() if i >= pieces}
        self.controls |= {
            entry["content"]: i for i, entry in beyond.items() if entry["special"] or special.has(entry["content"], i)
        }
        self._added = {entry["content"]: i for i, entry in beyond.items() if entry["content"] not in self.controls}
        self._texts = {i: text for text, i in self._added.items()}
        self._word = re.compile(f"({any_of(self._added)})")
        self._pieces = pieces
        self.size = max(pieces, *(i + 1 for i in beyond), 0)
        bos = self._middle.bos_id()
        self.bos_ids = [bos] if bos >= 0 else []

    def encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        with _encoding(self._path, pieces):
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
    """(source, file) of the chat template; a file of its own goes before tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if (contents := _contents(path, _TEMPLATE_BYTES)) is not None:
        return _utf8(path, contents), path
    path = folder / "chat_template.json"
    found = _json(path).get("chat_template")
    if found is None:
        path = folder / "tokenizer_config.json"
        found = settings.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict):
        named = found
        found = named.get("default") if len(named) != 1 else next(iter(named.values()))
        if found is None:
            raise InputError(
                f"{path} has the chat templates {', '.join(map(str, named)) or '(none)'}, and none is named default",
                field=str(path),
                value=[*named],
                remedy="write the one to use into chat_template.jinja beside it.",
            )
    if found is None:
        return None
    if not isinstance(found, str):
        raise InputError(
            f"chat_template in {path} is {found!r:.80}",
            field=str(path),
            value=found,
            remedy="it must be a text, or a list of named templates.",
        )
    if len(found) > _TEMPLATE_BYTES:
        raise InputError(
            f"chat_template in {path} has {len(found)} characters, and {_TEMPLATE_BYTES} are the most.",
            field=str(path),
            value=len(found),
            remedy="Take the template of the model's own publisher.",
        )
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
            f"The added tokens of {path} are malformed ({type(error).__name__}: {str(error)[:200]}); an entry is "
            '"id": {"content": text, "special": true or false}.',
            field=str(path),
            value=entries,
            remedy="Copy the file again.",
        ) from error
    return added


def _ids(folder: Path, role: str, value: Any, embedding_rows: int) -> list[int]:
    """Ids of a role in config.json and generation_config.json: a number, a list, or nothing (-1 is one)."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i >= embedding_rows:
            raise InputError(
                f"{role}_id is {value!r:.80} in {folder}/generation_config.json or config.json",
                field=f"{role}_id",
                value=value,
                remedy=f"the model's embedding has {embedding_rows} rows, so ids are whole numbers from 0 to "
                f"{embedding_rows - 1}.",
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
    contents = _contents(path, _SETTINGS_BYTES)
    return {} if contents is None else _parsed(path, contents)


def _contents(path: Path, most: int) -> bytes | None:
    """The bytes of a regular file, or None where there is nothing of its name.

    A link to nowhere is no absence: without its template, a chat model would be read as a base model. And whoever opens
    a pipe waits for ever.

    Errors: InputError where it is no regular file, has more bytes than `most`, or cannot be read.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise InputError(
            f"{path} is a link to {path.readlink()}, which does not exist.",
            field=str(path),
            value=str(path.readlink()),
            remedy="Copy the file that it stands for, or remove the link if the model has none.",
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}).",
            field=str(path),
            value=str(error),
            remedy="Copy it again from where the model was published.",
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise InputError(
            f"{path} is {kind}; it must be a regular file.",
            field=str(path),
            value=kind,
            remedy="Copy it from where the model was published.",
        )
    if found.st_size > most:
        raise InputError(
            f"{path} has {found.st_size} bytes, and {most} are the most that are read.",
            field=str(path),
            value=found.st_size,
            remedy="Copy it again from where the model was published.",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}).",
            field=str(path),
            value=str(error),
            remedy="Give this user access to it, or copy it again.",
        ) from error


def _parsed(path: Path, contents: bytes) -> dict[str, Any]:
    text = _utf8(path, contents)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON: {error}.", field=str(path), value=str(error), remedy="Mend it, or copy it again."
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path} holds {data!r:.80}; a JSON object is expected.",
            field=str(path),
            value=data,
            remedy="Copy it again.",
        )
    return data


def _utf8(path: Path, contents: bytes) -> str:
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} is 0x{contents[error.start]:02x}.",
            field=str(path),
            value=contents[error.start],
            remedy="Save it as UTF-8, or copy it again.",
        ) from error
