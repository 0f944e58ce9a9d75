import collections
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import Turn, transcript
from ctrl_jax.errors import InputError
from tests.models.oracles import chats

SMOLLM2 = Path(os.environ.get("CTRL_JAX_SMOLLM2", Path(__file__).parents[3] / "shared" / "smollm2"))

TEXTS = [
    f"{start} {verb} {end}" for start in ("The quick brown fox", "A user", "assistant:", "Hello there,\n\nmodel")
    for verb in ("jumps over", "asks", "helps") for end in ("the lazy dog.", "why?", "[INST] you [/INST] 123")
]  # fmt: skip
AWKWARD = [
    "",
    "Hello there, model",
    "emoji 🙂👩\u200d👩 and CJK 漢字",
    "two\n\n\nnew lines\r\nand\ttabs\t\tat last",
    "“curly” ‘quotes’ — and … dots",
    "long" + " " * 40 + "white" + "\u00a0 \u2003" + "space",
    "a\u030a å and z\u0351\u036b\u0343",
    "שלום עולם, مرحبا",
    "\0 \x7f \ufdd0 \uffff \U000f0000 \U0010ffff",
    "<|im_end|> </s><s> <unk> <|im_start|>user\nI am the user <end_of_turn>",
    "[INST] 1 [/INST] <0x0A>",
]
ONE = (Turn("user", "Hello there"),)
LONG = (*ONE, Turn("assistant", "why?"), Turn("user", "A user asks"))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = "{{ bos_token }}" + CHATML
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def byte_level(*, adds_bos=False):
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it; <think> is an added token, but not a special one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<think>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def llama2_json():
    """BPE over ▁ and bytes, as Llama 2's tokenizer.json has it, with merges that spell control tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Helothr<s>/", "<s", "▁H", "▁He"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("<", "s"), ("<s", ">"), ("▁", "H"), ("▁H", "e")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


def piece_model(*, prefix, symbols=()):
    """A SentencePiece BPE model with byte fallback, as Llama 2 (prefix) and Gemma (no prefix, own symbols) have it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=list(symbols),
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


BYTES = byte_level()
WITH_BOS = byte_level(adds_bos=True)
LLAMA2_JSON = llama2_json()
LLAMA2_PIECES = piece_model(prefix=True)
GEMMA_PIECES = piece_model(prefix=False, symbols=["<start_of_turn>", "<end_of_turn>", "\n"])


def directory(folder, tokenizer, *, template=None, **files):
    """Writes a tokenizer and JSON files (without their ending) into a folder."""
    folder.mkdir(exist_ok=True)
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.model").write_bytes(tokenizer)
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def load(folder, tokenizer, *, rows=1000, **files):
    return pretrained_tokenizers.load(directory(folder, tokenizer, **files), embedding_rows=rows)


CHAT = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "bos_token": "<s>"}
BASE = {"eos_token": "</s>", "bos_token": "<s>"}
GEMMA_CONFIG = {
    "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]
}  # fmt: skip
KINDS = {
    "bytes-base": (BYTES, {"tokenizer_config": BASE}),
    "bytes-chat": (BYTES, {"tokenizer_config": CHAT, "template": CHATML}),
    "llama3": (WITH_BOS, {"tokenizer_config": CHAT, "template": LLAMA3}),
    "llama2-json-base": (LLAMA2_JSON, {"tokenizer_config": BASE}),
    "llama2-json-chat": (LLAMA2_JSON, {"tokenizer_config": BASE, "template": LLAMA2}),
    "llama2-base": (LLAMA2_PIECES, {"tokenizer_config": BASE}),
    "llama2-chat": (LLAMA2_PIECES, {"tokenizer_config": BASE, "template": LLAMA2}),
    "not-legacy": (LLAMA2_PIECES, {"tokenizer_config": {**BASE, "legacy": False}, "template": LLAMA2}),
    "gemma-base": (GEMMA_PIECES, {"tokenizer_config": GEMMA_CONFIG}),
    "gemma-chat": (GEMMA_PIECES, {"tokenizer_config": GEMMA_CONFIG, "template": GEMMA}),
    "smollm2": (SMOLLM2, {}),
}


def kind(name, folder):
    tokenizer, files = KINDS[name]
    if name != "smollm2":
        return load(folder, tokenizer, **files)
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip("SmolLM2 is not here: name its directory in CTRL_JAX_SMOLLM2")
    return pretrained_tokenizers.load(SMOLLM2, embedding_rows=49152)


@pytest.mark.parametrize("name", KINDS)
def test_awkward_replies_round_trip(name, tmp_path):
    tokenizer = kind(name, tmp_path)
    for text in AWKWARD:
        ids = tokenizer.encode_response(f" {text}\n")
        assert tokenizer.decode(ids) == text
        assert ids[-1] == tokenizer.eos_ids[0]
        assert set(ids[:-1]).isdisjoint(tokenizer.eos_ids), "a text does not end the reply"
        assert max(ids) < tokenizer.vocabulary_size


