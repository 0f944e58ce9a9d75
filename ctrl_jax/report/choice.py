"""Which N to serve a policy with: what best-of-N wins, where it turns down, what N responses risk, when to stop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import risk
from ctrl_jax.report.judgement import Sides, by_name, checked, estimates, has_judge, won, won_by_judge
from ctrl_jax.report.risk import Risk
from ctrl_jax.steps import early_stop
from ctrl_jax.theory.precision import double_precision
from ctrl_jax.theory.procedures import BestOfN, Sampling

ROUNDING = 1e-12
"""Win rates that are apart by no more are equal."""
FURTHER = (100, 1_000, 10_000)
"""Responses beyond those at hand whose risk is extrapolated."""


@dataclass(frozen=True)
class EarlyStop:
    """To draw until a response is among the reference's best (steps/early_stop.py), or all are drawn that there are."""

    share: float
    """Of the reference's responses, how many are as good as what ends it: a / M' for the a highest of M' − 1."""
    win_rate: Estimate
    judge_win_rate: Estimate | None
    draws: Estimate
    """The responses that are drawn, in the mean."""

    @property
    def deciding(self) -> Estimate:
        """The judge's win rate, where there is one."""
        return self.judge_win_rate or self.win_rate

    def as_json(self) -> dict[str, Any]:
        judged = None if self.judge_win_rate is None else self.judge_win_rate._asdict()
        return {
            "share": self.share,
            "win_rate": self.win_rate._asdict(),
            "judge_win_rate": judged,
            "draws": self.draws._asdict(),
        }


@dataclass(frozen=True)
class Choice:
    """What serving a policy with best-of-N buys, against a single response of the reference; intervals are over
    prompts."""

    prompts: int
    win_rates: Mapping[int, Estimate]
    """By N: how often the best of N of the policy's responses beats one of the reference's."""
    judge_win_rates: Mapping[int, Estimate]
    """What the judge says of the same picks; empty without one."""
    within: float
    best: int
    """The N of the highest win rate: by the judge, where there is one."""
    cheapest: int
    """The least N whose win rate is at most `within` below that."""
    decline: Estimate | None
    """What the win rate loses from the best N to the largest, on the same prompts; None where the largest is the best.
    Its interval is as wide as a choice among so many N asks for: 1 − .05 / (their number − 1) (Bonferroni)."""
    risk: Risk
    """That one of n responses is among the reference's lowest: by the judge, where there is one."""
    early_stops: tuple[EarlyStop, ...]
    """From the most draws to the fewest."""

    @property
    def early_stop(self) -> EarlyStop | None:
        """The one with the fewest draws whose win rate is at most `within` below the best, as the cheapest N's is; None
        where it takes no fewer than that N."""
        wanted = (self.judge_win_rates or self.win_rates)[self.best].mean - self.within
        enough = [one for one in self.early_stops if one.deciding.mean >= wanted and one.draws.mean < self.cheapest]
        return min(enough, key=lambda one: one.draws.mean, default=None)

    @property
    def turns_down(self) -> bool:
        """As far as the interval shows."""
        return self.decline is not None and self.decline.low is not None and self.decline.low > 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "win_rates": by_name(self.win_rates),
            "judge_win_rates": by_name(self.judge_win_rates),
            "within": self.within,
            "best": self.best,
            "cheapest": self.cheapest,
            "decline": None if self.decline is None else self.decline._asdict(),
            "turns_down": self.turns_down,
            "risk": self.risk.as_json(),
            "early_stops": [one.as_json() for one in self.early_stops],
            "early_stop": None if self.early_stop is None else self.early_stop.as_json(),
        }


