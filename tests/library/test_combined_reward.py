"""Several rewards of texts as one, beside the definition on texts that the reference draws."""

import functools

import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.rewards import function

pytestmark = pytest.mark.usefixtures("compile_fast")

PROMPTS = ["What is 1 + 1?", [{"role": "user", "content": "Hello"}]]
DRAWN = {"references": 6, "max_length": 8}


def length(prompts, responses):
    return [float(len(text)) for text in responses]


def vowels(prompts, responses):
    return [
        1000.0 * sum(map(text.lower().count, "aeiou")) - 5 * len(str(p))
        for p, text in zip(prompts, responses, strict=True)
    ]


def test_a_response_is_ranked_among_the_references_own_to_its_prompt(model):
    asked, given = [PROMPTS[0], PROMPTS[1], PROMPTS[0]], ["aaaa", "xyz", ""]
    found = cj.combined_reward([length, vowels], reference=model, **DRAWN)(asked, given)
    texts = cj.generate(model, PROMPTS, num_samples=6, max_length=8)
    for place, (prompt, text) in enumerate(zip(asked, given, strict=True)):
        own = texts[PROMPTS.index(prompt)]
        ranks = []
        for reward in (length, vowels):
            (mine,), others = reward([prompt], [text]), reward([prompt] * 6, own)
            ranks.append(np.mean([(mine > other) + 0.5 * (mine == other) for other in others]))
        assert found[place] == pytest.approx(min(ranks), abs=1e-6)


def test_a_prompt_is_drawn_for_once(model, monkeypatch):
    drawn, generate = [], cj.generate

    def counted(model, prompts, **options):
        drawn.append(prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr("ctrl_jax.library.rewards.generate", counted)
    reward = cj.combined_reward([length, vowels], by="log_sigmoids(0.5)", reference=model, **DRAWN)
    first = reward(PROMPTS[:1], ["aa"])
    assert reward([*PROMPTS, PROMPTS[0]], ["aa", "bb", "aa"])[::2] == first * 2
    assert drawn == [PROMPTS[:1], PROMPTS[1:]]


def test_a_weighted_sum_needs_no_reference():
    assert cj.combined_reward([length, length], by="weighted_sum", weights=(1, -0.5))(["a"], ["four"]) == [2.0]


@pytest.mark.parametrize(
    ("rewards", "options", "match"),
    [
        ([length], {}, "give at least two"),
        ([length, vowels], {}, r"smallest_calibrated compares .*; give the model"),
        ([length, vowels], {"by": "weighted_sum", "weights": (1.0,)}, r"weights is \(1\.0,\), and there are 2 rewards"),
        ([length, vowels], {"by": "weighted_sum", "weights": (float("nan"), 1.0)}, "a finite number for each"),
        ([length, vowels], {"by": "product"}, "product"),
    ],
)
def test_what_makes_no_reward_is_refused(rewards, options, match):
    with pytest.raises(cj.InputError, match=match):
        cj.combined_reward(rewards, **options)


@pytest.mark.parametrize("returned", [[1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_a_part_that_returns_something_else_is_named(returned):
    broken = cj.combined_reward([length, lambda *_: returned], by="weighted_sum", weights=(1, 1))
    with pytest.raises(cj.InputError, match=r"rewards\[1\] returned an array of shape"):
        broken(["a", "b"], ["c", "d"])


def test_it_is_recognised_by_all_that_its_answers_depend_on(model):
    def known(*rewards, **options):
        return function.given(
            cj.combined_reward(rewards or (length, vowels), **{"reference": model, **DRAWN, **options})
        )

    def other(prompts, responses):
        return [0.0 for _ in responses]

    seen = [
        known(), known(length, other), known(by="log_sigmoids"), known(references=7), known(seed=1),
        known(by="weighted_sum", weights=(1, 2)), known(by="weighted_sum", weights=(1, 3)),
    ]  # fmt: skip
    assert len({str(one.sources) for one in seen}) == len(seen)
    assert known().sources == seen[0].sources


def test_a_part_without_a_source_is_named_by_the_whole():
    part = functools.partial(length)
    combined = cj.combined_reward([part, vowels], by="weighted_sum", weights=(1, 1))
    with pytest.raises(cj.InputError, match="has no Python source to recognise it by; give it a name"):
        function.given(combined)
    named = function.given(combined, "mine:both")
    assert named.name == "mine:both" and named.sources == {"source": "no source"}
