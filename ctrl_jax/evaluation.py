"""The measurements of a run: evaluation.json as a value, for the pipeline that writes it and for those who read it.

KL is in nats per response; win rates and other shares lie in [0, 1]; intervals are 95 %.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from ctrl_jax.checked_json import ROUNDING, JsonFile
from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures

REWARD_ARRAYS = ("policy_rewards", "reference_rewards", "policy_calibrated", "reference_calibrated")
"""Arrays [B, M] of evaluation.npz, beside evaluation.json."""
ALONG_ARRAYS = ("along_steps", "along_rewards", "along_kl")
"""Its arrays of the policy along its training, where `evaluation.along` asked for them: P steps, raw rewards [P, B, M]
of its responses to the same prompts, and KLs [P, B]."""
KL_ARRAY = "kl"
"""Its array [B] of each prompt's KL, nats per response; missing in files of older versions."""
RELIABILITY_ARRAYS = ("reliability_predicted", "reliability_observed", "reliability_count")
"""Its columns of a reliability diagram, one entry a bin, where the reward model has one."""
MARGINS_ARRAY = "margins"
"""Its array, one entry a held-out pair: how much higher the chosen response's raw reward is."""
VALIDATION_ARRAYS = ("validation_step", "validation_training_loss", "validation_loss", "validation_accuracy")
"""Its columns of a curve, one entry a validation of the reward model's training, where it had any. The training's loss
is the mean over the steps since the one before."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high`, where there is no interval: of a single prompt there is none."""
    high: float | None

    @classmethod
    def of(cls, mean: SupportsFloat, low: SupportsFloat, high: SupportsFloat) -> "Estimate":
        """An interval as the steps give it, whose ends are nan where there is none."""
        return cls(float(mean), *(None if math.isnan(float(end)) else float(end) for end in (low, high)))

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), or the mean twice where there is no interval."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        """`0.561 [0.558, 0.565]`, or `0.561 (no interval)`."""
        return format(self, ".3f")

    def __format__(self, form: str) -> str:
        """Each number in this form: `+0.053 [+0.031, +0.074]` in `+.3f`."""
        if not form:
            return str(self)
        if self.low is None or self.high is None:
            return f"{self.mean:{form}} (no interval)"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


class Ideals(NamedTuple):
    """Win rates of ideal policies at the measured KL, one a transform. None where there is none to report."""

    identity: float | None
    optimal: float | None
    """Of Φ* for the procedure: nothing does better at this KL."""
    transform: float | None
    """Of the run's own Φ; a raw reward has none."""


class Picks(NamedTuple):
    """What R runs of a decoder returned to each of B prompts, in host memory."""

    rewards: np.ndarray
    """[B, R] raw."""
    gold: np.ndarray | None
    """[B, R], which only generated data has."""
    sampled: np.ndarray
    """[B] tokens drawn for one response, in the mean over the runs."""
    scored: int
    """Responses, or beginnings of them, that the reward read for one."""


class Lengths(NamedTuple):
    """Of responses, in tokens: the mean and three quantiles."""

    mean: float
    p10: float
    median: float
    p90: float


class RewardQuality(NamedTuple):
    """How the training reward ranks held-out preference pairs; each field None where it has no meaning."""

    pairs: int | None = None
    accuracy: float | None = None
    """Of a model of preferences: the share of pairs ranked as their labels do, ties counting ½."""
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    ece: float | None = None
    """Expected calibration error of a Bradley-Terry model."""
    brier: float | None = None
    """Its Brier score: the mean squared error of its probabilities. A guess has ¼."""
    margin_length_correlation: float | None = None
    """Of a model of preferences: Spearman's ρ of the margin and of how many tokens longer the chosen response is, each
    pair in both orders; None where all are equal, and in files of older versions."""
    agreements: int | None = None
    """Of a function, which is no model of preferences: the pairs that it ranks as their labels do."""
    equal: int | None = None
    """The pairs whose two responses a function rewards alike."""

    @property
    def is_chance(self) -> bool:
        """Whether the accuracy is no better than a guess, as far as its interval shows."""
        return self.accuracy_low is not None and self.accuracy_low <= 0.5