def choose_n(
    policy_rewards: ArrayLike,
    reference_rewards: ArrayLike,
    *,
    policy_judged: ArrayLike | None = None,
    reference_judged: ArrayLike | None = None,
    within: float = 0.01,
    lowest: float = 0.05,
    resamples: int = 1000,
) -> Choice:
    """What best-of-N of a policy wins over N, and which N is enough.

    Win rates are against one response of the reference, so that what they gain from N is what N buys; they are unbiased
    (steps/win_rate.py). The rewards pick; where there is a judge, it decides who wins, and where more samples only find
    what fools the rewards, its win rate turns down (Gao et al. 2023, arXiv 2210.10760). Beside it stands the risk that
    one of n responses is among the reference's lowest (report/risk.py), which is extrapolated to n = 10,000; and what
    is won with how many draws where drawing stops at a response that is good enough (steps/early_stop.py).

    Args:
      policy_rewards: [B, M] of the policy's responses to B prompts; N goes up to M.
      reference_rewards: [B, M'] of the reference's responses to the same prompts.
      policy_judged: [B, M] of a judge; with `reference_judged`.
      reference_judged: [B, M'].
      within: of the best win rate, for the cheapest N.
      lowest: a response is bad that is among that share of the reference's lowest, in (0, 1).
      resamples: of the prompts, behind the intervals; what is extrapolated has 200.

    Raises:
      InputError: if shapes do not fit, or a number is not finite or out of range.
    """
    check_shares(within, lowest)
    sides = checked(policy_rewards, reference_rewards, policy_judged, reference_judged)
    sizes = _sizes(sides.policy_rewards.shape[1])
    with double_precision():
        by_reward = {n: won(sides, BestOfN(n), Sampling()) for n in sizes}
        by_judge = {n: won_by_judge(sides, BestOfN(n), Sampling()) for n in sizes if has_judge(sides)}
        deciding = by_judge or by_reward
        means = {n: float(per_prompt.mean()) for n, per_prompt in deciding.items()}
        best = next(n for n in sizes if means[n] >= max(means.values()) - ROUNDING)
        lost = deciding[best] - deciding[sizes[-1]]
        ours, theirs = sides.policy_rewards, sides.reference_rewards
        if sides.policy_judged is not None and sides.reference_judged is not None:
            ours, theirs = sides.policy_judged, sides.reference_judged
        beyond = [n for n in FURTHER if n > sizes[-1]]
        return Choice(
            prompts=len(sides.policy_rewards),
            win_rates=estimates(by_reward, resamples),
            judge_win_rates=estimates(by_judge, resamples),
            within=within,
            best=best,
            cheapest=next(n for n in sizes if means[n] >= means[best] - within),
            decline=None if best == sizes[-1] else _decline(lost, len(sizes), resamples),
            risk=risk.measure(ours, theirs, lowest, [*sizes, *beyond], resamples=resamples),
            early_stops=_early_stops(sides, resamples),
        )


def _early_stops(sides: Sides, resamples: int) -> tuple[EarlyStop, ...]:
    ours, theirs = jnp.asarray(sides.policy_rewards), jnp.asarray(sides.reference_rewards)
    judges = [(ours, theirs)]
    if sides.policy_judged is not None and sides.reference_judged is not None:
        judges.append((jnp.asarray(sides.policy_judged), jnp.asarray(sides.reference_judged)))
    others = theirs.shape[1] - 1
    places = _sizes(others) if others else []
    per_place = {place: early_stop.against_one(ours, theirs, place, judges) for place in places}
    win_rates, *judged = (
        estimates({place: wins[judge] for place, (wins, _) in per_place.items()}, resamples)
        for judge in range(len(judges))
    )
    draws = estimates({place: one for place, (_, one) in per_place.items()}, resamples, bounds=(1, ours.shape[1]))
    return tuple(
        EarlyStop(place / (others + 1), win_rates[place], judged[0][place] if judged else None, draws[place])
        for place in per_place
    )


def _sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16 ... up to all: equal steps on a log scale, two of them a doubling."""
    return sorted({*(n for power in range(2 * most.bit_length()) if (n := round(2 ** (power / 2))) <= most), most})


def _decline(lost: jax.Array, tried: int, resamples: int) -> Estimate:
    level = 1 - 0.05 / (tried - 1)
    return estimates({"lost": lost}, max(resamples, round(10 / (1 - level))), bounds=(-1, 1), level=level)["lost"]


def check_shares(within: float, lowest: float) -> None:
    """Raises InputError unless both are in (0, 1)."""
    for name, value in (("within", within), ("lowest", lowest)):
        if not 0 < value < 1:
            raise InputError(f"`{name}` is {value}", field=name, value=value, remedy="give a share between 0 and 1.")
