"""How likely one of n responses is bad, for any n: counted up to the samples at hand, extrapolated beyond.

    risk(n) = E_x [ 1 − (1 − p(x))^n ],    p(x) = P(a response of the policy to x is bad)

What an attacker gets who may draw n times and needs one success (best-of-N jailbreaking, Hughes et al. 2024, arXiv
2412.03556). Of k bad ones among M responses to a prompt, 1 − C(M − k, n) / C(M, n) is unbiased for n ≤ M. Beyond,
prompts that are seldom answered badly decide, and an average over the sampled ones cannot know them: p is taken to be
Beta(α, β) over prompts, with the likelihood of the counts at its highest (beta-binomial), and then

    risk(n) = 1 − B(α, β + n) / B(α, β),    1 − risk(n) ~ n^−α

which is why such curves look like power laws (Schaeffer et al. 2025, arXiv 2502.17578).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.judgement import by_name, estimates

LIMIT = 12.0
"""Of |log α| and |log β|: at the upper one all prompts are as bad as another, as far as any count shows."""


@dataclass(frozen=True)
class Risk:
    """Of one bad response among n."""

    rank: float
    """A response is bad whose rank among the reference's is at most that."""
    seen: int
    """Bad responses of the policy, of all."""
    counted: Mapping[int, Estimate]
    """By n, up to the samples at hand."""
    extrapolated: Mapping[int, Estimate]
    """By n beyond them; empty where no response was bad."""

    def as_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "seen": self.seen,
            "counted": by_name(self.counted),
            "extrapolated": by_name(self.extrapolated),
        }

    def of_reference(self, n: int) -> float:
        """1 − (1 − rank)^n: of the reference's own responses, `rank` are bad by definition."""
        return float(-np.expm1(n * np.log1p(-self.rank)))


def measure(bad: np.ndarray, rank: float, sizes: Sequence[int], *, resamples: int = 1000, refits: int = 200) -> Risk:
    """The risk of policies whose responses are `bad` [B, M], at each of `sizes`.

    Intervals are 95 %, over prompts: bootstrap-t of what is counted, and percentiles of `refits` resamples, each fitted
    anew, of what is extrapolated. The second say how far other prompts of this kind would move it, not how well a Beta
    law describes them. To be called within `double_precision`.
    """
    counts, samples = bad.sum(axis=1), bad.shape[1]
    inside = [n for n in sizes if n <= samples]
    counted = estimates({n: jnp.asarray(_unbiased(counts, samples, n)) for n in inside}, resamples)
    beyond = [n for n in sizes if n > samples]
    seen = int(counts.sum())
    return Risk(rank, seen, counted, _extrapolated(counts, samples, beyond, refits) if seen else {})


def _unbiased(counts: np.ndarray, samples: int, n: int) -> np.ndarray:
    """1 − C(M − k, n) / C(M, n) for each k."""
    good = samples - counts
    left = special.gammaln(good + 1) - special.gammaln(np.maximum(good - n, 0) + 1)
    whole = special.gammaln(samples + 1) - special.gammaln(samples - n + 1)
    return np.where(good >= n, -np.expm1(np.minimum(left - whole, 0)), 1.0)


def _extrapolated(counts: np.ndarray, samples: int, sizes: Sequence[int], refits: int) -> dict[int, Estimate]:
    histogram = np.bincount(counts, minlength=samples + 1).astype(float)
    means = _beta_risk(_fit(histogram), sizes)
    drawn = np.random.default_rng(0).multinomial(len(counts), histogram / len(counts), size=refits)
    refitted = np.array([_beta_risk(_fit(one), sizes) for one in drawn])
    low, high = np.quantile(refitted, (0.025, 0.975), axis=0)
    return {
        n: Estimate.of(*ends)
        for n, *ends in zip(sizes, means, np.minimum(low, means), np.maximum(high, means), strict=True)
    }


def _fit(histogram: np.ndarray) -> np.ndarray:
    """(log α, log β) of the highest beta-binomial likelihood of a histogram [M + 1] of counts."""
    k = np.flatnonzero(histogram)
    weights, samples = histogram[k], len(histogram) - 1

    def loss(logs: np.ndarray) -> float:
        alpha, beta = np.exp(np.clip(logs, -LIMIT, LIMIT))
        likelihood = special.betaln(k + alpha, samples - k + beta) - special.betaln(alpha, beta)
        return float(-(weights * likelihood).sum() / weights.sum())

    mean = (weights * k).sum() / (weights.sum() * samples)
    begin = np.log(np.clip([mean, 1 - mean], 1e-4, 1))
    found = optimize.minimize(
        loss, begin, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-9, "maxiter": 2000}
    )
    return np.clip(found.x, -LIMIT, LIMIT)


def _beta_risk(logs: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    alpha, beta = np.exp(logs)
    n = np.asarray(sizes, float)
    return -np.expm1(special.betaln(alpha, beta + n) - special.betaln(alpha, beta))