class Floor(NamedTuple):
    """Of a reward whose mean rank the policy was to keep."""

    mean_rank: Estimate
    """Of a single response of the policy among the reference's, in [0, 1]; the reference's own is ½."""
    floor: float
    """What was asked for."""

    @property
    def is_kept(self) -> bool:
        """As far as the interval shows."""
        return self.mean_rank.bounds[1] >= self.floor


FEW_PAIRS = 200
"""Held-out pairs, below which an accuracy says little: its interval is more than 14 points wide."""


class RewardTraining(NamedTuple):
    """What a reward model that was trained here learned from, and for how long."""

    pairs: int
    cut: int
    """Of these, the pairs whose prompt was longer than the longest and lost its beginning."""
    dropped: int
    """Besides them, the pairs that were left out because their prompt is too long."""
    steps: int | None = None
    """That were made; None, as the two below, of a training without a validation."""
    used_step: int | None = None
    """The step of the best validation likelihood, whose reward model is the one that is used."""
    validation_pairs: int | None = None


GO = 0.3
"""The rank correlation of a learnability probe from which a policy can well climb a reward."""
LONG = 0.3
"""The rank correlation of a reward with length, from which length is much of what it rewards."""


class RewardSignal(NamedTuple):
    """What the reference's responses to training prompts say of the reward, before any policy is trained on it."""

    length_correlation: Estimate | None = None
    """Spearman's ρ of reward and length within a prompt, the mean over prompts; None where lengths or rewards are all
    equal, and in files of older versions."""
    learnability: Estimate | None = None
    """Spearman's ρ of a response's rank and what a linear probe of the reference's features says of it, within a prompt
    that the probe was not fitted on; None for fewer than 10 prompts, and in files of older versions."""

    @classmethod
    def from_json(cls, tree: Any, *, source: pathlib.Path | str, remedy: str) -> "RewardSignal":
        """What `as_json` gave, or None where nothing is known. Raises InputError, as `Evaluation.from_json`."""
        file = JsonFile(source, remedy)
        found = file.object({} if tree is None else tree, "reward_signal")
        return cls(*(_correlation(file, found.get(name), f"reward_signal.{name}") for name in cls._fields))

    def as_json(self) -> dict[str, Any]:
        return {name: found._asdict() for name, found in self._asdict().items() if found is not None}

    @property
    def sentences(self) -> list[str]:
        """What it means for a policy, in words."""
        found = []
        if (lengths := self.length_correlation) is not None:
            low, high = lengths.bounds
            text = "it does not show that the reward follows length"
            if low > 0 or high < 0:
                text = f"{'longer' if lengths.mean > 0 else 'shorter'} responses have higher rewards"
            if abs(lengths.mean) >= LONG:
                text += ", and a policy that climbs the reward will mostly change its length"
            found.append(f"Rank correlation of reward and length within a prompt: {lengths}: {text}.")
        if (probe := self.learnability) is not None:
            text = "go, a policy can climb this reward"
            if probe.bounds[0] <= 0:
                text = "the interval reaches 0, and a policy will hardly climb this reward"
            elif probe.mean < GO:
                text = f"a policy can climb this reward a little; from {GO:g} on it is a go"
            found.append(
                "Learnability probe, rank correlation of a response's rank and what the reference's own features say "
                f"of it, on prompts that it was not fitted on: {probe}: {text}."
            )
        return found


