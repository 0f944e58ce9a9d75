import numpy as np
import pytest

from benchmarks import gradient_signal


def test_signal_and_cosine_are_those_of_the_law_that_gradients_are_drawn_from():
    """g = mean + noise: signal |m|² / (|m|² + noise²), and the same along; of the opposite mean, and without noise."""
    random, mean, count = np.random.default_rng(0), np.ones(50), 400
    ctrl = mean + 7 * random.normal(size=(count, 50))
    gradients = {
        "CTRL": ctrl,
        "critic": mean + random.normal(size=(count, 50)),
        "wrong": -2 * np.tile(mean, (count, 1)),
    }
    rows = {name: (float(signal), float(along)) for name, signal, along in gradient_signal.signal(gradients, "CTRL")}
    assert rows["CTRL"] == pytest.approx((1 / 50, 1 / 50), abs=0.006)
    assert rows["critic"] == pytest.approx((1 / 2, 1 / 2), abs=0.06)
    assert rows["wrong"] == pytest.approx((1, 1), abs=0.1)
