"""The reward of the lexicon of sentiment, which experiments/ ships."""

import math
import sys

import pytest

from ctrl_jax.data.conversations import Record, Turn
from ctrl_jax.errors import InputError
from ctrl_jax.rewards import function
from experiments.rewards import sentiment

NAME = "experiments.rewards.sentiment:compound"


def score(valences):
    """VADER's normalisation: s / √(s² + 15) of the sum of a text's valences."""
    total = sum(valences)
    return total / math.sqrt(total**2 + 15)


def test_scores_are_the_normalised_sums_of_the_lexicons_valences():
    lexicon = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer().lexicon
    texts = ["That is a good plan", "A terrible and awful day", "We met on a Monday", ""]
    words = [["good"], ["terrible", "awful"], [], []]
    expected = [score(lexicon[word] for word in of_text) for of_text in words]
    found = sentiment.compound([None] * 4, texts)
    assert found == pytest.approx(expected, abs=5e-5), "which are rounded to four digits"
    assert found[2] == found[3] == 0.0, "a tie"


def test_a_run_can_load_it_and_knows_the_version_of_the_lexicon():
    pytest.importorskip("vaderSentiment")
    loaded = function.load(NAME)
    assert loaded.call is sys.modules["experiments.rewards.sentiment"].compound
    assert loaded.sources["vaderSentiment"].startswith("vaderSentiment 3.")
    assert set(loaded.sources) == {NAME.split(":")[0], "vaderSentiment"}, "no code of ctrl_jax is part of its key"


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._analyzer.cache_clear()
    with pytest.raises(InputError, match="make setup EXTRA=sentiment"):
        function.rewards(sentiment.compound, NAME, [Record((Turn("user", "Hi"),))], [["Ho"]], [{}])
    sentiment._analyzer.cache_clear()
