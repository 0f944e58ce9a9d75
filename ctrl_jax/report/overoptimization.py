"""Overoptimisation: how the reward that is trained on and the gold reward grow with the distance from the reference.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760, section 3.1) found that both follow, in d = √KL and measured as gains
on the reference's mean,

    policies that are trained       R(d) = d (α − β log d),    highest at d* = exp(α / β − 1)
    best-of-n of the reference      R(d) = d (α − β d),        at KL = log n − (n − 1) / n

Here they are fitted by least squares, to the policies of each seed apart, so that seeds show how certain a peak is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.measurements import Run
from ctrl_jax.steps import win_rate
from ctrl_jax.theory import procedures

LEAST = 4
"""Policies of one method and seed, to fit a law of two parameters to their gains."""
JUDGES = ("proxy", "gold")
"""The reward that is trained on, and the one that it stands for."""


class Law(NamedTuple):
    """R(d) = d (α − β log d)."""

    alpha: float
    beta: float
    alpha_error: float
    """Its standard error, from what the fit leaves over."""
    beta_error: float

    def gain(self, kl: np.ndarray) -> np.ndarray:
        """R at KLs in nats above 0, in the unit of the reward."""
        distance = np.sqrt(kl)
        return np.asarray(distance * (self.alpha - self.beta * np.log(distance)))

    @property
    def peak(self) -> float | None:
        """The KL where R is highest, nats; None where it grows for ever."""
        exponent = 2 * (self.alpha / self.beta - 1) if self.beta > 0 else math.inf
        return math.exp(exponent) if exponent < 700 else None


class Gains(NamedTuple):
    """Of the policies of one method and one seed, in the order of their KL."""

    seed: int
    kl: np.ndarray
    """[n] nats per response."""
    gains: Mapping[str, np.ndarray]
    """By judge, [n] the mean reward less the reference's, in the reward's unit."""

    def law(self, judge: str) -> Law:
        return fit(self.kl, self.gains[judge])

    def peak(self, judge: str) -> float | None:
        """The KL of the law's peak where that is within what was measured; None where the gain still grows there."""
        peak = self.law(judge).peak
        return peak if peak is not None and peak <= self.kl[-1] else None


class Method(NamedTuple):
    name: str
    seeds: Sequence[Gains]

    def peak(self, judge: str) -> Estimate | None:
        """The geometric mean over seeds of the KL of the peak, with Student's 95 % interval; None where a seed's gain
        has no peak within what was measured."""
        peaks = [seed.peak(judge) for seed in self.seeds]
        found = np.log([peak for peak in peaks if peak is not None])
        if len(found) < len(peaks):
            return None
        middle = float(found.mean())
        if len(found) == 1:
            return Estimate(math.exp(middle), None, None)
        half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
        return Estimate(*(math.exp(middle + shift) for shift in (0.0, -half, half)))


def methods(runs: Iterable[Run]) -> list[Method]:
    """The methods with at least `LEAST` policies of one seed that a gold reward judges, each with its seeds."""
    found: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        if {"policy_gold", "reference_gold"} <= run.arrays.keys() and run.evaluation.kl.mean > 0:
            found.setdefault(label(run.config), {}).setdefault(int(run.config["seed"]), []).append(run)
    made = {name: [_gains(seed, of) for seed, of in seeds.items() if len(of) >= LEAST] for name, seeds in found.items()}
    return [Method(name, seeds) for name, seeds in made.items() if seeds]


UNCHANGED = "smallest_calibrated"
"""What a combination of one reward is that leaves it as it is."""


def label(config: Mapping[str, Any]) -> str:
    """What a run is called here: its transform, and what else its reward is made by."""
    members, combine = config.get("reward_model", {}).get("members", 1), config.get("combine", {})
    made_by = [str(config["policy"]["transform"])]
    if members > 1:
        made_by.append(f"{combine.get('ensemble', 'mean')} of {members}")
    if combine.get("rewards") or combine.get("by", UNCHANGED) != UNCHANGED:
        made_by.append(str(combine["by"]))
    return ", ".join(made_by)


def _gains(seed: int, runs: Sequence[Run]) -> Gains:
    ordered = sorted(runs, key=lambda run: run.evaluation.kl.mean)
    return Gains(
        seed,
        np.array([run.evaluation.kl.mean for run in ordered]),
        {
            judge: np.array(
                [run.arrays[f"policy_{of}"].mean() - run.arrays[f"reference_{of}"].mean() for run in ordered]
            )
            for judge, of in zip(JUDGES, ("rewards", "gold"), strict=True)
        },
    )


def fit(kl: np.ndarray, gain: np.ndarray) -> Law:
    """The law R(d) = d (α − β log d) of gains [n] at KLs [n] in nats above 0, by least squares.

    Raises:
      ValueError: for fewer than three points, which leave nothing over to see an error by.
    """
    if len(kl) < 3:
        raise ValueError(f"A law of two parameters was asked for from {len(kl)} points; it needs 3.")
    distance = np.sqrt(kl)
    design = np.stack([distance, -distance * np.log(distance)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
    left = gain - design @ np.array([alpha, beta])
    covariance = left @ left / (len(kl) - 2) * np.linalg.pinv(design.T @ design)
    return Law(float(alpha), float(beta), *(float(error) for error in np.sqrt(np.diag(covariance))))


class BestOf(NamedTuple):
    """Of the reference decoded with best-of-n by the proxy; no training."""

    kl: np.ndarray
    """[k] log n − (n − 1) / n, nats."""
    gains: Mapping[str, np.ndarray]
    """By judge, [k] the expected reward of the pick less that of one sample."""


def references(runs: Iterable[Run]) -> dict[int, BestOf]:
    """Best-of-n of the reference that a gold reward judges, by seed."""
    found: dict[int, BestOf] = {}
    for run in runs:
        seed = int(run.config["seed"])
        if seed not in found and "reference_gold" in run.arrays:
            found[seed] = best_of(run)
    return found


def best_of(run: Run) -> BestOf:
    """Best-of-n of the reference's responses that the run was evaluated beside, n = 1, 2, 4, ... up to all M of them.

    Without bias: the mean over all subsets of n responses (win_rate.pick_probabilities).
    """
    rewards, gold = run.arrays["reference_rewards"], run.arrays["reference_gold"]
    counts = [2**power for power in range(int(math.log2(rewards.shape[1])) + 1)]
    gains: dict[str, list[float]] = {judge: [] for judge in JUDGES}
    for count in counts:
        picked = np.asarray(
            win_rate.pick_probabilities(jnp.asarray(rewards), procedures.parse(f"best_of_{count}")), np.float64
        )
        for judge, values in zip(JUDGES, (rewards, gold), strict=True):
            gains[judge].append(float((picked * values).sum(axis=-1).mean() - values.mean()))
    kl = [math.log(count) - (count - 1) / count for count in counts]
    return BestOf(np.array(kl), {judge: np.array(found) for judge, found in gains.items()})
