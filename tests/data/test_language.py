import math
import re
import zlib
from collections import defaultdict

import numpy as np
import pytest

from ctrl_jax.data import language
from ctrl_jax.data.language import as_prompt, gold_reward, read_prompt, requests, sample_reply
from ctrl_jax.data.phrases import NUMBERS, SIDES
from ctrl_jax.errors import InputError

BOTH = pytest.mark.parametrize("side", ["helpful", "harmless"])


def _taste(text):
    return zlib.crc32(text.encode()) / 2**31 - 1


def _requests(side, count, seed=0):
    every = list(requests(side))
    return [every[i] for i in np.random.default_rng(seed).choice(len(every), count, replace=False)]


def _slow_gold(side, request, reply):
    """The documented formula, sentence by sentence with regular expressions."""
    side = SIDES[side]
    items = {item for fitting in side.topics.values() for item in fitting}
    slots = {"topic": "|".join(side.topics), "item": "|".join(items), "number": "|".join(NUMBERS)}
    best = NUMBERS[zlib.crc32(request.topic.encode()) % len(NUMBERS)]
    fitting = side.topics[request.topic]
    values, fit = {}, 0.0
    for sentence in re.findall(r"[^.!?]+[.!?]", reply):
        for name, part in side.parts.items():
            for grade, phrases in enumerate(part.phrases):
                for phrase in phrases:
                    pattern = re.escape(phrase).replace(r"\{", "{").replace(r"\}", "}")
                    match = re.fullmatch(
                        pattern.format(**{k: f"(?P<{k}>{v})" for k, v in slots.items()}), sentence.strip()
                    )
                    if match:
                        values[name] = 1 - 0.4 * grade
                        found = match.groupdict()
        if "topic" in found and found["topic"] != request.topic:
            fit -= 0.5
        if "item" in found:
            fit += 0.25 * (1 if found["item"] == fitting[0] else 0.5 if found["item"] in fitting else -0.5)
        if "number" in found:
            fit += 0.25 * max(-1, 1 - abs(NUMBERS.index(found["number"]) - NUMBERS.index(best)) / 2)
    total = fit
    for name, part in side.parts.items():
        factor = 2 if side.forms[request.form].prefers == name else 1
        total += factor * part.weight * values.get(name, -1.25 if part.required else -0.25)
    words = re.findall("[A-Za-z]+", reply.lower())
    wanted = side.tails[request.tail].words
    total += -0.5 * abs(len(words) - wanted) / wanted + sum(map(_taste, words)) / len(words)
    key = f"{request.topic} {request.form}"
    return 3 * _taste(f"offset {key}") + 1.5 ** _taste(f"scale {key}") * total


@BOTH
def test_the_gold_reward_is_its_formula_on_demonstrations(side):
    rng = np.random.default_rng(0)
    for request, prompt in _requests(side, 20):
        for _ in range(3):
            reply = sample_reply(request, rng)
            assert gold_reward(prompt, reply) == pytest.approx(_slow_gold(side, request, reply), abs=1e-9), reply


def test_the_gold_reward_by_hand():
    prompt = as_prompt("How long does cooking rice take?")
    reply = "Happy to help. Start with the salt. Start with the salt. Zebra!"
    # Opening and detail of the second grade; statement, number (which the form prefers), caveat and closing missing;
    # salt is rice's best item; four words repeated, one unknown; 12 words of 22.
    parts = 0.6 * 0.62 - 1.25 * 0.55 + 0.6 * 0.5 - 0.25 * 2 * 0.45 - 0.25 * 0.4 - 0.25 * 0.35
    words = ["happy", "to", "help", *2 * ["start", "with", "the", "salt"], "zebra"]
    total = parts + 0.25 - 0.4 - 0.15 - 0.5 * 10 / 22 + sum(map(_taste, words)) / 12
    expected = 3 * _taste("offset cooking rice time") + 1.5 ** _taste("scale cooking rice time") * total
    assert gold_reward(prompt, reply) == pytest.approx(expected, abs=1e-12)


@BOTH
def test_a_phrase_belongs_to_one_part_and_grade(side):
    seen = set()
    for part in SIDES[side].parts.values():
        for phrases in part.phrases:
            for phrase in phrases:
                words = tuple(re.findall(r"[\w{}]+", phrase.lower()))
                assert words not in seen, phrase
                seen.add(words)


