"""What recorder and tests share of chat models: a tiny classifier of each family, its tokenizer, and its template.

The templates are those that the families are published with, without the parts for tools, which are not given here.
`chats.json`, written by record.py, has for each family what transformers makes of these directories: the token ids that
`apply_chat_template` gives, and the scores of the classifier on the finished conversations.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tests.models.oracles import cases

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # 0.1, and below it what is found in copies of it
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_SPACED = MISTRAL.replace(
    "message['content'] + eos_token + ' '", "' ' + message['content'].strip() + ' ' + eos_token"
)
MISTRAL3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial system") }}
    {%- endif %}
{%- endfor %}
"""
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

PROMPTS = (
    (("user", "Where do swifts sleep?"),),
    (("user", " Hi\n\nthere "), ("assistant", "Hello.\n"), ("user", "Name a river; the  other one.")),
    (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Name a river.")),
)
REPLIES = (
    ("On the wing.", "In nests, and when they travel in the air.\n\nThe  rest: 漢字 🙂", " \n- a list\n", ""),
    ("Loire", "<think>\nThe other one is the\n\nRhine.\n</think>\n\nThe Rhine.", "the loire", "<think>The</think>R"),
    ("The Loire.", "Rhine", "the river in the north", "No."),
)
"""Four to each prompt; transformers gets them as they are here."""


@dataclass(frozen=True)
class Family:
    template: str
    config: dict[str, Any]
    special: Sequence[str]
    """Control tokens, of the ids from 0."""
    pieces: bool = False
    """Whether words are cut as by SentencePiece (Llama 2, Mistral, Gemma), or as bytes with merges."""
    opening: str = "▁"
    """What such pieces write before a text."""
    plain: Sequence[str] = ()
    """Added tokens that are no control tokens."""
    settings: dict[str, Any] = field(default_factory=dict)
    adds_bos: bool = False


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForSequenceClassification"], "sliding_window": None}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 10, "sliding_window": 16}
_PIECES: dict[str, Any] = {
    "pieces": True,
    "special": ("<unk>", "<s>", "</s>"),
    "settings": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "adds_bos": True,
}
_IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_GEMMA_PIECES: dict[str, Any] = {
    "pieces": True,
    "opening": "",
    "special": ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    "settings": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "adds_bos": True,
}
FAMILIES = {
    "llama2": Family(LLAMA2, _LLAMA, **_PIECES),
    # As reward models are often made of models without a pad token: what ends a reply is not read.
    "llama2_pad_is_eos": Family(LLAMA2, {**_LLAMA, "pad_token_id": 2}, **_PIECES),
    "mistral": Family(MISTRAL, _MISTRAL, **_PIECES),
    "mistral_spaced": Family(MISTRAL_SPACED, _MISTRAL, **_PIECES),
    "mistral3": Family(
        MISTRAL3, {**_MISTRAL, "pad_token_id": 2}, **{**_PIECES, "special": (*_PIECES["special"], "[INST]", "[/INST]")}
    ),
    "llama3": Family(
        LLAMA3,
        {**_LLAMA, "pad_token_id": 1},
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"},
        adds_bos=True,
    ),
    "smollm2": Family(
        SMOLLM2,
        {**_LLAMA, "pad_token_id": 2},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        settings={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "qwen2.5": Family(
        QWEN25,
        {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"], "pad_token_id": 0},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        settings=_IM,
    ),
    "qwen3": Family(
        QWEN3,
        {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"], "head_dim": 8, "pad_token_id": 0},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        settings=_IM,
    ),
    "gemma2": Family(
        GEMMA2,
        {"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"], **_GEMMA},
        **_GEMMA_PIECES,
    ),
    "gemma3": Family(
        GEMMA3,
        {"model_type": "gemma3_text", "architectures": ["Gemma3TextForSequenceClassification"], **_GEMMA},
        **_GEMMA_PIECES,
    ),
}
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
_WORD = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
"""Of Llama 3, and Qwen's but for the digits: two new lines before a word are one token."""
_MERGES = ("t h", "th e", "i n", "e r", "o n", "r e", "{} t", "{} a", "{} the", "{} {}", "{} H", "{} [", "{}H i")
"""Of pieces, with {} for how a space is written."""


def tokenizer(family: Family) -> tokenizers.Tokenizer:
    space = "▁" if family.pieces else "Ġ"
    merges = [tuple(merge.format(*[space] * 2).split(" ")) for merge in _MERGES]
    merges += [("\n", "\n")] if family.pieces else [("Ċ", "Ċ"), (".", "Ċ")]
    if family.pieces:
        letters = ["▁", "\n", *map(chr, range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*family.special, *letters, *map("".join, merges)])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if family.pieces:
        made = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if family.opening else spaces
        stripped = [decoders.Strip(" ", 1, 0)] if family.opening else []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
        made.decoder = decoders.Sequence(steps)
    else:
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        words = pre_tokenizers.Split(tokenizers.Regex(_WORD), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in family.special])
    made.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    if family.adds_bos:
        # What would double the BOS that the template writes.
        bos = family.settings["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made


def write(folder: Path, name: str, shapes: dict[str, Sequence[int]]) -> Path:
    """The directory of a family's classifier, with tensors of these shapes."""
    family = FAMILIES[name]
    made = tokenizer(family)
    config = {**_SIZES, **family.config, "vocab_size": made.get_vocab_size() + 3}
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **family.settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(family.template)
    (folder / "config.json").write_text(json.dumps(config))
    if shapes:
        tensors = {key: cases.tensor(key, tuple(shape), config) for key, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def read() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "chats.json").read_text())