class Point(NamedTuple):
    """The policy after a step of its training, on the same test prompts."""

    step: int
    kl: Estimate
    """Nats per response."""
    win_rates: Mapping[str, Estimate]
    """By procedure, by the training reward."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What evaluation.json holds: the measurements of one run on test prompts."""

    kl: Estimate
    """Nats per response."""
    kl_standard_error: float | None = None
    """None for a single prompt, and in files of older versions."""
    kl_budget: float | None
    judged_by: str = "the reward that the policy was trained on"
    """Who judges `win_rates`."""
    win_rates: Mapping[str, Estimate]
    """By procedure, as the four tables below."""
    gold_win_rates: Mapping[str, Estimate]
    """Empty where no gold reward exists."""
    judge_win_rates: Mapping[str, Estimate] = field(default_factory=dict)
    judge: str | None = None
    """The independent judge; None where there is none."""
    judge_fingerprint: str | None = None
    """Identifies the judge's parameters, or its source."""
    ideal: Mapping[str, Ideals]
    reward_model: RewardQuality
    reward_training: RewardTraining | None = None
    """None of a reward that was not trained here, and in files of older versions."""
    reward_signal: RewardSignal = field(default_factory=RewardSignal)
    floors: Mapping[str, Floor] = field(default_factory=dict)
    """By name, the rewards whose mean rank the policy was to keep; empty where there are none."""
    ties: float
    """The share of pairs of a policy's and a reference's response with equal raw rewards."""
    response_length: Mapping[str, Lengths] = field(default_factory=dict)
    """By side: policy and reference. Empty, as `unfinished`, in files of older versions."""
    unfinished: Mapping[str, float] = field(default_factory=dict)
    """The share of responses without an end within the longest length, by side."""
    timings: Mapping[str, float]
    """Seconds by stage."""
    along: tuple[Point, ...] = ()
    """The policy along its training, by steps; empty where it was not asked for."""

    @classmethod
    def from_json(cls, tree: Any, *, source: pathlib.Path | str, remedy: str) -> "Evaluation":
        """The evaluation in the tree of an evaluation.json, of this version or an older one.

        Args:
          source: The file, for errors.
          remedy: A sentence for errors: how to mend the file.

        Raises:
          InputError: if an entry is missing or out of range.
        """
        file = JsonFile(source, remedy)
        tree = file.object(tree, "the evaluation")
        judge = {} if tree.get("judge") is None else file.object(tree["judge"], "judge")
        fingerprint = judge.get("fingerprint")
        return cls(
            kl=_estimate(file, tree.get("kl"), "kl", _kl),
            kl_budget=file.optional(tree.get("kl_budget"), "kl_budget"),
            kl_standard_error=file.optional(tree.get("kl_standard_error"), "kl_standard_error"),
            win_rates=_by_procedure(file, tree, "win_rates", _win_rate),
            gold_win_rates=_by_procedure(file, tree, "gold_win_rates", _win_rate, {}),
            ideal=_by_procedure(file, tree, "ideal", _ideals),
            reward_model=_reward_quality(file, tree.get("reward_model")),
            reward_training=_reward_training(file, tree.get("reward_training")),
            reward_signal=RewardSignal.from_json(tree.get("reward_signal"), source=source, remedy=remedy),
            floors=file.each(tree, "floors", lambda value, where: _floor(file, value, where)),
            ties=file.share(tree.get("ties"), "ties"),
            timings=file.each(tree, "timings", file.number),
            judged_by=file.text(tree.get("judged_by", cls.judged_by), "judged_by"),
            judge=None if tree.get("judge") is None else file.text(judge.get("name"), "judge.name"),
            judge_fingerprint=None if fingerprint is None else file.text(fingerprint, "judge.fingerprint"),
            judge_win_rates=_by_procedure(file, tree, "judge_win_rates", _win_rate, {}),
            response_length=file.each(tree, "response_length", lambda value, where: _lengths(file, value, where)),
            unfinished=file.each(tree, "unfinished", file.share),
            along=_points(file, tree.get("along", [])),
        )

    def as_json(self) -> dict[str, Any]:
        """The tree of evaluation.json, which `from_json` reads back as an equal value.

        An interval that does not exist is null; any other number without a meaning for the run is left out.
        """
        tree: dict[str, Any] = {each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(self)}
        fingerprint = tree.pop("judge_fingerprint")
        tree["judge"] = None if self.judge is None else {"name": self.judge, "fingerprint": fingerprint}
        tree["reward_signal"] = self.reward_signal.as_json()
        for name in ("kl_standard_error", "reward_training", "reward_signal"):
            if tree[name] in (None, {}):
                del tree[name]
        for name in ("along", "floors"):
            if not tree[name]:
                del tree[name]
        return tree


def _plain(value: Any) -> Any:
    match value:
        case Estimate():
            return value._asdict()
        case Ideals() | Lengths() | RewardQuality() | RewardTraining():
            return {name: number for name, number in value._asdict().items() if number is not None}
        case Mapping():
            return {name: _plain(entry) for name, entry in value.items()}
        case Point() | Floor():
            return {name: _plain(entry) for name, entry in value._asdict().items()}
        case tuple():
            return [_plain(entry) for entry in value]
    return value


def _correlation(file: JsonFile, value: Any, where: str) -> Estimate | None:
    return None if value is None else _estimate(file, value, where, _coefficient)


