"""Plain prompts: a text that the model continues, with nothing around it, for both kinds of tokenizers."""

import numpy as np
import pytest

from ctrl_jax.data import pipelines, pretrained_tokenizers, tokenizers
from ctrl_jax.data.conversations import Record, Turn
from ctrl_jax.types import Responses
from tests.data.test_pretrained_tokenizers import (
    BASE,
    BYTES,
    CHAT,
    CHATML,
    GEMMA_CONFIG,
    GEMMA_PIECES,
    LLAMA2_PIECES,
    WITH_BOS,
    directory,
)

PROMPTS = ["def double(x):\n", "The quick brown fox", " \n\nHuman: Hi\n\nAssistant:", "<|im_start|>user"]
REPLIES = ["    return 2 * x\n", " jumps over the lazy dog. ", "Ho", "\n\nHuman: <|im_end|>"]
KINDS = {
    "bytes": (BYTES, {"tokenizer_config": BASE}),
    "with a template": (BYTES, {"tokenizer_config": CHAT, "template": CHATML}),
    "with BOS": (WITH_BOS, {"tokenizer_config": BASE}),
    "sentencepiece with a prefix": (LLAMA2_PIECES, {"tokenizer_config": BASE}),
    "sentencepiece": (GEMMA_PIECES, {"tokenizer_config": GEMMA_CONFIG}),
}


def said(text):
    return (Turn("user", text),)


def plain(name, folder, format="plain"):
    if name == "trained":
        return tokenizers.train([*PROMPTS, *REPLIES], vocabulary_size=60, format=format)
    tokenizer, files = KINDS[name]
    return pretrained_tokenizers.load(directory(folder, tokenizer, **files), embedding_rows=1000, format=format)


@pytest.mark.parametrize("name", ["trained", *KINDS])
def test_prompt_and_reply_are_the_texts_to_the_last_space(name, tmp_path):
    tokenizer = plain(name, tmp_path)
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        asked, answer = tokenizer.encode_prompt(said(prompt)), tokenizer.encode_response(reply)
        assert answer[-1] == tokenizer.eos_ids[0] and set(answer[:-1]).isdisjoint(tokenizer.eos_ids)
        assert tokenizer.decode_response(answer) == tokenizer.decode(answer) == reply
        # A SentencePiece model may open a text with a space of its own.
        assert tokenizer.decode([*asked, *answer]) in (f"{prompt}{reply}", f" {prompt}{reply}")
    assert tokenizer.encode_response("") == [tokenizer.eos_ids[0]]
    assert tokenizer.decode_response(tokenizer.encode_response(" \n")) == " \n", "white space alone is a reply"


@pytest.mark.parametrize("tokenizer", [BYTES, WITH_BOS])
def test_prompts_have_the_tokens_that_the_library_gives_their_texts(tokenizer, tmp_path):
    files = {"tokenizer_config": {**CHAT, "add_bos_token": None}, "template": CHATML}
    ours = pretrained_tokenizers.load(directory(tmp_path, tokenizer, **files), embedding_rows=1000, format="plain")
    for prompt, reply in zip(PROMPTS[:3], REPLIES, strict=False):
        # The library adds BOS where its file says so.
        assert ours.encode_prompt(said(prompt)) == tokenizer.encode(prompt).ids
        assert ours.encode_conversation(said(prompt), reply) == tokenizer.encode(prompt + reply).ids


@pytest.mark.parametrize("name", ["trained", "bytes", "with a template"])
def test_what_is_read_in_another_format_has_another_fingerprint(name, tmp_path):
    chat, texts = plain(name, tmp_path, "chat"), plain(name, tmp_path)
    assert chat.encode_prompt(said("Hi")) != texts.encode_prompt(said("Hi"))
    assert chat.fingerprint != texts.fingerprint


def test_responses_keep_their_white_space(tmp_path):
    tokenizer = plain("bytes", tmp_path)
    tokens, lengths = pipelines.padded([*map(tokenizer.encode_response, REPLIES)], 64, tokenizer.pad_id)
    responses = Responses(tokens[:, None], lengths[:, None])
    assert pipelines.decoded(responses, tokenizer) == [[reply] for reply in REPLIES]


def test_a_pair_is_learned_behind_its_prompt(tmp_path):
    tokenizer = plain("with BOS", tmp_path)
    record = Record(said(PROMPTS[0]), REPLIES[0], chosen=REPLIES[0], rejected=REPLIES[1])
    found = pipelines.preference_pairs([record], tokenizer, prompt_length=40, response_length=40).examples
    length, reply = found.prompts.lengths[0], found.responses.lengths[0]
    whole = np.concatenate([found.prompts.tokens[0, :length], found.responses.tokens[0, 0, : reply[0] - 1]])
    assert whole[0] == 0, "BOS"
    assert tokenizer.decode(whole.tolist()) == PROMPTS[0] + REPLIES[0]
