"""How friendly a reply sounds, by a lexicon of sentiment: a reward that needs no training and no download.

Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text"; the
package vaderSentiment, MIT licence (`make setup EXTRA=sentiment`).
"""

from functools import cache
from typing import Any


def compound(prompts: list[Any], responses: list[str]) -> list[float]:
    """VADER's compound score of each response, from -1 (hostile) to 1 (friendly); the prompts do not matter.

    The valences of a text's words, with rules for negation, emphasis and punctuation, add up to s, and the score is
    s / √(s² + 15), rounded to four digits. A text without a word of the lexicon has 0: such ties count ½ in a rank.

    Raises:
      ModuleNotFoundError: if vaderSentiment is not installed.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("vaderSentiment is not installed; run make setup EXTRA=sentiment") from error
    return SentimentIntensityAnalyzer()
