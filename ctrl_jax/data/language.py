"""The language of the embedded dialogues: its prompts, the law of its replies, and the gold reward of any text.

A prompt is a topic, a form of request and a tail (a wish for a length). A reply has a latent level from 0 (useless,
rude; for harmless: complying) to 7 (excellent, kind; refusing with a better idea). The level shifts the law of every
part of the reply, and given the level the parts are independent: the opening says much about the rest, and every
later word adds something.

The gold reward is a closed form of the text, in nats: a difference of gold is the log-odds of a preference,

    P(a preferred to b | prompt) = sigmoid(gold(prompt, a) − gold(prompt, b))        (Bradley-Terry).
"""

import re
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np

from ctrl_jax.data.conversations import Turn, transcript
from ctrl_jax.data.phrases import GRADES, NUMBERS, SIDES, Side
from ctrl_jax.errors import InputError

LEVELS = 8

# The terms of the gold reward beside the parts' own weights.
MISSING_REQUIRED = -1.25
MISSING_OPTIONAL = -0.25
ITEM_FIT = 0.25
NUMBER_FIT = 0.25
OFF_TOPIC = 0.5
LENGTH = 0.5
STRAY_WORD = 0.15
REPEATED_PART = 0.4


def side_of(name: str) -> Side:
    """The side called `name`; InputError unless it is `helpful` or `harmless`."""
    if name not in SIDES:
        raise InputError(
            f"The dialogues have no side {name!r}",
            field="side",
            value=name,
            remedy=f"choose one of {', '.join(SIDES)}.",
        )
    return SIDES[name]


def as_prompt(request: str) -> str:
    """The request as a conversation's opening turn, in hh-rlhf's form, up to where the reply begins."""
    return transcript((Turn("user", request),))


def taste(text: str) -> float:
    """A fixed value in [−1, 1) for any text, from its CRC-32: the arbitrary constants of the gold reward."""
    return zlib.crc32(text.encode()) / 2**31 - 1


@dataclass(frozen=True)
class Request:
    """What a prompt asks for. None where its text is not of this language."""

    side: str
    topic: str | None
    form: str | None
    tail: int
    """Index in the side's tails; 0 is the empty one."""


def requests(side: str) -> Iterator[tuple[Request, str]]:
    """Every request of a side with its prompt, in a fixed order."""
    parts = side_of(side)
    for topic, (name, form), (i, tail) in product(parts.topics, parts.forms.items(), enumerate(parts.tails)):
        for template in form.templates:
            yield Request(side, topic, name, i), as_prompt(f"{template.format(topic=topic)} {tail.text}".rstrip())


@cache
def _known_requests() -> dict[str, Request]:
    return {prompt: request for side in SIDES for request, prompt in requests(side)}


@lru_cache(maxsize=4096)
def read_prompt(prompt: str) -> Request:
    """The request of a prompt. Unknown text keeps what can be found in it: its topic (the last named), and its tail."""
    known = _known_requests().get(prompt)
    if known is not None:
        return known
    text = " ".join(_words(prompt))
    found = [(text.rfind(topic.lower()), name, topic) for name, side in SIDES.items() for topic in side.topics]
    place, name, topic = max(found)
    tails = [i for i, tail in enumerate(SIDES[name].tails) if tail.text and " ".join(_words(tail.text)) in text]
    return Request(name, topic if place >= 0 else None, None, tails[-1] if tails else 0)


def ease(topic: str) -> float:
    """Shift of a topic's level, in levels: replies to some topics are worse on the whole."""
    return 0.75 * taste("ease " + topic)


def level_probabilities(topic: str) -> np.ndarray:
    """[LEVELS] law of a reply's level."""
    return _bell(LEVELS, (LEVELS - 1) / 2 + ease(topic), 1.5)


def _bell(size: int, centre: float, spread: float) -> np.ndarray:
    weights = np.exp(-0.5 * ((np.arange(size) - centre) / spread) ** 2)
    return weights / weights.sum()


def _cumulative(weights: np.ndarray) -> tuple[float, ...]:
    # Ends in exactly 1, so that bisect of a uniform in [0, 1) is always an index.
    total = np.cumsum(weights)
    return tuple((total / total[-1]).tolist())


@cache
def _level_law(topic: str) -> tuple[float, ...]:
    return _cumulative(level_probabilities(topic))


@cache
def _grade_law(spread: float, level: int) -> tuple[float, ...]:
    """Cumulative probabilities of a phrase's grade, the best first."""
    return _cumulative(_bell(GRADES, (GRADES - 1) * (1 - level / (LEVELS - 1)), spread))


@cache
def _number_law(best: int, level: int) -> tuple[float, ...]:
    distance = np.abs(np.arange(len(NUMBERS)) - best)
    return _cumulative(np.exp(-distance * (0.1 + 0.9 * level / (LEVELS - 1))))


