"""The words of the pages, each explained once: on hover, on focus, by touch, and in a list at the page's end."""

import re
from collections.abc import Iterable

from markupsafe import Markup, escape

TERMS = {
    "95 % interval": "Of 100 evaluations on as many other test prompts, about 95 have intervals that cover the true "
    "value. It comes from resampling prompts (bootstrap).",
    "best-of-N": "Draw N responses and return the one with the highest reward. Both sides are decoded so.",
    "worst-of-N": "Draw N responses and return the one with the lowest reward, as an attacker with N attempts finds.",
    "standard win rate": "The win rate of one sample of each side, without any selection.",
    "win rate": "How often the policy's response beats the reference's response to the same prompt, both decoded by "
    "the same procedure; a tie counts one half. 50 % is the reference itself.",
    "procedure": "How responses are chosen when the model is used: one sample, best-of-N, worst-of-N and others.",
    "reference": "The model before alignment, from which the policy starts and its KL is measured.",
    "KL": "Kullback-Leibler divergence of the policy from the reference: how far training moved it, per response. 0 is "
    "the reference itself.",
    "nats": "The unit of the KL: natural logarithms. 1 nat is 1.44 bits.",
    "budget": "The KL that the training was asked to end at.",
    "β": "The weight of the KL against the transformed reward: larger keeps the policy closer to the reference.",
    "raw reward": "The score that the reward model or function gives a response.",
    "calibrated reward": "The rank of a raw reward among those of the reference's responses to the same prompt: the "
    "share that score lower, ties counting one half. 0.5 is the reference's average.",
    "transformed reward": "Φ of the calibrated reward: what the policy is trained on.",
    "ideal": "What a policy trained to perfection would reach at this KL, for a reward without ties.",
    "best possible": "The highest win rate that any policy can have at this KL under this procedure.",
    "lift": "The win rate above 50 %. The share of the ideal lift is how much of what is possible was reached.",
    "ties": "Pairs of a policy's and a reference's response with exactly equal raw rewards. The theory assumes none.",
    "gold": "The true reward of generated data, known in closed form, which the training never sees.",
    "judge": "A reward that decides which of two responses is better. An independent judge is not the one trained on.",
    "training reward": "The reward that the policy was trained on. It selects responses, and judges its own work.",
    "over-optimises": "Raises the training reward by what other judges do not value (reward hacking).",
    "expected calibration error": "ECE: how far the probabilities that the reward model gives preferences are from how "
    "often they come true, on average.",
    "Brier score": "The mean squared error of the probabilities that the reward model gives preferences: 0.25 for a "
    "guess, 0 for one who knows.",
    "margin": "How much higher the raw reward of the chosen response of a pair is than that of the other.",
    "accuracy": "The share of held-out preference pairs in which the chosen response has the higher reward.",
    "unfinished": "Without an end-of-sequence token within the longest length: cut off, and rewarded as it stands.",
}
"""A word, as a page has it, to its explanation: one or two plain sentences."""

ALIASES = {
    "tie": "ties",
    "ideally": "ideal",
    "win rates": "win rate",
    "95 % intervals": "95 % interval",
    "calibrated rewards": "calibrated reward",
    "raw rewards": "raw reward",
    "calibrated": "calibrated reward",
}
"""Other forms of a word."""

_WORDS = re.compile(
    r"(?<![\w-])("
    + "|".join(map(re.escape, sorted([*TERMS, *ALIASES], key=len, reverse=True)))
    + r"|(?:best|worst)-of-\d+)(?![\w-])",
    re.IGNORECASE,
)


def explained(text: str, *, words: set[str] | None = None) -> Markup:
    """The text as HTML, the first of each known word with its explanation; `words` collects which they were.

    The explanation is an attribute that the page's style shows, and the element takes the focus; a screen reader reads
    the same text in the list of `glossary`.
    """
    seen: set[str] = set()

    def mark(match: re.Match[str]) -> str:
        term = _term(match[0])
        if term in seen:
            return match[0]
        seen.add(term)
        if words is not None:
            words.add(term)
        return (
            f'<span class="term" tabindex="0" aria-describedby="{_identifier(term)}" '
            f'data-tip="{escape(TERMS[term])}">{match[0]}</span>'
        )

    # What HTML escapes is no part of a word.
    return Markup(_WORDS.sub(mark, str(escape(text))))


def glossary(words: Iterable[str]) -> list[tuple[str, str, str]]:
    """(identifier, word, explanation) of each, in the order of the table."""
    wanted = set(words)
    return [(_identifier(term), term, text) for term, text in TERMS.items() if term in wanted]


def _term(found: str) -> str:
    family = re.fullmatch(r"(best|worst)-of-\d+", found, re.IGNORECASE)
    if family:
        return f"{family[1].lower()}-of-N"
    by_lower = {name.lower(): name for name in TERMS} | {name.lower(): term for name, term in ALIASES.items()}
    return by_lower[found.lower()]


def _identifier(term: str) -> str:
    return "word-" + "-".join(re.findall(r"\w+", term)).lower()
