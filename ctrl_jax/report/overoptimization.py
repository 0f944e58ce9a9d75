"""Overoptimisation: how the reward that is trained on and the gold reward grow with the distance from the reference.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760) found that the gold reward's gain on the reference's mean follows, in
d = √KL,

    policies that are trained       R(d) = d (α − β log d),    highest at d* = exp(α / β − 1)

which is fitted to both rewards here, by least squares and to the policies of each seed apart, so that seeds show how
certain a peak is. Best-of-n of the reference, which needs no training, is at KL = log n − (n − 1) / n.
"""

import json
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

    def slope(self, kl: float) -> float:
        """dR/dd at a KL in nats above 0."""
        return self.alpha - self.beta - self.beta * math.log(kl) / 2

    def peak(self, low: float, high: float) -> float | None:
        """The KL between `low` and `high`, nats, where R is highest, if it falls beyond; None if there is none."""
        if not self.slope(low) >= 0 > self.slope(high):
            return None
        return math.exp(2 * (self.alpha / self.beta - 1))


class BestOf(NamedTuple):
    """Of the reference decoded with best-of-n by the proxy; no training."""

    kl: np.ndarray
    """[k] log n − (n − 1) / n, nats."""
    gains: Mapping[str, np.ndarray]
    """By judge, [k] the expected reward of the pick less that of one sample."""


class Gains(NamedTuple):
    """Of the policies of one method and one seed, in the order of their KL."""

    seed: int
    kl: np.ndarray
    """[n] nats per response."""
    gains: Mapping[str, np.ndarray]
    """By judge, [n] the mean reward less the reference's, in the reward's unit."""
    best_of: BestOf

    def law(self, judge: str) -> Law:
        return fit(self.kl, self.gains[judge])

    def peak(self, judge: str) -> float | None:
        """The KL of the law's peak, where that is within what was measured."""
        return self.law(judge).peak(float(self.kl[0]), float(self.kl[-1]))

    def told(self, judge: str) -> str:
        """The peak in nats, or `grows` or `falls`, which is what the law does at the highest KL where it has none."""
        if (peak := self.peak(judge)) is not None:
            return f"{peak:.2f}"
        return "grows" if self.law(judge).slope(float(self.kl[-1])) >= 0 else "falls"


class Method(NamedTuple):
    name: str
    reward: str
    """What its reward is made by, besides the reward model; empty where nothing is."""
    seeds: Sequence[Gains]

    def peak(self, judge: str) -> Estimate | None:
        """The geometric mean over seeds of the KL of the peak, with Student's 95 % interval; None where a seed has no
        peak within what was measured."""
        peaks = [seed.peak(judge) for seed in self.seeds]
        found = np.log([peak for peak in peaks if peak is not None])
        if len(found) < len(peaks):
            return None
        middle = float(found.mean())
        if len(found) == 1:
            return Estimate(math.exp(middle), None, None)
        half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
        return Estimate(*(math.exp(min(middle + shift, 700.0)) for shift in (0.0, -half, half)))

    def as_json(self) -> dict[str, Any]:
        seeds = [
            {
                "seed": seed.seed,
                **{judge: {**seed.law(judge)._asdict(), "peak_kl": seed.peak(judge)} for judge in JUDGES},
            }
            for seed in self.seeds
        ]
        over_seeds = {judge: self.peak(judge) for judge in JUDGES}
        peaks = {judge: None if peak is None else peak._asdict() for judge, peak in over_seeds.items()}
        return {"method": self.name, "seeds": seeds, "peak_kl": peaks}


def methods(runs: Iterable[tuple[str, Run]]) -> list[Method]:
    """The methods with at least `LEAST` policies of one seed that a gold reward judges, each with its seeds.

    Args:
      runs: each with what its method is called. Runs are of one method if they differ in its strength and in seeds
        alone.
    """
    found: dict[tuple[str, str], dict[int, list[Run]]] = {}
    for method, run in runs:
        if {"policy_gold", "reference_gold"} <= run.arrays.keys() and run.evaluation.kl.mean > 0:
            key = method, _all_but_strength_and_seed(run.config)
            found.setdefault(key, {}).setdefault(int(run.config["seed"]), []).append(run)
    made = []
    for (method, _), seeds in found.items():
        if gains := [_gains(seed, of_seed) for seed, of_seed in seeds.items() if len(of_seed) >= LEAST]:
            reward = made_by(next(iter(seeds.values()))[0].config)
            made.append(Method(", ".join(filter(None, (method, reward))), reward, gains))
    return made


def _all_but_strength_and_seed(config: Mapping[str, Any]) -> str:
    parts = {name: value for name, value in config.items() if name not in ("name", "seed", "policy", "contents")}
    parts["data"] = {name: value for name, value in config["data"].items() if name != "seed"}
    return json.dumps([parts, config["policy"].get("procedure")], sort_keys=True, default=str)


UNCHANGED = "smallest_calibrated"
"""What a combination of one reward is that leaves it as it is."""


def made_by(config: Mapping[str, Any]) -> str:
    """What makes a run's reward, besides its reward model."""
    members, combine = config.get("reward_model", {}).get("members", 1), config.get("combine", {})
    if "floors" in config.get("policy", {}):  # its other rewards are not made one with it
        combine = {}
    found = [f"{combine.get('ensemble', 'mean')} of {members}"] if members > 1 else []
    if combine.get("rewards") or combine.get("by", UNCHANGED) != UNCHANGED:
        found.append(str(combine["by"]))
    return ", ".join(found)


def _gains(seed: int, runs: Sequence[Run]) -> Gains:
    ordered = sorted(runs, key=lambda run: run.evaluation.kl.mean)

    def gain(of: str) -> np.ndarray:
        return np.array([run.arrays[f"policy_{of}"].mean() - run.arrays[f"reference_{of}"].mean() for run in ordered])

    kl = np.array([run.evaluation.kl.mean for run in ordered])
    return Gains(seed, kl, {"proxy": gain("rewards"), "gold": gain("gold")}, best_of(ordered[0]))


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