def sample_reply(request: Request, rng: np.random.Generator, *, level: int | None = None) -> str:
    """A demonstration: a reply to the request, of the given level or of one drawn from the topic's law.

    Errors: InputError where the request has no topic of the dialogues.
    """
    side, topic = side_of(request.side), request.topic
    if topic is None:
        raise InputError(
            "A reply can only be drawn for a request with a topic of the dialogues; this one has none.",
            field="request",
            value=request,
            remedy="Draw the request with sample_request.",
        )
    # One call for all the uniforms that a reply can need: a thousand replies take a tenth of a second.
    uniform = iter(rng.random(1 + 9 * len(side.parts)).tolist()).__next__

    def choose(options: Sequence[str]) -> str:
        return options[int(uniform() * len(options))]

    if level is None:
        level = bisect(_level_law(topic), uniform())
    goodness = level / (LEVELS - 1)
    fitting = side.topics[topic]
    sentences = []
    for part in side.parts.values():
        if not part.required and uniform() >= side.tails[request.tail].presence:
            continue
        phrase = choose(part.phrases[bisect(_grade_law(part.spread, level), uniform())])
        off_topic = uniform() < 0.15 * (1 - goodness)
        fits = uniform() < 0.3 + 0.65 * goodness
        best = uniform() < 0.25
        sentences.append(
            phrase.format(
                topic=choose(tuple(side.topics)) if off_topic else topic,
                item=(fitting[0] if best else choose(fitting)) if fits else choose(_items(request.side)),
                number=NUMBERS[bisect(_number_law(best_number(topic), level), uniform())],
            )
        )
    return " ".join(sentences)


@cache
def _items(side: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for items in SIDES[side].topics.values() for item in items))


def best_number(topic: str) -> int:
    """Index in NUMBERS of the number that fits a topic."""
    return zlib.crc32(topic.encode()) % len(NUMBERS)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


@dataclass(frozen=True)
class _Reading:
    part: str
    value: float
    """From 1 (the best grade) to −1."""
    topic: str | None = None
    item: str | None = None
    number: int | None = None


@cache
def _phrase_book(side: str) -> tuple[dict[tuple[str, ...], _Reading], int]:
    """Every phrase with its slots filled, by its words; and the words of the longest one."""
    book: dict[tuple[str, ...], _Reading] = {}
    for name, part in SIDES[side].parts.items():
        for grade, phrases in enumerate(part.phrases):
            value = 1 - 2 * grade / (GRADES - 1)
            for phrase in phrases:
                for topic in SIDES[side].topics if "{topic}" in phrase else (None,):
                    for item in _items(side) if "{item}" in phrase else (None,):
                        for number in range(len(NUMBERS)) if "{number}" in phrase else (None,):
                            text = phrase.format(topic=topic, item=item, number=NUMBERS[number or 0])
                            book[tuple(_words(text))] = _Reading(name, value, topic, item, number)
    return book, max(map(len, book))


def _fit(reading: _Reading, topic: str, fitting: Sequence[str]) -> float:
    fit = 0.0
    if reading.item:
        fit += ITEM_FIT * (1 if reading.item == fitting[0] else 0.5 if reading.item in fitting else -0.5)
    if reading.number is not None:
        fit += NUMBER_FIT * max(-1, 1 - abs(reading.number - best_number(topic)) / 2)
    if reading.topic and reading.topic != topic:
        fit -= OFF_TOPIC
    return fit


def gold_offset(request: Request) -> float:
    """Added to the gold of every reply to a request: raw rewards of two prompts do not compare."""
    return 3 * taste(f"offset {request.topic} {request.form}")


def gold_scale(request: Request) -> float:
    """Multiplies the gold of every reply to a request, within [2/3, 3/2]."""
    return 1.5 ** taste(f"scale {request.topic} {request.form}")


def gold_reward(prompt: str, response: str) -> float:
    """The gold reward of any response, in nats of preference.

    gold = offset + scale · (Σ_part weight · value + fit − strays − repeats − length + style), with the request's offset
    and scale (`gold_offset`, `gold_scale`), where

    - the words of the response (lower case, without punctuation) are read from the left, each time the longest known
      phrase; a part has the value of its first phrase, from 1 (best grade) to −1, or MISSING_REQUIRED or
      MISSING_OPTIONAL; its weight is doubled where the request's form prefers it;
    - fit adds ITEM_FIT times the item's (1 the topic's best item, ½ another that fits, −½ one that does not),
      NUMBER_FIT times the number's (1 − ½ · its distance in NUMBERS from the topic's, at least −1), and takes
      OFF_TOPIC for another topic;
    - strays is STRAY_WORD for each word outside every phrase, repeats REPEATED_PART for each phrase of a part already
      read;
    - length is LENGTH · |words − w| / w, with w the words that the request's tail asks for;
    - style is the mean of `taste` over the words: with it, replies tie only if they have the same words.

    A prompt without a known topic has offset 0, scale 1 and no fit.
    """
    request = read_prompt(prompt)
    side = SIDES[request.side]
    book, longest = _phrase_book(request.side)
    fitting = side.topics[request.topic] if request.topic else ()
    words = _words(response)

    read: dict[str, _Reading] = {}
    total, start = 0.0, 0
    while start < len(words):
        for size in range(min(longest, len(words) - start), 0, -1):
            reading = book.get(tuple(words[start : start + size]))
            if reading is not None:
                break
        if reading is None:
            total -= STRAY_WORD
        elif reading.part in read:
            total -= REPEATED_PART
        else:
            read[reading.part] = reading
        start += size

    preferred = side.forms[request.form].prefers if request.form else None
    for name, part in side.parts.items():
        missing = MISSING_REQUIRED if part.required else MISSING_OPTIONAL
        value = read[name].value if name in read else missing
        total += part.weight * value * (2 if name == preferred else 1)
    if request.topic:
        total += sum(_fit(reading, request.topic, fitting) for reading in read.values())
    wanted = side.tails[request.tail].words
    total -= LENGTH * abs(len(words) - wanted) / wanted
    total += float(np.mean([taste(word) for word in words])) if words else 0.0
    return gold_offset(request) + gold_scale(request) * total if request.topic else total
