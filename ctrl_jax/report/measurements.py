"""What the jobs measured, read from their files and checked, so that figures and page need not ask again.

Rewards are *raw* (the reward model's score), *calibrated* (their rank among the reference's rewards of the same
prompt, in [0, 1]) or *transformed* (Φ of that rank). KL is in nats per response. Intervals are 95 %.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import parse_transform

REWARD_ARRAYS = ("policy_rewards", "reference_rewards", "policy_calibrated", "reference_calibrated")
RELIABILITY_ARRAYS = ("reliability_predicted", "reliability_observed", "reliability_count")
ROUNDING = 1e-4
"""What float32 may take a win rate beyond 1, or a KL below 0."""
DEEPEST = 64
"""Levels of JSON that are read."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high`, where there is no interval: of a single prompt there is none."""
    high: float | None

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), or the mean twice where there is no interval."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)


class Ideals(NamedTuple):
    """Win rates of ideal policies at the measured KL, one a transform. None where there is none to report."""

    identity: float | None
    transform: float | None
    """Of the run's own Φ; a raw reward has none."""
    optimal: float | None
    """Of Φ* for the procedure: nothing does better at this KL."""


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
    agreements: int | None = None
    """Of a function, which is no model of preferences: the pairs that it ranks as their labels do."""
    equal: int | None = None
    """The pairs whose two responses a function rewards alike."""


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json."""

    kl: Estimate
    kl_budget: float | None
    win_rates: Mapping[str, Estimate]
    gold_win_rates: Mapping[str, Estimate]
    """Empty where no gold reward exists."""
    ideal: Mapping[str, Ideals]
    reward_model: RewardQuality
    ties: float
    timings: Mapping[str, float]
    judged_by: str = "the reward that the policy was trained on"
    """Who judges `win_rates`."""
    judge: str | None = None
    """The independent judge; None where there is none."""
    judge_win_rates: Mapping[str, Estimate] = field(default_factory=dict)
    response_length: Mapping[str, Lengths] = field(default_factory=dict)
    """By side: policy and reference. Empty, as `unfinished`, in files of older versions."""
    unfinished: Mapping[str, float] = field(default_factory=dict)
    """The share of responses without an end within the longest length."""


@dataclass(frozen=True)
class Run:
    """A work directory after its evaluation. What is optional is empty where its file is missing."""

    config: Mapping[str, Any]
    evaluation: Evaluation
    arrays: Mapping[str, np.ndarray]
    """evaluation.npz: rewards and lengths [B, M]; gold, judge and reliability arrays where they exist."""
    metrics: Mapping[str, np.ndarray]
    """metrics.jsonl by column, one entry a step; nan where a row lacks the column."""
    samples: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def transform(self) -> str:
        return str(self.config["policy"]["transform"])

    @property
    def procedure(self) -> str:
        return procedures.parse(str(self.config["policy"]["procedure"])).name


UNFINISHED = 0.05
"""The share of responses without an end from which a run is warned of it."""


def unfinished_warning(evaluation: Evaluation, longest: Any) -> str | None:
    """What to say of responses that do not end within the longest length, and what to do; None where nearly all do."""
    shares = evaluation.unfinished
    if not shares or max(shares.values()) < UNFINISHED:
        return None
    within = f"{longest} tokens" if isinstance(longest, int) else "the longest length"
    counted = " and ".join(f"{share:.1%} of the {side}'s responses" for side, share in shares.items())
    advice = "Raise `data.response_length`."
    if max(shares.values()) > 0.5:
        advice = (
            "Raise `data.response_length`. If hardly any response ends however long it may be, the model was not "
            "taught to end one: fine-tune it (`sft.steps`), and check that its chat template's end-of-turn token is an "
            "end-of-sequence token of its generation_config.json."
        )
    return f"{counted} do not end within {within}: they are cut off, and rewarded as they stand. {advice}"


def read_run(work_dir: pathlib.Path) -> Run:
    """Read and check a work directory.

    Raises InputError, with the file and the command that makes it, where a required file (config.json, evaluation.json,
    evaluation.npz) is missing, or where any file cannot be understood.
    """
    if not work_dir.is_dir():
        raise InputError(
            f"{work_dir} is not a directory; a report is made from the work directory that `make train` wrote."
        )
    config = _read_config(work_dir / "config.json")
    # Neither trains again: a finished policy is read from its checkpoint, and these files are written anew.
    remedy = "`make evaluate`, with the options of the run, makes it anew from the trained policy."
    evaluation = parse_evaluation(
        _read_json(work_dir / "evaluation.json", remedy), source=work_dir / "evaluation.json", remedy=remedy
    )
    for name in {"sampling", procedures.parse(config["policy"]["procedure"]).name} - set(evaluation.win_rates):
        raise InputError(
            f"{work_dir / 'evaluation.json'} has no win rate under {name}, the headline of the report; {remedy}"
        )
    arrays = _read_arrays(work_dir / "evaluation.npz", remedy)
    # A mean rank among the reference's rewards is the win rate of one sample.
    measured, sampling = float(arrays["policy_calibrated"].mean()), evaluation.win_rates["sampling"].mean
    if abs(measured - sampling) > 1e-3:
        raise InputError(
            f"{work_dir / 'evaluation.npz'} is of another evaluation than evaluation.json: one sample wins "
            f"{measured:.4f} by the first and {sampling:.4f} by the second; {remedy}"
        )
    return Run(
        config=config,
        evaluation=evaluation,
        arrays=arrays,
        metrics=_columns(_read_lines(work_dir / "metrics.jsonl", "remove that line.")),
        samples=_read_samples(work_dir / "samples.jsonl", remedy),
    )


def parse_evaluation(tree: Any, *, source: pathlib.Path | str, remedy: str) -> Evaluation:
    """An Evaluation from the tree of evaluation.json; InputError names `source`, the bad entry and `remedy`."""
    file = _File(source, remedy)
    tree = file.object(tree, "the evaluation")
    judge = tree.get("judge")
    return Evaluation(
        kl=file.estimate(tree.get("kl"), "kl", file.kl),
        kl_budget=file.optional(tree.get("kl_budget"), "kl_budget"),
        win_rates=file.by_procedure(tree, "win_rates", file.win_rate),
        gold_win_rates=file.by_procedure(tree, "gold_win_rates", file.win_rate, {}),
        ideal=file.by_procedure(tree, "ideal", file.ideals),
        reward_model=file.reward_quality(tree.get("reward_model")),
        ties=file.share(tree.get("ties"), "ties"),
        timings={
            name: file.number(value, f"timings.{name}") for name, value in file.under(tree, "timings", {}).items()
        },
        judged_by=file.text(tree.get("judged_by", Evaluation.judged_by), "judged_by"),
        judge=None if judge is None else file.text(file.object(judge, "judge").get("name"), "judge.name"),
        judge_win_rates=file.by_procedure(tree, "judge_win_rates", file.win_rate, {}),
        response_length={
            side: Lengths(**file.fields(value, f"response_length.{side}", Lengths._fields, file.number))
            for side, value in file.under(tree, "response_length", {}).items()
        },
        unfinished={
            side: file.share(value, f"unfinished.{side}") for side, value in file.under(tree, "unfinished", {}).items()
        },
    )


@dataclass(frozen=True)
class _File:
    """Checks what a JSON file has at a place; each method raises InputError with the file, the value and the place."""

    source: pathlib.Path | str
    remedy: str

    def refuse(self, value: Any, where: str, expected: str) -> InputError:
        return InputError(f"{self.source} has {_short(value)} at {where}, where {expected} must stand; {self.remedy}")

    def object(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.refuse(value, where, "a JSON object")
        return value

    def under(self, tree: Mapping[str, Any], key: str, absent: Any = None) -> Mapping[str, Any]:
        return self.object(tree.get(key) if tree.get(key) is not None else absent, key)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.refuse(value, where, "a name")
        return value

    def number(self, value: Any, where: str) -> float:
        number = finite(value)
        if number is None:
            raise self.refuse(value, where, "a finite number")
        return number

    def optional(self, value: Any, where: str) -> float | None:
        return None if value is None else self.number(value, where)

    def share(self, value: Any, where: str) -> float:
        number = self.number(value, where)
        if not -ROUNDING <= number <= 1 + ROUNDING:
            raise self.refuse(value, where, "a share between 0 and 1")
        return min(max(number, 0.0), 1.0)

    def optional_share(self, value: Any, where: str) -> float | None:
        return None if value is None else self.share(value, where)

    def kl(self, value: Any, where: str) -> float:
        number = self.number(value, where)
        if number < -ROUNDING:
            raise self.refuse(value, where, "a KL divergence, which is never below 0,")
        return number

    def count(self, value: Any, where: str) -> int | None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise self.refuse(value, where, "a whole number of pairs")
        return value

    def fields(self, value: Any, where: str, names: Sequence[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        found = self.object(value, where)
        return {name: read(found.get(name), f"{where}.{name}") for name in names}

    def estimate(self, value: Any, where: str, read: Callable[[Any, str], float]) -> Estimate:
        found = self.object(value, where)
        mean = read(found.get("mean"), f"{where}.mean")
        if found.get("low") is None and found.get("high") is None:
            return Estimate(mean, None, None)
        low, high = (read(found.get(bound), f"{where}.{bound}") for bound in ("low", "high"))
        if not low - ROUNDING <= mean <= high + ROUNDING:
            raise self.refuse(value, where, "an interval that holds its mean")
        return Estimate(mean, low, high)

    def win_rate(self, value: Any, where: str) -> Estimate:
        return self.estimate(value, where, self.share)

    def by_procedure(
        self, tree: Mapping[str, Any], key: str, read: Callable[[Any, str], Any], absent: Any = None
    ) -> dict[str, Any]:
        found = {}
        for name, value in self.under(tree, key, absent).items():
            try:
                procedure = procedures.parse(name)
            except InputError as error:
                raise InputError(f"{self.source}, {key}: {error} {self.remedy}") from None
            found[procedure.name] = read(value, f"{key}.{name}")
        return found

    def ideals(self, value: Any, where: str) -> Ideals:
        return Ideals(**self.fields(value, where, Ideals._fields, self.optional_share))

    def reward_quality(self, value: Any) -> RewardQuality:
        found = self.object({} if value is None else value, "reward_model")
        shares = ("accuracy", "accuracy_low", "accuracy_high", "ece")
        counts = ("pairs", "agreements", "equal")
        quality = RewardQuality(
            **self.fields(found, "reward_model", shares, self.optional_share),
            **self.fields(found, "reward_model", counts, self.count),
        )
        if found and quality.accuracy is None and (quality.agreements is None or not quality.pairs):
            raise self.refuse(found, "reward_model", "an accuracy, or agreements and pairs,")
        return quality


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _read_config(path: pathlib.Path) -> Mapping[str, Any]:
    remedy = "`make train`, with the options of the run, writes it anew where there is none; nothing is trained again."
    file = _File(path, remedy)
    config = file.object(_read_json(path, remedy), "the configuration")
    file.text(config.get("name"), "name")
    policy = file.under(config, "policy")
    transform, procedure = (file.text(policy.get(name), f"policy.{name}") for name in ("transform", "procedure"))
    file.optional(policy.get("beta"), "policy.beta")
    try:
        procedures.parse(procedure)
        parse_transform(transform)
    except InputError as error:
        raise InputError(f"{path}, policy: {error} {remedy}") from None
    return config


def _read_text(path: pathlib.Path, remedy: str) -> str:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from error


def _parsed(text: str) -> Any:
    """The JSON of a text. Raises ValueError, also where it is nested so deeply that walking it would fail."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [tree]
    for _ in range(DEEPEST):
        level = [
            child for node in level if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]  # fmt: skip
        if not level:
            return tree
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _read_json(path: pathlib.Path, remedy: str) -> Any:
    text = _read_text(path, remedy)
    try:
        return _parsed(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error


def _read_lines(path: pathlib.Path, remedy: str) -> list[Mapping[str, Any]]:
    """JSON objects, one a line; none where the file is missing."""
    if not path.exists():
        return []
    rows: list[Mapping[str, Any]] = []
    # By line feeds alone: what is a line to `splitlines` may stand within a text.
    lines = _read_text(path, "remove this file: the report does without it.").removesuffix("\n").split("\n")
    for index, line in enumerate(lines):
        try:
            rows.append(_File(path, remedy).object(_parsed(line), f"line {index + 1}"))
        except ValueError as error:
            # A kill in mid-write leaves a torn last line; the job that resumes writes that row again.
            if index + 1 == len(lines):
                break
            raise InputError(f"{path} is not JSON on line {index + 1} ({error}); {remedy}") from error
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    # A resumed run may repeat steps: the last row of a step is the one that the parameters went on from.
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int) and finite(row["step"]) is not None}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = {name for row in ordered for name, value in row.items() if finite(value) is not None}
    # What is not finite, as 1e400 is in JSON, is a gap in its curve.
    return {
        name: np.array([math.nan if (value := finite(row.get(name))) is None else value for row in ordered])
        for name in names
    }


