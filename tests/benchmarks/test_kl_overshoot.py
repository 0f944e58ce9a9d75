import numpy as np
import pytest

from benchmarks import kl_overshoot


def test_the_largest_mean_of_five_steps_counts():
    kl = np.array([0.0, 0.2, 0.4, 1.0, 0.6, 0.8, 0.2, 0.1])
    assert kl_overshoot.overshoot(kl, 0.5) == pytest.approx((0.2 + 0.4 + 1.0 + 0.6 + 0.8) / 5 / 0.5)


def test_of_fewer_steps_it_is_their_mean():
    assert kl_overshoot.overshoot(np.array([0.5, 1.5]), 0.5) == pytest.approx(2)


def test_an_experiment_that_draws_nothing_is_refused_by_name():
    with pytest.raises(SystemExit, match="dpo_helpful"):
        kl_overshoot.on_policy("dpo_helpful")