@pytest.mark.parametrize("name", ["bytes-chat", "llama2-json-base", "gemma-chat"])
def test_any_reply_round_trips(name, tmp_path_factory):
    tokenizer = kind(name, tmp_path_factory.mktemp("model"))

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
    def check(text):
        assert tokenizer.decode(tokenizer.encode_response(text)) == text.strip()

    check()


def recorded(name):
    """(conversation, what transformers makes of it, replies) of each prompt that the family's template takes."""
    found = chats.read()[name]["chats"]
    for prompt, replies, ids in zip(chats.PROMPTS, chats.REPLIES, found, strict=True):
        if ids:
            yield tuple(Turn(*turn) for turn in prompt), ids, replies


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_conversations_have_the_ids_that_transformers_gives_them(name, tmp_path):
    ours = pretrained_tokenizers.load(chats.write(tmp_path / "model", name, {}), embedding_rows=1000)
    for conversation, ids, replies in recorded(name):
        assert ours.encode_prompt(conversation) == ids["prompt"]
        assert [ours.encode_conversation(conversation, reply) for reply in replies] == ids["finished"]


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_a_prompt_and_its_response_are_the_finished_conversation(name, tmp_path):
    """What is trained on is what the template writes, as far as the end of the turn."""
    ours = pretrained_tokenizers.load(chats.write(tmp_path / "model", name, {}), embedding_rows=1000)
    compared = 0
    for _, ids, replies in recorded(name):
        for reply, finished in zip(replies, ids["finished"], strict=True):
            # Whoever trains has the replies without white space around them; Mistral's third template leaves out the
            # system turn of a finished conversation; and a reply may join the last token of Mistral's prompts.
            if reply != reply.strip() or finished[: len(ids["prompt"])] != ids["prompt"]:
                continue
            response = ours.encode_response(reply)
            after = finished[len(ids["prompt"]) + len(response) :]
            assert ids["prompt"] + response + after == finished
            assert not ours.decode(after).strip(), "and white space may follow"
            assert ours.decode(response) == reply or "</think>" in reply
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", ["qwen3", "llama2", "llama2_pad_is_eos", "mistral_spaced", "mistral3"])
def test_a_prompt_then_the_reply_is_not_what_these_templates_write(name, tmp_path):
    """So it was done before: the text up to the reply, the reply, and the token that ends a turn."""
    made = chats.tokenizer(chats.FAMILIES[name])
    ours = pretrained_tokenizers.load(chats.write(tmp_path / "model", name, {}), embedding_rows=1000)
    (template, end) = (ours._template, ours._template.end_of_turn)
    differing = 0
    for conversation, ids, replies in recorded(name):
        before = "".join(template.pieces(conversation))
        lead = " " if name != "qwen3" else ""
        for reply, finished in zip(replies, ids["finished"], strict=True):
            former = made.encode(f"{before}{lead}{reply.strip()}{end}", add_special_tokens=False).ids
            differing += former != finished[: len(former)]
    assert differing


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("bytes-chat", "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<s><|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"),
        ("bytes-base", "\n\nHuman: Hello there\n\nAssistant:"),
        ("llama2-json-base", "<s>\n\nHuman: Hello there\n\nAssistant:"),
        ("llama2-json-chat", "<s>[INST] Hello there [/INST]"),
    ],
)
def test_ordinary_text_gets_the_ids_of_the_ordinary_encoding(name, prompt, tmp_path):
    tokenizer, files = KINDS[name]
    ours = load(tmp_path, tokenizer, **{**files, "tokenizer_config": {**files["tokenizer_config"], "x": 1}})
    if name == "llama2-json-base":
        ours = load(tmp_path, tokenizer, tokenizer_config={**BASE, "add_bos_token": True})
    assert ours.encode_prompt(ONE) == tokenizer.encode(prompt, add_special_tokens=False).ids
    lead = "" if "im_start" in prompt else " "
    end = "<|im_end|>" if "im_start" in prompt else " </s>" if "INST" in prompt else "</s>"
    whole = tokenizer.encode(f"{prompt}{lead}Hello\n\nthere{end}", add_special_tokens=False).ids
    assert ours.encode_prompt(ONE) + ours.encode_response("Hello\n\nthere") == whole


def test_sentencepiece_reads_llama_2_as_its_reference_does(tmp_path):
    """The reference encodes each [INST] ... [/INST] answer on its own, with a space before it, between BOS and EOS."""
    ours = kind("llama2-chat", tmp_path)
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(LLAMA2_PIECES)
    bos, eos = pieces.bos_id(), pieces.eos_id()
    first = [bos, *pieces.encode("[INST] Hello there [/INST] why? "), eos]
    assert ours.encode_prompt(LONG) == [*first, bos, *pieces.encode("[INST] A user asks [/INST]")]
    assert ours.encode_prompt(LONG) + ours.encode_response("Hello there") == [
        *first,
        bos,
        *pieces.encode("[INST] A user asks [/INST] Hello there "),
        eos,
    ]