def _read_arrays(path: pathlib.Path, remedy: str) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path} is missing; {remedy}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]).astype(float, casting="safe") for name in archive.files}
    except Exception as error:  # damaged archives raise a dozen kinds, of zipfile, zlib and NumPy
        raise InputError(f"{path} is not a whole NumPy archive of numbers ({error}); {remedy}") from error
    for name in REWARD_ARRAYS:
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r}; {remedy}")
    prompts = len(arrays["policy_rewards"]) if arrays["policy_rewards"].ndim else 0
    for side in ("policy", "reference"):
        shape = arrays[f"{side}_rewards"].shape
        for kind in ("rewards", "calibrated", "gold", "judge", "lengths"):
            array = arrays.get(f"{side}_{kind}")
            if array is None:
                continue
            if array.ndim != 2 or array.size == 0 or array.shape != shape or len(array) != prompts:
                raise InputError(
                    f"{path} has {f'{side}_{kind}'!r} of shape {array.shape}, where an array [prompts, responses] of "
                    f"shape {(prompts, *shape[1:])} must stand; {remedy}"
                )
            low, high = {"calibrated": (0, 1), "lengths": (1, math.inf)}.get(kind, (-math.inf, math.inf))
            wrong = ~np.isfinite(array) | (array < low) | (array > high)
            if wrong.any():
                raise InputError(
                    f"{path} has {int(wrong.sum())} values in {f'{side}_{kind}'!r} that are not finite or out of "
                    f"range, such as {array[wrong][0]:g}; {remedy}"
                )
    reliability = [arrays[name] for name in RELIABILITY_ARRAYS if name in arrays]
    if any(array.ndim != 1 or array.shape != reliability[0].shape for array in reliability):
        raise InputError(f"{path} has reliability arrays that are no columns of one table; {remedy}")
    return arrays


def _read_samples(path: pathlib.Path, remedy: str) -> list[Mapping[str, Any]]:
    rows = _read_lines(path, remedy)
    file = _File(path, remedy)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise InputError(f"{path} has no prompt on line {index + 1}; {remedy}")
        for side in ("policy", "reference"):
            if not isinstance(file.object(row.get(side), f"{side} of line {index + 1}").get("text"), str):
                raise InputError(f"{path} has no {side}.text on line {index + 1}; {remedy}")
    return rows
