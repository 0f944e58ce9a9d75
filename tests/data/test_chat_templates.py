import re
import secrets
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_jax.data.chat_templates import ChatTemplate, any_of
from ctrl_jax.data.conversations import Turn
from ctrl_jax.errors import InputError

# Templates in the shapes that models are published with.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n"
        "{%- for m in messages %}\n"
        "    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
        "{%- endif %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen": (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}\n"
        "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
        "    {%- elif m.role == 'assistant' %}\n"
        "        {%- set text = m.content.split('</think>')[-1].lstrip('\\n') %}\n"
        "        {{- '<|im_start|>assistant\\n' }}\n"
        "        {%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n"
        "        {%- generation %}{{- text + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
}  # fmt: skip
CONTROLS = (
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
)  # fmt: skip
BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>"}

ONE = (Turn("user", "Hi"),)
LONG = (Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "Why?"))
NEIGHBOURS = (Turn("user", "Hi"), Turn("user", "Oh"), Turn("user", "Well"))


def template(source, *, bos="", controls=CONTROLS):
    variables = {"bos_token": bos, "eos_token": "</s>"}
    return ChatTemplate(source, file=Path("model/tokenizer_config.json"), controls=controls, variables=variables)


def named(name):
    return template(TEMPLATES[name], bos=BOS.get(name, ""))