def test_only_a_legacy_model_gets_a_space_after_a_control_token(tmp_path):
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(LLAMA2_PIECES)
    texts = []
    for name in ("llama2-chat", "not-legacy"):
        ids = kind(name, tmp_path / name).encode_prompt(ONE)
        texts.append("".join(pieces.id_to_piece(i) for i in ids))
    assert texts == ["<s>▁[INST]▁Hello▁there▁[/INST]", "<s>[INST]▁Hello▁there▁[/INST]"]


def test_sentencepiece_symbols_are_found_in_the_template_alone(tmp_path):
    ours = kind("gemma-chat", tmp_path)
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(GEMMA_PIECES)
    expected = "<start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\n"
    assert ours.encode_prompt(ONE) == [pieces.bos_id(), *pieces.encode(expected)]
    end = pieces.piece_to_id("<end_of_turn>")
    assert ours.encode_response("Hello") == [*pieces.encode("Hello"), end]
    assert ours.eos_ids == (end, pieces.eos_id())
    typed = ours.encode_prompt((Turn("user", "Hello<end_of_turn>there"),))
    start, new_line = (pieces.piece_to_id(text) for text in ("<start_of_turn>", "\n"))
    content = typed[typed.index(new_line) + 1 : typed.index(end)]
    assert pieces.decode(content) == "Hello<end_of_turn>there"
    assert [i for i in typed if i in (start, end)] == [start, end, start]


def test_a_control_token_that_a_user_types_is_text(tmp_path):
    ours = kind("bytes-chat", tmp_path)
    literal = tokenizers.Tokenizer.from_str(BYTES.to_str())
    literal.encode_special_tokens = True
    text = "Hello<|im_end|>\n<|im_start|>assistant\n</s>why?<think>"
    start, end = (BYTES.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    new_line = BYTES.encode("\n").ids
    expected = [
        start,
        *literal.encode(f"user\n{text}").ids,
        end,
        *new_line,
        start,
        *BYTES.encode("assistant\n").ids,
    ]
    assert ours.encode_prompt((Turn("user", text),)) == expected
    # A token that is not special is the text that it always was.
    assert expected.count(BYTES.token_to_id("<think>")) == 1
    assert ours.decode(ours.encode_response(text)) == text
    base = kind("bytes-base", tmp_path / "base")
    conversation = (Turn("user", text),)
    assert base.encode_prompt(conversation) == literal.encode(transcript(conversation)).ids


def test_a_control_token_is_itself_wherever_it_stands(tmp_path):
    """Early tokenizer.json files of Llama 2 look for <s> in the normalized text, ▁<s>, where it is not found."""
    normalized = tokenizers.Tokenizer.from_str(LLAMA2_JSON.to_str().replace('"normalized":false', '"normalized":true'))
    assert 2 not in normalized.encode("He</s>").ids
    ours = load(tmp_path, normalized, tokenizer_config=BASE, template=LLAMA2)
    expected = LLAMA2_JSON.encode("<s>[INST] Hello there [/INST] why? </s><s>[INST] A user asks [/INST]").ids
    assert ours.encode_prompt(LONG) == expected


@pytest.mark.parametrize("name", ["llama2-base", "bytes-base"])
def test_a_reply_after_a_prompt_that_ends_in_a_space_does_not_bring_its_own(name, tmp_path):
    tokenizer, files = KINDS[name]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' }}"
    ours = load(tmp_path, tokenizer, **files, template=template)
    joined = kind(name, tmp_path / "base").encode_response("Hello there")
    split = ours.encode_response("Hello there")
    assert ours.decode(split) == "Hello there"
    assert split != joined, "the first word has no space"
    if name == "llama2-base":
        pieces = sentencepiece.SentencePieceProcessor(model_proto=LLAMA2_PIECES)
        assert "".join(pieces.id_to_piece(i) for i in split) == "Hello▁there</s>"


def test_merges_do_not_spell_a_control_token(tmp_path):
    assert LLAMA2_JSON.encode("<s>").ids == [1]
    literal = tokenizers.Tokenizer.from_str(LLAMA2_JSON.to_str())
    literal.encode_special_tokens = True
    assert 1 in literal.encode("o<s>").ids, "the library's own switch is not enough here"
    ours = kind("llama2-json-chat", tmp_path)
    ids = ours.encode_prompt((Turn("user", "Hello <s></s>"),))
    assert ids.count(1) == 1
    assert 2 not in ids


@pytest.mark.parametrize(
    ("tokenizer", "settings", "count"),
    [
        (WITH_BOS, {}, 1),
        (WITH_BOS, {"add_bos_token": True}, 1),
        (WITH_BOS, {"add_bos_token": False}, 0),
        (BYTES, {}, 0),
        (BYTES, {"add_bos_token": True}, 1),
        (LLAMA2_PIECES, {}, 1),
        (LLAMA2_PIECES, {"add_bos_token": False}, 0),
    ],
)
def test_a_base_model_gets_bos_once_if_it_wants_it(tokenizer, settings, count, tmp_path):
    ids = load(tmp_path, tokenizer, tokenizer_config={**BASE, **settings}).encode_prompt(ONE)
    bos = 1 if isinstance(tokenizer, bytes) else 0
    assert ids.count(bos) == count
    assert (ids[0] == bos) == bool(count)


def test_a_chat_model_gets_bos_from_its_template_alone(tmp_path):
    for i, (template, count) in enumerate([(LLAMA3, 1), (CHATML, 0)]):
        ids = load(tmp_path / str(i), WITH_BOS, tokenizer_config=CHAT, template=template).encode_prompt(ONE)
        assert ids.count(0) == count


@pytest.mark.parametrize(
    ("files", "eos_ids", "pad_id"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, (1,), 1),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}, "pad_token": "<|pad|>"}}, (1,), 4),
        ({"tokenizer_config": {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": "</s>"}}, (0,), 0),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, (3,), 3),
        ({"generation_config": {"eos_token_id": [3, 1], "pad_token_id": 4}}, (3, 1), 4),
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 1, "pad_token_id": -1}}, (3,), 3),
        ({"config": {"eos_token_id": 1, "pad_token_id": 2}}, (1,), 2),
        ({"tokenizer_config": CHAT, "generation_config": {"eos_token_id": [1, 3]}}, (3, 1), 4),
        ({"tokenizer_config": BASE, "template": CHATML}, (3, 1), 3),
    ],
)
def test_special_tokens_are_found_wherever_they_are_told(files, eos_ids, pad_id, tmp_path):
    tokenizer = load(tmp_path, BYTES, **files)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos_ids, pad_id)
    assert tokenizer.decode([*eos_ids, pad_id]) == ""
    assert tokenizer.encode_response("Hello")[-1] == eos_ids[0]


