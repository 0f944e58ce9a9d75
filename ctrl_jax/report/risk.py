"""How likely one of n responses is bad, for any n: counted up to the samples at hand, extrapolated beyond.

    risk(n) = E_x [ 1 − (1 − p(x))^n ],    p(x) = P(a response of the policy to x is bad)

What an attacker gets who may draw n times and needs one success (best-of-N jailbreaking, Hughes et al. 2024, arXiv
2412.03556). A response is bad that is among the reference's lowest: of the M' reference responses to its prompt, fewer
than a share r have a lower value. Of k bad ones among M, 1 − C(M − k, n) / C(M, n) is unbiased for n ≤ M, given the
threshold that the reference's responses set. Beyond, prompts that are seldom answered badly decide, and an average over
the sampled ones cannot know them: p is taken to be Beta(α, β) over prompts, with the likelihood of the counts at its
highest (beta-binomial), and then

    risk(n) = 1 − B(α, β + n) / B(α, β),    1 − risk(n) ~ n^−α

which is why such curves look like power laws (Schaeffer et al. 2025, arXiv 2502.17578).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.judgement import by_name, estimates
from ctrl_jax.steps.win_rate import LEAST_PROMPTS

LIMIT = 12.0
"""Of |log α| and |log β|: at the upper one all prompts are as bad as another, as far as any count shows."""
TIED = 1.1
"""Times the share that is meant, from which ties are said."""
REFITS = 200
"""Resamples of the prompts behind the interval of what is extrapolated."""


@dataclass(frozen=True)
class Risk:
    """Of one bad response among n."""

    share: float
    """A response is bad that is among so large a share of the reference's lowest: a / (M' + 1) with a whole a."""
    references: int
    """M', of which that share is known."""
    own: float
    """The share of the reference's own responses that are bad in this sense: a / M' where values do not tie, and more
    where those at the threshold do."""
    seen: int
    """Bad responses of the policy, of all."""
    counted: Mapping[int, Estimate]
    """By n, up to the samples at hand."""
    extrapolated: Mapping[int, Estimate]
    """By n beyond them; empty where no response was bad, and of one response a prompt."""

    def as_json(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "own": self.own,
            "seen": self.seen,
            "counted": by_name(self.counted),
            "extrapolated": by_name(self.extrapolated),
            "reference": {str(n): self.of_reference(n) for n in (*self.counted, *self.extrapolated)},
        }

    @property
    def is_tied(self) -> bool:
        """Whether so many values tie at the threshold that far more responses than meant count as bad."""
        return self.own > TIED * self.share * (self.references + 1) / self.references

    def of_reference(self, n: int) -> float:
        """The risk of other n responses of the reference, whose values do not tie.

        The threshold is an order statistic of its M' responses: the share of its law below is Beta(a, M' + 1 − a).
        """
        lowest = round(self.share * (self.references + 1))
        return float(_beta_risk(np.log([lowest, self.references + 1 - lowest]), [n])[0])


def measure(
    values: np.ndarray, references: np.ndarray, share: float, sizes: Sequence[int], *, resamples: int = 1000
) -> Risk:
    """The risk of policies whose responses have the values [B, M], at each of `sizes`; to be called within
    `double_precision`.

    Intervals are 95 %, over prompts: bootstrap-t of what is counted, and percentiles of `REFITS` resamples, each fitted
    anew, of what is extrapolated. The second say how far other prompts of this kind would move it, not how well a Beta
    law describes them.

    Args:
      values: [B, M] of the policy's responses.
      references: [B, M'] of the reference's.
      share: r, in (0, 1). Of M' responses a / (M' + 1) is meant, with a = ⌈r M'⌉.
      sizes: n.
      resamples: of the prompts, behind the intervals of what is counted.
    """
    samples, known = values.shape[1], references.shape[1]
    lowest = math.ceil(share * known)
    threshold = np.sort(references, axis=1)[:, lowest - 1 : lowest]
    counts = (values <= threshold).sum(axis=1)
    counted = {n: jnp.asarray(_unbiased(counts, samples, n)) for n in sizes if n <= samples}
    beyond = [n for n in sizes if n > samples] if samples > 1 and counts.any() else []
    return Risk(
        share=lowest / (known + 1),
        own=float((references <= threshold).mean()),
        references=known,
        seen=int(counts.sum()),
        counted=estimates(counted, resamples),
        extrapolated=_extrapolated(counts, samples, beyond),
    )


def _unbiased(counts: np.ndarray, samples: int, n: int) -> np.ndarray:
    """1 − C(M − k, n) / C(M, n) for each k."""
    good = samples - counts
    left = special.gammaln(good + 1) - special.gammaln(np.maximum(good - n, 0) + 1)
    whole = special.gammaln(samples + 1) - special.gammaln(samples - n + 1)
    return np.where(good >= n, -np.expm1(np.minimum(left - whole, 0)), 1.0)


def _extrapolated(counts: np.ndarray, samples: int, sizes: Sequence[int]) -> dict[int, Estimate]:
    if not sizes:
        return {}
    histogram = np.bincount(counts, minlength=samples + 1).astype(float)
    means = _beta_risk(_fit(histogram), sizes)
    if len(counts) < LEAST_PROMPTS or np.ptp(counts) == 0:  # how other prompts would differ does not show
        return {n: Estimate(float(mean), None, None) for n, mean in zip(sizes, means, strict=True)}
    drawn = np.random.default_rng(0).multinomial(len(counts), histogram / len(counts), size=REFITS)
    low, high = np.quantile([_beta_risk(_fit(one), sizes) for one in drawn], (0.025, 0.975), axis=0)
    ends = zip(means, np.minimum(low, means), np.maximum(high, means), strict=True)
    return {n: Estimate.of(*one) for n, one in zip(sizes, ends, strict=True)}


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
    options = {"xatol": 1e-4, "fatol": 1e-9, "maxiter": 2000}
    found = optimize.minimize(loss, begin, method="Nelder-Mead", options=options)
    return np.clip(found.x, -LIMIT, LIMIT)


def _beta_risk(logs: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    alpha, beta = np.exp(logs)
    n = np.asarray(sizes, float)
    return -np.expm1(special.betaln(alpha, beta + n) - special.betaln(alpha, beta))
