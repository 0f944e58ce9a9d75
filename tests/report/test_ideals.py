import dataclasses
from typing import Any

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.report import ideals
from ctrl_jax.report.charts import headline
from ctrl_jax.report.measurements import Run
from ctrl_jax.theory import ideal
from tests.report.drawing import drawn


@pytest.mark.parametrize(
    ("transform", "procedure", "expected"),
    [
        ("identity", "best_of_4", 0.8770),
        ("exponential(10)", "best_of_4", 0.9351),
        ("exponential(-10)", "worst_of_4", 0.9927),
    ],
)
def test_ideal_curves_start_at_one_half_and_meet_the_known_values(
    transform: str, procedure: str, expected: float
) -> None:
    # Inference-time win rates at 1 nat, from the integrals of the ideal continuous model.
    curve = ideals.win_rates(transform, procedure, np.array([0.0, 1.0]))
    np.testing.assert_allclose(curve, [0.5, expected], atol=1e-3)


def test_the_optimal_curve_is_above_all_others_and_a_raw_reward_has_none() -> None:
    kls = np.array([0.2, 0.8])
    best = ideals.win_rates("optimal", "best_of_4", kls)
    assert (best >= ideals.win_rates("exponential(10)", "best_of_4", kls) - 1e-6).all()
    assert np.isnan(ideals.win_rates("raw", "best_of_4", kls)).all()


def test_a_kl_out_of_reach_leaves_a_gap(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    at_kl = ideal.at_kl

    def reaches_one_nat(phi: Any, kl: float) -> Any:
        if kl > 1:
            raise InputError("out of reach")
        return at_kl(phi, kl)

    monkeypatch.setattr(ideal, "at_kl", reaches_one_nat)
    ideals.policy.cache_clear()
    curve = ideals.win_rates("exponential(10)", "best_of_4", np.array([0.5, 1.5]))
    assert np.isfinite(curve[0]) and np.isnan(curve[1])
    far = dataclasses.replace(run.evaluation, kl=run.evaluation.kl._replace(mean=2.0, high=2.1))
    for panel in headline(dataclasses.replace(run, evaluation=far)):
        drawn(panel)
    ideals.policy.cache_clear()