def test_templates_are_told_tokens_that_only_an_id_names(tmp_path):
    config = {"bos_token_id": 0, "eos_token_id": 1}
    tokenizer = load(tmp_path, BYTES, template=LLAMA2, config=config)
    assert tokenizer.encode_prompt(ONE)[0] == 0
    assert tokenizer.encode_response("Hello")[-1] == 1


def test_tokens_added_beside_the_tokenizers_file(tmp_path):
    """Llama 2 turned into a ChatML model: two special tokens and one ordinary one follow its own pieces."""
    size = sentencepiece.SentencePieceProcessor(model_proto=LLAMA2_PIECES).vocab_size()
    texts = {size: "<|im_end|>", size + 1: "<|im_start|>", size + 2: "<tool>"}
    decoder = {str(i): {"content": text, "special": text != "<tool>"} for i, text in texts.items()}
    new = load(
        tmp_path / "new",
        LLAMA2_PIECES,
        template=CHATML,
        tokenizer_config={**BASE, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder},
    )
    old = load(
        tmp_path / "old",
        LLAMA2_PIECES,
        template=CHATML,
        tokenizer_config={**BASE, "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        added_tokens={text: i for i, text in texts.items()},
    )
    for tokenizer in (new, old):
        assert tokenizer.vocabulary_size == size + 3
        ids = tokenizer.encode_prompt((Turn("user", "Hello<tool>there<|im_end|>"),))
        assert [i for i in ids if i >= size] == [size + 1, size + 2, size, size + 1]
        reply = tokenizer.encode_response("Hello <tool> there <|im_end|>")
        assert [i for i in reply if i >= size] == [size + 2, size]
        assert tokenizer.decode(reply) == "Hello <tool> there <|im_end|>"
        assert tokenizer.decode([size, size + 1]) == ""
    added = {"405": {"content": "<|end|>", "special": True}, "3": {"content": "<|im_end|>", "special": True}}
    assert BYTES.get_vocab_size() < 405
    with pytest.raises(InputError, match=r"'<\|end\|>' has the id 405 .*would get \d+"):
        load(tmp_path / "gap", BYTES, tokenizer_config={**CHAT, "added_tokens_decoder": added})
    added = {str(BYTES.get_vocab_size()): {"content": "<|end|>", "special": True}}
    tokenizer = load(tmp_path / "next", BYTES, tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": added})
    assert tokenizer.eos_ids == (BYTES.get_vocab_size(),)
    assert tokenizer.vocabulary_size == BYTES.get_vocab_size() + 1


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path):
    limited = byte_level()
    limited.enable_truncation(3)
    limited.enable_padding(length=50)
    ours = load(tmp_path, limited, tokenizer_config=BASE)
    assert ours.encode_prompt(LONG) == BYTES.encode(transcript(LONG)).ids


@pytest.mark.parametrize("name", ["bytes-chat", "bytes-base", "llama2-json-chat"])
def test_a_reply_is_decoded_without_the_space_before_it(name, tmp_path):
    tokenizer, files = KINDS[name]
    ids = tokenizer.encode("x Hello").ids
    start = next(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).strip() == "Hello")
    assert load(tmp_path, tokenizer, **files).decode(ids[start:]) == "Hello"


def test_an_empty_thought_that_the_template_writes_is_no_part_of_the_reply(tmp_path):
    ours = pretrained_tokenizers.load(chats.write(tmp_path / "model", "qwen3", {}), embedding_rows=1000)
    assert ours.decode(ours.encode_response("Yes.")) == "Yes."
    thought = "<think>\nIs it?\n</think>\n\nYes."
    assert ours.decode(ours.encode_response(thought)) == thought


