"""The nearest mixture: known procedures are found again from the counts of their picks' ranks."""

import numpy as np
import pytest

from ctrl_jax.theory import procedures
from ctrl_jax.theory.nearest import nearest
from ctrl_jax.theory.optimal import optimal_transform

GRID = (np.arange(2_000) + 0.5) / 2_000


def below(name: str, references: int, draws: int = 200_000) -> np.ndarray:
    """How many of the references are below a pick of the procedure's: ranks by their CDF, then counts."""
    fine = np.linspace(0, 1, 20_001)
    cdf = np.asarray(procedures.parse(name).rank_cdf(fine), np.float64)
    random = np.random.default_rng(0)
    ranks = np.interp(random.uniform(size=draws), cdf, fine)
    return random.binomial(references, ranks)


@pytest.mark.parametrize(
    ("name", "references"),
    [("sampling", 8), ("best_of_4", 8), ("worst_of_6", 8), ("sampling", 128), ("worst_of_6", 128), ("best_of_32", 128)],
)
def test_a_procedure_is_found_again_however_few_references_there_are(name, references):
    counts = below(name, references)
    found = nearest(counts, counts, references, most=64)
    exact, near = (np.asarray(one.rank_cdf(GRID)) for one in (procedures.parse(name), found.procedure))
    assert found.distance < 3e-3
    np.testing.assert_allclose(near, exact, atol=0.06 if references == 8 else 0.02)


def test_a_mixture_is_found_again_within_what_its_cdf_shows():
    name = "0.6*best_of_2+0.4*worst_of_8"
    counts = below(name, 64)
    found = nearest(counts, counts, 64, most=64)
    assert found.distance < 3e-3
    exact = np.asarray(procedures.parse(name).rank_cdf(GRID))
    np.testing.assert_allclose(np.asarray(found.procedure.rank_cdf(GRID)), exact, atol=0.02)
    assert procedures.parse(found.procedure.name) == found.procedure, "its name can be an option"


def test_what_is_none_of_the_candidates_has_nearly_their_transform():
    counts = below("soft_best_of_8(0.5)", 128)
    found = nearest(counts, counts, 128, most=64)
    assert found.distance < 0.02
    exact = optimal_transform(procedures.parse("soft_best_of_8(0.5)"), kl=0.6)
    near = optimal_transform(found.procedure, kl=0.6)
    assert near.policy.beta == pytest.approx(exact.policy.beta, rel=0.1)


@pytest.mark.parametrize("n", [1, 4])
def test_ties_are_spread_over_the_places_that_they_may_have(n):
    """Of a reward of two levels, half of the reference's responses each: a pick ties with all of its level."""
    random = np.random.default_rng(1)
    references = random.random((100_000, 16)) < 0.5
    picks = (random.random((100_000, n)) < 0.5).max(axis=1)
    low = np.where(picks, (~references).sum(axis=1), 0)
    high = np.where(picks, 16, (~references).sum(axis=1))
    found = nearest(low, high, 16, most=16)
    if n == 1:
        assert found.procedure.name == "sampling" and found.distance < 0.01
    else:
        # Best-of-4 has the higher level with 15/16: in ranks, uniform over the upper half.
        cdf = np.where(GRID < 0.5, GRID / 8, 1 / 16 + (GRID - 0.5) * 15 / 8)
        assert np.abs(np.asarray(found.procedure.rank_cdf(GRID)) - cdf).max() < 0.12
        assert not nearest(np.full(9, 8), np.full(9, 8), 16, most=16).is_near, "a rank that never varies"


def test_no_n_is_named_that_the_references_cannot_tell_or_the_run_cannot_judge():
    counts = below("best_of_32", 128)
    assert nearest(counts, counts, 128, most=8).procedure.num_samples <= 8
    few = np.full(1000, 6)
    assert nearest(few, few, 6, most=64).procedure.num_samples <= 6