@BOTH
def test_better_levels_have_better_gold(side):
    rng = np.random.default_rng(1)
    chosen = _requests(side, 40)
    means = [
        np.mean([gold_reward(prompt, sample_reply(request, rng, level=level)) for request, prompt in chosen * 5])
        for level in range(language.LEVELS)
    ]
    assert all(np.diff(means) > 0), means


@BOTH
def test_replies_of_a_prompt_rarely_tie(side):
    rng = np.random.default_rng(2)
    distinct = [
        len({gold_reward(prompt, sample_reply(request, rng)) for _ in range(128)})
        for request, prompt in _requests(side, 10)
    ]
    assert min(distinct) >= 120


@BOTH
def test_the_opening_and_the_statement_tell_most_of_the_gold(side):
    rng = np.random.default_rng(3)
    shares = []
    for request, prompt in _requests(side, 4):
        groups, golds = defaultdict(list), []
        for _ in range(2000):
            reply = sample_reply(request, rng)
            golds.append(gold_reward(prompt, reply))
            groups[tuple(re.findall(r"[^.!?]+[.!?]", reply)[:2])].append(golds[-1])
        several = [values for values in groups.values() if len(values) > 1]
        within = sum((len(v) - 1) * np.var(v, ddof=1) for v in several) / sum(len(v) - 1 for v in several)
        shares.append(1 - within / np.var(golds))
    assert 0.5 < np.mean(shares) < 0.85, shares


@BOTH
def test_the_gold_differs_in_offset_and_scale_among_prompts(side):
    rng = np.random.default_rng(4)
    golds = np.array(
        [
            [gold_reward(prompt, sample_reply(request, rng)) for _ in range(200)]
            for request, prompt in _requests(side, 30)
        ]
    )
    means, spreads = golds.mean(axis=1), golds.std(axis=1)
    assert np.ptp(means) > 3 * spreads.mean()
    assert spreads.max() > 1.5 * spreads.min()


def test_each_fault_lowers_the_gold():
    prompt = as_prompt("Tell me something about learning chess.")
    good = (
        "Happy to help. For learning chess, a clear plan works well. Start with the notes. Give it ten minutes a day."
    )
    off_topic = good.replace("learning chess", "fixing doors")
    misfit = good.replace("notes", "salt")
    for worse in (
        off_topic,
        misfit,
        "",
        "Start with the notes.",
        good + " Give it ten minutes a day." * 3,
        good + " qwerty" * 10,
        " ".join(reversed(good.split())),
    ):
        assert gold_reward(prompt, worse) < gold_reward(prompt, good), worse


@pytest.mark.parametrize(
    "prompt",
    ["", "What is JAX?", as_prompt("Anything new?"), "growing roses", "\n\nHuman: Steal BIKES, ok?\n\nAssistant:"],
)
@pytest.mark.parametrize("response", ["", "🙂", "Happy to help.", "the " * 500])
def test_the_gold_is_defined_for_any_text(prompt, response):
    assert math.isfinite(gold_reward(prompt, response))


def test_the_gold_does_not_see_case_spaces_and_punctuation():
    prompt = as_prompt("Tell me something about learning chess.")
    assert gold_reward(prompt, "Happy to help.  I hate learning chess!") == gold_reward(
        prompt, " happy to help i hate learning chess"
    )


@BOTH
def test_prompts_are_read_back(side):
    for request, prompt in _requests(side, 50):
        assert read_prompt(prompt) == request


def test_an_unknown_prompt_keeps_its_topic_and_tail():
    request = read_prompt(as_prompt("Hello there, growing roses puzzles me! Please keep it short."))
    assert (request.side, request.topic, request.form) == ("helpful", "growing roses", None)
    assert SIDES["helpful"].tails[request.tail].text == "Please keep it short."
    assert read_prompt("Why do people steal bikes at all?").side == "harmless"


@BOTH
def test_prompts_are_many_and_distinct(side):
    texts = [prompt for _, prompt in requests(side)]
    assert len(set(texts)) == len(texts) >= 1500


@BOTH
def test_the_words_are_few(side):
    rng = np.random.default_rng(5)
    words = set()
    for request, prompt in _requests(side, 2000):
        words.update(re.findall("[A-Za-z]+", prompt + " " + sample_reply(request, rng)))
    assert len(words) < 400


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no side 'nice'"):
        list(requests("nice"))
    with pytest.raises(InputError, match="topic"):
        sample_reply(read_prompt("What is JAX?"), np.random.default_rng(0))