def _coefficient(file: JsonFile, value: Any, where: str) -> float:
    number = file.number(value, where)
    if abs(number) > 1 + ROUNDING:
        raise file.refuse(value, where, "a correlation between -1 and 1")
    return number


def _kl(file: JsonFile, value: Any, where: str) -> float:
    number = file.number(value, where)
    if number < -ROUNDING:
        raise file.refuse(value, where, "a KL divergence, which is never below 0,")
    return number


def _estimate(file: JsonFile, value: Any, where: str, read: Callable[[JsonFile, Any, str], float]) -> Estimate:
    found = file.object(value, where)
    mean = read(file, found.get("mean"), f"{where}.mean")
    if found.get("low") is None and found.get("high") is None:
        return Estimate(mean, None, None)
    low, high = (read(file, found.get(bound), f"{where}.{bound}") for bound in ("low", "high"))
    if not low - ROUNDING <= mean <= high + ROUNDING:
        raise file.refuse(value, where, "an interval that holds its mean")
    return Estimate(mean, low, high)


def _win_rate(file: JsonFile, value: Any, where: str) -> Estimate:
    return _estimate(file, value, where, JsonFile.share)


def _points(file: JsonFile, value: Any) -> tuple[Point, ...]:
    if not isinstance(value, list):
        raise file.refuse(value, "along", "a list of points")
    return tuple(_point(file, point, f"along.{index}") for index, point in enumerate(value))


def _point(file: JsonFile, value: Any, where: str) -> Point:
    found = file.object(value, where)
    step = found.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise file.refuse(step, f"{where}.step", "a step of a training")
    kl = _estimate(file, found.get("kl"), f"{where}.kl", _kl)

    def read(file: JsonFile, value: Any, place: str) -> Estimate:
        return _win_rate(file, value, f"{where}.{place}")

    return Point(step, kl, _by_procedure(file, found, "win_rates", read))


def _floor(file: JsonFile, value: Any, where: str) -> Floor:
    found = file.object(value, where)
    mean_rank = _win_rate(file, found.get("mean_rank"), f"{where}.mean_rank")
    return Floor(mean_rank, file.share(found.get("floor"), f"{where}.floor"))


def _ideals(file: JsonFile, value: Any, where: str) -> Ideals:
    return Ideals(**file.fields(value, where, Ideals._fields, file.optional_share))


def _lengths(file: JsonFile, value: Any, where: str) -> Lengths:
    return Lengths(**file.fields(value, where, Lengths._fields, file.number))


def _by_procedure(
    file: JsonFile,
    tree: Mapping[str, Any],
    key: str,
    read: Callable[[JsonFile, Any, str], Any],
    absent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    found = {}
    for name, value in file.under(tree, key, absent).items():
        try:
            procedure = procedures.parse(name)
        except InputError as error:
            raise InputError(f"{file.source}, {key}: {error} {file.remedy}") from None
        found[procedure.name] = read(file, value, f"{key}.{name}")
    return found


def _count(file: JsonFile, value: Any, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise file.refuse(value, where, "a whole number")
    return value


def _reward_training(file: JsonFile, value: Any) -> RewardTraining | None:
    if value is None:
        return None
    read = functools.partial(_count, file)
    found = file.fields(value, "reward_training", RewardTraining._fields, read)
    for name in ("pairs", "cut", "dropped"):
        if found[name] is None:
            raise file.refuse(None, f"reward_training.{name}", "a whole number")
    return RewardTraining(**found)


def _reward_quality(file: JsonFile, value: Any) -> RewardQuality:
    found = file.object({} if value is None else value, "reward_model")
    shares = ("accuracy", "accuracy_low", "accuracy_high", "ece", "brier")
    correlation = found.get("margin_length_correlation")
    quality = RewardQuality(
        **file.fields(found, "reward_model", shares, file.optional_share),
        **{name: _count(file, found.get(name), f"reward_model.{name}") for name in ("pairs", "agreements", "equal")},
        margin_length_correlation=None
        if correlation is None
        else _coefficient(file, correlation, "reward_model.margin_length_correlation"),
    )
    if found and quality.accuracy is None and (quality.agreements is None or not quality.pairs):
        raise file.refuse(found, "reward_model", "an accuracy, or agreements and pairs,")
    return quality