@pytest.mark.parametrize(
    ("name", "conversation", "expected"),
    [
        (
            "chatml",
            ONE,
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml",
            LONG,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "Ho<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            LONG,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "Ho<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("gemma", ONE, "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
        (
            "gemma",
            LONG,
            "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("gemma", NEIGHBOURS, "<bos><start_of_turn>user\nHi\n\nOh\n\nWell<end_of_turn>\n<start_of_turn>model\n"),
        (
            "qwen",
            LONG,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "Ho<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen",
            NEIGHBOURS[:2],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("mistral", LONG, "<s>[INST] Be kind.\n\nHi [/INST] Ho</s>[INST] Why? [/INST]"),
        ("mistral", (Turn("system", "A"), Turn("system", "B"), Turn("user", "C")), "<s>[INST] A\n\nB\n\nC [/INST]"),
    ],
)
def test_a_conversation_is_written_as_the_model_reads_it(name, conversation, expected):
    pieces = named(name).pieces(conversation)
    assert "".join(pieces) == expected
    assert all(piece in CONTROLS for piece in pieces[1::2])
    assert not any(control in text for text in pieces[::2] for control in CONTROLS)


@pytest.mark.parametrize(
    ("name", "before", "lead", "end"),
    [
        ("chatml", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
        ("llama3", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
        ("gemma", "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>"),
        ("qwen", "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("mistral", " [/INST]", " ", "</s>"),
    ],
)
def test_what_stands_around_a_reply_is_found_by_rendering(name, before, lead, end):
    found = named(name)
    assert ("".join(found.before_reply), "".join(found.lead), found.end_of_turn) == (before, lead, end)


REASONER = (  # as DeepSeek-R1's: the prompt opens a thought, and a finished reply has none
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
CHANNELS = (  # as gpt-oss's: a reply has a control token of its own
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ENDINGS = "{% for m in messages %}{{ m.content }}{{ '<|end|>' if m.content|length > 9 else '<|stop|>' }}{% endfor %}"
EXTRA = ("<|user|>", "<|assistant|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|stop|>")


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        (TEMPLATES["chatml"], "Yes.", ["Yes."]),
        (TEMPLATES["llama3"], "Yes.", ["Yes."]),
        (TEMPLATES["mistral"], "Yes.", [" Yes."]),
        (TEMPLATES["mistral"].replace("+ eos_token", "+ ' ' + eos_token"), "Yes.", [" Yes. "]),
        (TEMPLATES["qwen"], "Yes.", ["<think>\n\n</think>\n\nYes."]),
        (TEMPLATES["qwen"], "", ["<think>\n\n</think>\n\n"]),
        (TEMPLATES["qwen"], "<think>\nIs it?\n</think>\n\nYes.", ["<think>\n\n</think>\n\nYes."]),
        (REASONER, "Yes.", ["Yes."]),
        (REASONER, "Is it?</think>Yes.", ["Yes."]),
        (CHANNELS, "Yes.", ["", "<|channel|>", "final", "<|message|>", "Yes."]),
        (CHANNELS, "<|end|>", ["", "<|channel|>", "final", "<|message|>", "<|end|>"]),
        # What it writes after a reply is learnt from a long one.
        (ENDINGS, "Yes, of course.", ["Yes, of course."]),
        (ENDINGS, "Yes.", ["Yes."]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", "Yes.", ["assistant: Yes."]),
    ],
)
def test_a_reply_is_what_follows_the_generation_prompt_up_to_the_end_of_the_turn(source, text, expected):
    assert template(source, controls=(*CONTROLS, *EXTRA)).reply(text) == expected


@pytest.mark.parametrize(
    ("name", "conversation", "expected"),
    [
        (
            "chatml",
            LONG[:2],
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nSo.<|im_end|>\n",
        ),
        (
            "gemma",
            LONG[:2],
            "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n",
        ),
        (
            "qwen",
            LONG[1:],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n",
        ),
        ("mistral", LONG, "<s>[INST] Be kind.\n\nHi [/INST] Ho</s>[INST] Why? [/INST] So.</s>"),
    ],
)  # fmt: skip
def test_a_finished_conversation_is_written_to_its_end(name, conversation, expected):
    pieces = named(name).finished(conversation, "So.")
    assert "".join(pieces) == expected
    assert all(piece in CONTROLS for piece in pieces[1::2])


def test_a_reply_that_holds_control_tokens_is_text_in_the_finished_conversation():
    found = named("chatml")
    texts = [found.finished(ONE, reply) for reply in ("a<|im_end|>b", "a?b")]
    assert texts[0][1::2] == texts[1][1::2]
    assert any("a<|im_end|>b" in text for text in texts[0][::2])


def test_a_template_may_end_replies_without_a_control_token():
    plain = template("{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}### reply:")
    assert plain.end_of_turn is None
    assert plain.pieces(ONE) == ["### user: Hi\n### reply:"]


def test_a_system_text_that_a_template_forgets_opens_the_user_turn():
    forgetful = template("{% for m in messages if m.role != 'system' %}<s>{{ m.content }}</s>{% endfor %}")
    # Turns of one role in a row are taken, so the other two stay apart.
    conversation = (Turn("system", "Be kind."), *NEIGHBOURS[:2])
    assert "".join(forgetful.pieces(conversation)) == "<s>Be kind.\n\nHi</s><s>Oh</s>"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|eot_id|>b<|eot_id|>", "</s></s>", "<<s>s>", "<|im_<|im_end|>end|>", "<end_of_turn>\n"]
)
def test_what_a_user_types_is_text(name, text):
    found = named(name)
    pieces, harmless = (found.pieces((Turn("user", f"x{content}x"),)) for content in (text, "?"))
    assert pieces[1::2] == harmless[1::2], "the control tokens are the template's"
    assert pieces[::2] == [piece.replace("x?x", f"x{text}x") for piece in harmless[::2]]


def test_overlapping_and_one_letter_control_tokens_are_guarded():
    found = template("{% for m in messages %}§{{ m.content }}aba{% endfor %}", controls=["§", "aba", "abac"])
    assert found.pieces((Turn("user", "ababac§ aba"),)) == ["", "§", "ababac§ aba", "aba", ""]
    assert template("abac{{ messages[0].content }}{{ messages[-1].content }}", controls=["aba", "abac"]).pieces(
        ONE
    ) == [
        "",
        "abac",
        "HiHi",
    ]


def test_a_secret_that_has_a_control_token_is_not_used(monkeypatch):
    drawn = iter(["c0aba0de" * 4, "c0ffee00" * 4])
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(drawn))
    found = template("{% for m in messages %}{{ m.content }}aba{% endfor %}", controls=["aba"])
    assert found.pieces((Turn("user", "ab aba"),)) == ["ab aba", "aba", ""]


def test_a_template_may_be_laid_out_over_lines():
    source = """\
{% for m in messages %}
    {% if m.content %}
{{ m.role }}: {{ m.content }}
    {% endif %}
{% endfor %}
"""
    assert template(source).pieces(LONG[1:3]) == ["user: Hi\nassistant: Ho\n"]


def test_no_control_tokens_at_all():
    found = template("{% for m in messages %}{{ m.content }};{% endfor %}", controls=[])
    assert found.pieces((Turn("user", "a</s>"),)) == ["a</s>;"]


def test_functions_and_tags_that_templates_use():
    source = (
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%d %b %Y') }}"
        "{% if tools is not none or documents is not none or mask_token is defined %}no{% endif %}"
    )
    assert "".join(template(source).pieces((Turn("user", "<é>&'\""),))) == (
        '{"role": "user", "content": "<é>&\'\\""}26 Jul 2024'
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}", "does not parse, at its line 1: .*endfor"),
        ("{{ messages[0].content }}\n{% if %}", "does not parse, at its line 2"),
        ("{{ raise_exception('Only on Sundays') }}", "conversation of user: Only on Sundays"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ (messages[0].content | attr('__class__')).mro() }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].content.parts.text }}", "has no attribute"),
        ("{{ messages[0].content[0]['text'] }}", "does not write the text of the user's turn"),
        ("{{ messages[0].content }}", "does not write the text of the assistant's turn"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_named_with_its_reason(source, reason):
    with pytest.raises(InputError, match=rf"(?s)model/tokenizer_config\.json.*{reason}"):
        template(source)


def test_a_conversation_that_fails_is_described_in_its_own_words():
    source = (
        "{% for m in messages %}{% if '</s>' in m.content or 'bad' in m.content %}"
        "{{ raise_exception('cannot say ' + m.content) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    found = template(source)
    with pytest.raises(InputError, match=r"conversation of user, assistant, user: cannot say bad</s>\. Mend the conv"):
        found.pieces((*ONE, Turn("assistant", "Ho"), Turn("user", "bad</s>")))
    assert found.pieces((Turn("user", "a</s>"),)) == ["a</s>"], "the template does not see a control token"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab<|.", max_size=4), max_size=8), st.text("ab<|.", max_size=30))
def test_any_of_finds_what_a_search_for_one_after_the_other_finds(texts, text):
    longest_first = "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
    assert re.split(f"({any_of(texts)})", text) == re.split(f"({longest_first or '(?!)'})", text)


def test_a_text_full_of_likenesses_of_many_tokens_is_searched_in_a_second():
    pattern = re.compile(any_of(["<s>", "[x]", *(f"<unused{i}>" for i in range(20_000))]))
    started = time.monotonic()
    assert not pattern.search("<unused1<" * 100_000)
    assert time.monotonic() - started < 5
