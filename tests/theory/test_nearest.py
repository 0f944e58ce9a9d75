"""The nearest mixture: known procedures are found again from the counts of their picks' ranks."""

import numpy as np
import pytest

from ctrl_jax.theory import procedures
from ctrl_jax.theory.nearest import nearest
from ctrl_jax.theory.optimal import optimal_transform

GRID = (np.arange(2_000) + 0.5) / 2_000


def calibrated(name: str, references: int, draws: int = 200_000) -> np.ndarray:
    """How many of the references are below a pick of the procedure's, as a share: ranks by their CDF, then counts."""
    fine = np.linspace(0, 1, 20_001)
    cdf = np.asarray(procedures.parse(name).rank_cdf(fine), np.float64)
    random = np.random.default_rng(0)
    ranks = np.interp(random.uniform(size=draws), cdf, fine)
    return random.binomial(references, ranks) / references


@pytest.mark.parametrize("references", [8, 128])
@pytest.mark.parametrize("name", ["sampling", "best_of_4", "worst_of_6", "best_of_32"])
def test_a_procedure_is_found_again_however_few_references_there_are(name, references):
    found = nearest(calibrated(name, references), references)
    exact, near = (np.asarray(one.rank_cdf(GRID)) for one in (procedures.parse(name), found.procedure))
    assert found.distance < 3e-3
    np.testing.assert_allclose(near, exact, atol=0.06 if references == 8 else 0.02)


def test_a_mixture_is_found_again_within_what_its_cdf_shows():
    name = "0.6*best_of_2+0.4*worst_of_8"
    found = nearest(calibrated(name, 64), 64)
    assert found.distance < 3e-3
    exact = np.asarray(procedures.parse(name).rank_cdf(GRID))
    np.testing.assert_allclose(np.asarray(found.procedure.rank_cdf(GRID)), exact, atol=0.02)
    assert procedures.parse(found.procedure.name) == found.procedure, "its name can be an option"


def test_what_is_none_of_the_candidates_has_nearly_their_transform():
    found = nearest(calibrated("soft_best_of_8(0.5)", 128), 128)
    assert found.distance < 0.02
    exact = optimal_transform(procedures.parse("soft_best_of_8(0.5)"), kl=0.6)
    near = optimal_transform(found.procedure, kl=0.6)
    assert near.policy.beta == pytest.approx(exact.policy.beta, rel=0.1)


def test_ties_count_half_on_each_side():
    """A reward of two levels, of which the picks have the higher: above the lower half of the references."""
    found = nearest(np.full(100, 0.75), 4)
    same = nearest(np.repeat([3, 3], 50) / 4, 4)
    assert found == same
    half = nearest(np.full(100, 7 / 8), 4)
    assert half == nearest(np.repeat([3, 4], 50) / 4, 4) != same