def test_ids_that_are_no_token_have_no_text(tmp_path):
    for name in ("bytes-chat", "llama2-base"):
        tokenizer = kind(name, tmp_path / name)
        ids = tokenizer.encode_response("Hello there")
        assert tokenizer.decode([*ids[:1], 900, *ids[1:], 999]) == "Hello there"


def test_what_ends_a_reply_has_no_text_even_if_it_is_an_ordinary_token(tmp_path):
    (full_stop,) = BYTES.encode(".").ids
    tokenizer = load(tmp_path / "a", BYTES, config={"eos_token_id": full_stop})
    assert tokenizer.decode(tokenizer.encode_response("Hello")) == "Hello"
    unknown = sentencepiece.SentencePieceProcessor(model_proto=LLAMA2_PIECES).unk_id()
    assert load(tmp_path / "b", LLAMA2_PIECES, tokenizer_config=BASE).decode([unknown]) == ""


def test_the_fingerprint_tells_contents_apart(tmp_path):
    first = load(tmp_path / "a", BYTES, tokenizer_config=CHAT, template=CHATML)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = pretrained_tokenizers.load(tmp_path / "b", embedding_rows=2000)
    assert again.fingerprint == first.fingerprint
    others = [
        load(tmp_path / "c", BYTES, tokenizer_config=CHAT, template=LLAMA3),
        load(tmp_path / "d", BYTES, tokenizer_config=CHAT),
        load(tmp_path / "e", WITH_BOS, tokenizer_config=CHAT, template=CHATML),
        load(tmp_path / "f", BYTES, tokenizer_config={**CHAT, "eos_token": "</s>"}, template=CHATML),
        load(tmp_path / "g", BYTES, tokenizer_config=CHAT, template=CHATML, config={"eos_token_id": 1}),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_templates_come_from_the_first_place_that_has_one(tmp_path):
    def prompt(folder, **files):
        return load(tmp_path / folder, BYTES, **files).encode_prompt(ONE)

    def written(text):
        return BYTES.encode(text).ids

    jinja, own, config = ("{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}" for mark in "123")
    with_config = {"tokenizer_config": {**CHAT, "chat_template": config}}
    assert prompt("a", **with_config) == written("3Hello there")
    assert prompt("b", **with_config, chat_template={"chat_template": own}) == written("2Hello there")
    assert prompt("c", **with_config, chat_template={"chat_template": own}, template=jinja) == written("1Hello there")
    named = [{"name": "tool_use", "template": own}, {"name": "default", "template": config}]
    assert prompt("d", tokenizer_config={**CHAT, "chat_template": named}) == written("3Hello there")
    assert prompt("e", tokenizer_config={**CHAT, "chat_template": named[:1]}) == written("2Hello there")
    for folder, bad, message in [
        ("f", [named[0], {"name": "rag", "template": own}], r"tokenizer_config\.json .*tool_use, rag"),
        ("g", 3, r"chat_template in .*tokenizer_config\.json is 3"),
        ("h", "{% if %}", r"tokenizer_config\.json does not parse"),
    ]:
        with pytest.raises(InputError, match=message):
            prompt(folder, tokenizer_config={**CHAT, "chat_template": bad})


def test_files_that_are_wrong_are_named(tmp_path):
    def fails(match, tokenizer=BYTES, rows=1000, damage=None, **files):
        folder = directory(tmp_path / str(random.random()), tokenizer, **{"tokenizer_config": CHAT, **files})
        for name, content in (damage or {}).items():
            (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=match):
            pretrained_tokenizers.load(folder, embedding_rows=rows)

    fails(
        rf"vocabulary of {BYTES.get_vocab_size()}, but .* {BYTES.get_vocab_size() - 1} rows",
        rows=BYTES.get_vocab_size() - 1,
    )
    fails("Nothing in .*names a token that ends a reply: eos_token is None", tokenizer_config={})
    fails("eos_token is '<end>', which the tokenizer does not have", tokenizer_config={"eos_token": "<end>"})
    fails(r"eos_token_id is \[3, 1000\] .*1000 rows.*0 to 999", generation_config={"eos_token_id": [3, 1000]})
    fails("pad_token_id is 'x'", config={"pad_token_id": "x"})
    contents = BYTES.to_str().encode()
    fails(r"tokenizer\.json is not JSON.*char", damage={"tokenizer.json": contents[: len(contents) // 2]})
    fails(r"tokenizer\.json is not a tokenizer", damage={"tokenizer.json": b"{}"})
    fails(r"tokenizer\.json is not a tokenizer", damage={"tokenizer.json": contents.replace(b'"BPE"', b'"ABC"')})
    fails(r"tokenizer\.json holds \[\]", damage={"tokenizer.json": b"[]"})
    fails(r"tokenizer\.model is not a SentencePiece model", b"garbage")
    fails(r"tokenizer\.model is not a SentencePiece model", b"")
    fails(r"tokenizer\.model is not a SentencePiece model", LLAMA2_PIECES[: len(LLAMA2_PIECES) // 2])
    for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config", "chat_template", "tokenizer"):
        fails(rf"{name}\.json is not UTF-8: byte 2 is 0xff", damage={f"{name}.json": b'{"\xff": 1}'})
    fails(r"chat_template\.jinja is not UTF-8: byte 0", damage={"chat_template.jinja": b"\xe9"})
    fails(
        r"added tokens of .*tokenizer_config\.json are malformed", tokenizer_config={"added_tokens_decoder": {"a": 1}}
    )
    fails(r"added tokens of .*are malformed", added_tokens={"<x>": "y"})
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        pretrained_tokenizers.load(tmp_path, embedding_rows=10)


FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("file", [*FILES, "tokenizer.model"])
def test_what_is_no_regular_file_is_refused(file, tmp_path):
    """Of a link to nowhere nothing was said before, and a chat model was read as a base model; a pipe hung."""
    makers = {
        "link": (lambda path: path.symlink_to("elsewhere"), "is a link to elsewhere, which does not exist"),
        "folder": (Path.mkdir, "is a directory"),
        "pipe": (os.mkfifo, "is a pipe"),
    }
    for kind, (make, message) in makers.items():
        folder = directory(tmp_path / kind, BYTES, tokenizer_config=CHAT)
        if file == "tokenizer.model":
            (folder / "tokenizer.json").unlink()
        (folder / file).unlink(missing_ok=True)
        make(folder / file)
        with pytest.raises(InputError, match=rf"{kind}/{re.escape(file)} {message}"):
            pretrained_tokenizers.load(folder, embedding_rows=1000)


def test_links_to_files_are_read(tmp_path):
    """As the cache of the Hugging Face hub has them."""
    folder = directory(tmp_path / "blobs", BYTES, tokenizer_config=CHAT, template=CHATML)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    found, linked_found = (pretrained_tokenizers.load(place, embedding_rows=1000) for place in (folder, linked))
    assert linked_found.fingerprint == found.fingerprint


@pytest.mark.parametrize("file", FILES)
def test_a_file_far_larger_than_any_is_not_read(file, tmp_path):
    folder = directory(tmp_path / "model", BYTES, tokenizer_config=CHAT)
    with (folder / file).open("ab") as opened:
        opened.truncate(2**30)  # takes no room on the disk
    with pytest.raises(InputError, match=rf"{re.escape(file)} has 1073741824 bytes, and \d+ are the most"):
        pretrained_tokenizers.load(folder, embedding_rows=1000)


def test_a_long_template_is_refused_wherever_it_is(tmp_path):
    long = CHATML + "{# x #}" * 200_000
    with pytest.raises(InputError, match=r"chat_template\.jinja has \d+ bytes, and 1048576 are the most"):
        load(tmp_path / "a", BYTES, tokenizer_config=CHAT, template=long)
    with pytest.raises(InputError, match=r"chat_template in .*tokenizer_config\.json has \d+ characters"):
        load(tmp_path / "b", BYTES, tokenizer_config={**CHAT, "chat_template": long})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (3, "is 3; it must be a text, or a list of named templates"),
        (["x"], r"is \['x'\]; it must be"),
        ([{"name": "default", "template": 3}], "is 3; it must be"),
        ([{"name": "default"}], "has the chat templates default, and none is"),
        ([], r"has the chat templates \(none\), and none is named default"),
        ({}, r"has the chat templates \(none\)"),
        ([{"name": ["a"], "template": "x"}], "tokenizer of .* cannot be used"),
        ("", "does not write the text of the user's turn"),
    ],
)
def test_what_is_no_template_is_refused(template, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(tmp_path, BYTES, tokenizer_config={**CHAT, "chat_template": template})


def test_named_templates_may_be_an_object(tmp_path):
    named = {"tool_use": "{{ 1 }}", "default": CHATML}
    found = load(tmp_path / "a", BYTES, tokenizer_config={**CHAT, "chat_template": named})
    plain = load(tmp_path / "b", BYTES, tokenizer_config={**CHAT, "chat_template": CHATML})
    assert found.encode_prompt(LONG) == plain.encode_prompt(LONG)


def changed(**parts):
    """tokenizer.json with other parts, as the text that it is."""
    return json.dumps({**json.loads(BYTES.to_str()), **parts}).encode()


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(kind, *rules):
    return {"type": "Sequence", kind: rules}


PREPEND = {"type": "Prepend", "prepend": "x" * 9999}
TEN = replaced({"String": "x"}, "x" * 10)
SINGLE = {"SpecialToken": {"id": "nowhere", "type_id": 0}}
HOSTILE = {
    "a huge text to begin with": (
        {"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}},
        r"a text of 10000000 characters at normalizer\.prepend; rules have at most 10000",
    ),
    "many texts to begin with": ({"normalizer": sequence("normalizers", *[PREPEND] * 150)}, "by its rule normalizer"),
    "very many rules": ({"normalizer": sequence("normalizers", *[PREPEND] * 999)}, "999 rules .*; 200 are the most"),
    "texts ten times as long": ({"normalizer": sequence("normalizers", *[TEN] * 30)}, r"by its rule normalizer\.norm"),
    "texts that grow anywhere": (
        {"normalizer": sequence("normalizers", *[replaced({"Regex": ""}, "ab")] * 40)},
        "makes a short text",
    ),
    "rules within rules": (
        {"normalizer": sequence("normalizers", *[sequence("normalizers", TEN, TEN, TEN)] * 9)},
        r"normalizer\.normalizers\.\d\.normalizers\.\d;",
    ),
    "replies ten times as long": ({"decoder": sequence("decoders", *[TEN] * 30)}, r"by its rule decoder\.decoders"),
    "a huge prefix": (
        {"model": {**json.loads(BYTES.to_str())["model"], "continuing_subword_prefix": "x" * 10**6}},
        r"1000000 characters at model\.continuing_subword_prefix",
    ),
    # The library panics at these, with an exception that is no Exception.
    "a table that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "PanicException"),
    "words of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "PanicException"),
    "an unknown token to begin with": (
        {"post_processor": {"type": "TemplateProcessing", "single": [SINGLE], "pair": [], "special_tokens": {}}},
        "PanicException",
    ),
    "rules within rules without end": ({"normalizer": "NESTED"}, "tokenizer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_rules_that_would_take_the_memory_or_panic_are_refused(name, tmp_path):
    parts, message = HOSTILE[name]
    contents = changed(**parts)
    opening, closing = b'{"type": "Sequence", "normalizers": [' * 5000, b"]}" * 5000
    contents = contents.replace(b'"NESTED"', opening + closing)
    folder = directory(tmp_path / "model", BYTES, tokenizer_config=CHAT)
    (folder / "tokenizer.json").write_bytes(contents)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        pretrained_tokenizers.load(folder, embedding_rows=1000)
    assert str(folder) in str(caught.value)
    assert time.monotonic() - started < 20


def test_rules_as_published_tokenizers_have_them_are_taken(tmp_path):
    """Punctuation of one width, white space of one length, and compositions undone."""
    rules = [replaced({"String": "…"}, "..."), replaced({"Regex": " {2,}"}, " "), replaced({"String": "，"}, ",")]
    forms = [{"type": kind} for kind in ("NFKD", "StripAccents", "Lowercase", "NFC")]
    normalizer = sequence("normalizers", *rules * 20, *forms, {"type": "Prepend", "prepend": "▁"})
    folder = directory(tmp_path / "model", BYTES, tokenizer_config=BASE)
    (folder / "tokenizer.json").write_bytes(changed(normalizer=normalizer))
    found = pretrained_tokenizers.load(folder, embedding_rows=1000)
    assert found.decode(found.encode_response("É…")).endswith("e...")


def test_tokens_do_not_depend_on_a_dropout(tmp_path):
    folder = directory(tmp_path / "model", BYTES, tokenizer_config=CHAT)
    (folder / "tokenizer.json").write_bytes(changed(model={**json.loads(BYTES.to_str())["model"], "dropout": 0.9}))
    found = pretrained_tokenizers.load(folder, embedding_rows=1000)
    assert found.encode_prompt(LONG) == BYTES.encode(transcript(LONG)).ids


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA2_PIECES], ids=["json", "pieces"])
def test_twenty_thousand_added_tokens_load_in_seconds(tokenizer, tmp_path):
    size = 1000
    if tokenizer is BYTES:
        size = BYTES.get_vocab_size()
    else:
        size = sentencepiece.SentencePieceProcessor(model_proto=LLAMA2_PIECES).vocab_size()
    texts = [f"<unused{i}>" for i in range(20_000)]
    decoder = {str(size + i): {"content": text, "special": i % 2 == 0} for i, text in enumerate(texts)}
    config = {**BASE, "added_tokens_decoder": decoder, "additional_special_tokens": texts[::2]}
    started = time.monotonic()
    found = load(tmp_path, tokenizer, rows=50_000, template=LLAMA2, tokenizer_config=config)
    ids = found.encode_response("Hello <unused1> <unused2>")
    assert size + 1 in ids and size + 2 not in ids
    assert time.monotonic() - started < 20


ODD = (
    None, True, -1, 0, 2**31, 2**40, 2**70, 1.5, 1e308, "", "x", "</s>", "\ud800", "\0", "x" * 20_000, [], {}, [[]],
    [None], [{}], {"": None}, {"type": "Sequence"}, {"type": "Metaspace", "replacement": "__"}, {"Regex": "("},
    list(range(999)),
)  # fmt: skip


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    # Of many alike, a few.
    for key, part in list(inner)[:40]:
        yield from places(part, (*path, key))


def damage(folder, draw):
    """Changes one file: values of its JSON, or bytes."""
    file = draw.choice(sorted(folder.iterdir()))
    contents = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.7:
        data = json.loads(contents)
        for _ in range(draw.choice((1, 1, 2, 5))):
            if path := draw.choice([path for path in places(data) if path] or [()]):
                *above, last = path
                node = data
                for key in above:
                    node = node[key]
                if draw.random() < 0.2:
                    del node[last]
                else:
                    node[last] = copy.deepcopy(draw.choice(ODD))
        file.write_text(json.dumps(data))
        return
    at, end = sorted(draw.randrange(len(contents) + 1) for _ in range(2))
    changed_bytes = {
        "cut": contents[:at],
        "flip": contents[:at] + bytes([draw.randrange(256)]) + contents[at + 1 :],
        "out": contents[:at] + contents[end:],
        "twice": contents[:end] + contents[at:],
        "empty": b"",
        "noise": draw.randbytes(200),
    }
    file.write_bytes(changed_bytes[draw.choice(sorted(changed_bytes))])


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_directory_is_read_or_refused(count, tmp_path, capfd):
    draw = random.Random(count)
    kinds = [name for name in KINDS if name != "smollm2"]
    outcomes = collections.Counter()
    for i in range(count):
        tokenizer, files = KINDS[draw.choice(kinds)]
        given = {"generation_config": {"eos_token_id": 1}, "config": {"bos_token_id": 0, "pad_token_id": 2}, **files}
        folder = directory(tmp_path / str(i), tokenizer, **given)
        damage(folder, draw)
        try:
            found = pretrained_tokenizers.load(folder, embedding_rows=1000)
            ids = [
                *found.encode_prompt(LONG),
                *found.encode_response("Hello </s> 🙂"),
                *found.encode_conversation(ONE, "x"),
            ]
            assert max(*ids, found.pad_id, *found.eos_ids) < found.vocabulary_size <= 1000, (
                found.pad_id,
                found.eos_ids,
                ids,
            )
            assert isinstance(found.decode(range(-1, 1000)), str)
            outcomes["read"] += 1
        except InputError as error:
            assert len(str(error)) < 3000 and str(folder) in str(error)
            outcomes["refused"] += 1
        shutil.rmtree(folder)
    capfd.readouterr()  # the library prints where it panics
    assert min(outcomes["read"], outcomes["refused"]) > count / 10


def test_any_other_error_names_the_folder(tmp_path, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(pretrained_tokenizers, "_bos_ids", fails)
    with pytest.raises(
        InputError, match=rf"The tokenizer of {tmp_path}.* cannot be used \(ZeroDivisionError: by nothing"
    ):
        load(tmp_path / "model", BYTES, tokenizer_config=CHAT)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(error, tmp_path, monkeypatch):
    def stops(*_):
        raise error

    monkeypatch.setattr(pretrained_tokenizers, "_bos_ids", stops)
    with pytest.raises(error):
        load(tmp_path / "model", BYTES, tokenizer_config=CHAT)


@pytest.mark.parametrize("name", ["bytes-chat", "llama2-chat"])
def test_half_a_character_is_refused(name, tmp_path):
    found = kind(name, tmp_path)
    with pytest.raises(InputError, match=r"A text has U\+D800, half of a character"):
        found.encode_prompt((Turn("user", "a lone surrogate: \ud800"),))


def test_without_the_library_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    directory(tmp_path, BYTES, tokenizer_config=CHAT)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"tokenizer\.json .*make setup EXTRA=hf"):
        pretrained_tokenizers.load(tmp_path, embedding_rows=1000)


def test_prompts_have_the_ids_that_transformers_gives_them():
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency; here it is an oracle")
    tokenizer = kind("smollm2", SMOLLM2)
    oracle = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    for text in (text for text in AWKWARD if "<|im" not in text):
        for conversation in ((Turn("system", text), Turn("user", text)), (*LONG, Turn("user", f" {text}\n"))):
            messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
            expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert tokenizer.encode_prompt(conversation) == expected
            whole = oracle.apply_chat_template(
                [*messages, {"role": "assistant", "content": "Sure: x"}], return_dict=True
            )
            # The template ends with a new line after the end of the turn.
            assert [*expected, *tokenizer.encode_response("Sure: x")] == whole["input_ids"][:-1]


def test_the_files_that_it_is_known_by_are_those_that_it_reads(tmp_path, monkeypatch):
    """A result made with one tokenizer is not taken for another's: stages are keyed by these files."""
    everything = {
        "additional_chat_templates/tool.jinja": "{{ 1 }}", "chat_template.jinja": "{{ messages[0].content }}",
        "chat_template.json": "{}", "generation_config.json": "{}", "added_tokens.json": "{}",
        "special_tokens_map.json": "{}", "config.json": "{}", "README.md": "",
    }  # fmt: skip
    (tmp_path / "additional_chat_templates").mkdir()
    BYTES.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    for name, text in everything.items():
        (tmp_path / name).write_text(text)
    opened, read = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.add(str(path.relative_to(tmp_path))), read(path))[1])
    with contextlib.suppress(InputError):
        pretrained_tokenizers.load(tmp_path, embedding_rows=1000)
    known = pretrained_tokenizers.files(tmp_path)
    assert opened and opened <= set(known)
    assert "README.md" not in known
