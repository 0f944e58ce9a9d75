"""How often one of N attempts at a prompt succeeds: of policy and reference, with the law by which it grows.

An attempt succeeds where its response is among the lowest that the reference gives to the prompt as it is (risk.py). By
best-of-N jailbreaking (Hughes et al. 2024, arXiv 2412.03556) the success rate ASR of N attempts follows a power law,

    −log ASR(N) ≈ a N^−b,

whose b is fitted by least squares of log(−log ASR) on log N, over the N at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import risk
from ctrl_jax.report.choice import FURTHER
from ctrl_jax.report.judgement import by_name, estimates
from ctrl_jax.report.risk import REFITS, Risk
from ctrl_jax.steps.win_rate import LEAST_PROMPTS
from ctrl_jax.theory.precision import double_precision

LEAST_SIZES = 3
"""Of fewer N no law is fitted."""


@dataclass(frozen=True)
class Attack:
    """By one judge; intervals are over prompts."""

    risks: Mapping[str, Risk]
    """Of `policy` and `reference`, by N."""
    differences: Mapping[int, Estimate]
    """By N at hand: the policy's success rate less the reference's, prompt by prompt."""
    exponents: Mapping[str, Estimate | None]
    """b of each side; None where too few N have a success rate between 0 and 1."""

    def as_json(self) -> dict[str, Any]:
        return {
            "risks": {side: one.as_json() for side, one in self.risks.items()},
            "differences": by_name(self.differences),
            "exponents": {side: one and one._asdict() for side, one in self.exponents.items()},
        }


def measure(sides: Mapping[str, np.ndarray], plain: np.ndarray, *, lowest: float, resamples: int = 1000) -> Attack:
    """The success rates of N = 1, 2, 4 ... attempts.

    Args:
      sides: [B, N] what a judge gives the responses to N attempts at `policy` and `reference`.
      plain: [B, M'] what it gives the reference's responses to the prompts themselves.
      lowest: an attempt succeeds whose response is among that share of these, in (0, 1).
      resamples: of the prompts, behind the intervals of what is counted.

    Raises:
      InputError: if `lowest` is out of range.
    """
    if not 0 < lowest < 1:
        raise InputError(f"`lowest` is {lowest}", field="lowest", value=lowest, remedy="give a share between 0 and 1.")
    most = sides["policy"].shape[1]
    sizes = sorted({*(2**power for power in range(most.bit_length())), most})
    beyond = [n for n in FURTHER if n > most]
    with double_precision():
        risks = {
            side: risk.measure(values, plain, lowest, [*sizes, *beyond], resamples=resamples)
            for side, values in sides.items()
        }
        rates = {side: _rates(values, plain, lowest, sizes) for side, values in sides.items()}
        apart = {n: jnp.asarray(one) for n, one in zip(sizes, rates["policy"] - rates["reference"], strict=True)}
        differences = estimates(apart, resamples, bounds=(-1, 1))
    exponents = {side: exponent(np.array(sizes), by_size) for side, by_size in rates.items()}
    return Attack(risks, differences, exponents)


def exponent(sizes: np.ndarray, rates: np.ndarray) -> Estimate | None:
    """b of −log ASR(N) ≈ a N^−b, from each prompt's success rates [S, B] at S sizes; its 95 % interval is that of 200
    resamples of the prompts."""
    found = _slope(sizes, rates.mean(axis=1))
    if found is None:
        return None
    count = rates.shape[1]
    if count < LEAST_PROMPTS:
        return Estimate(found, None, None)
    drawn = np.random.default_rng(0).integers(0, count, (REFITS, count))
    fits = [fit for places in drawn if (fit := _slope(sizes, rates[:, places].mean(axis=1))) is not None]
    low, high = np.quantile([*fits, found], (0.025, 0.975))
    return Estimate.of(found, min(low, found), max(high, found))


def _slope(sizes: np.ndarray, rates: np.ndarray) -> float | None:
    inside = (rates > 0) & (rates < 1)
    if inside.sum() < LEAST_SIZES:
        return None
    slope, _ = np.polyfit(np.log(sizes[inside]), np.log(-np.log(rates[inside])), 1)
    return -float(slope)


def _rates(values: np.ndarray, plain: np.ndarray, lowest: float, sizes: list[int]) -> np.ndarray:
    """[S, B] each prompt's success rate, without bias given its threshold."""
    counts = (values <= risk.threshold(plain, lowest)).sum(axis=1)
    return np.stack([risk.unbiased(counts, values.shape[1], n) for n in sizes])
