"""What the jobs measured, read from their files and checked, so that figures and page need not ask again.

Rewards are *raw* (the reward model's score), *calibrated* (their rank among the reference's rewards of the same
prompt, in [0, 1]) or *transformed* (Φ of that rank). KL is in nats per response. Intervals are 95 %.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ctrl_jax.errors import InputError

REWARD_ARRAYS = ("policy_rewards", "reference_rewards", "policy_calibrated", "reference_calibrated")
GOLD_ARRAYS = ("policy_gold", "reference_gold")
RELIABILITY_ARRAYS = ("reliability_predicted", "reliability_observed", "reliability_count")


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Ideals(NamedTuple):
    """Win rates of ideal policies at the measured KL, one a transform. None where there is none to tell."""

    identity: float | None
    transform: float | None
    """Of the run's own Φ; a raw reward has none."""
    optimal: float | None
    """Of Φ* for the procedure: nothing does better at this KL."""


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json."""

    kl: Estimate
    kl_budget: float | None
    win_rates: Mapping[str, Estimate]
    gold_win_rates: Mapping[str, Estimate]
    """Empty where no gold reward exists."""
    ideal: Mapping[str, Ideals]
    accuracy: float | None
    """Of the reward model on held-out pairs; None, as `ece`, where there were no pairs."""
    ece: float | None
    ties: float
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A work directory after its evaluation. What is optional is empty where its file is missing."""

    config: Mapping[str, Any]
    evaluation: Evaluation
    arrays: Mapping[str, np.ndarray]
    """evaluation.npz: rewards [B, M]; gold and reliability arrays where they exist."""
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
        return str(self.config["policy"]["procedure"])


def lift_share(win_rate: float, ideal: float | None) -> float | None:
    """(W − ½) / (W_ideal − ½), or None where the ideal is unknown or lifts nothing."""
    if ideal is None or abs(ideal - 0.5) < 1e-6:
        return None
    return (win_rate - 0.5) / (ideal - 0.5)


def read_run(work_dir: pathlib.Path) -> Run:
    """Read and check a work directory.

    Raises InputError, with the file and the command that makes it, where a required file (config.json, evaluation.json,
    evaluation.npz) is missing, or where any file cannot be understood.
    """
    if not work_dir.is_dir():
        raise InputError(
            f"{work_dir} is not a directory; a report is made from the work directory that `make train` wrote."
        )
    remedy = "the `make train` command of this work directory makes it."
    config = _object(
        _read_json(work_dir / "config.json", remedy), "the configuration", work_dir / "config.json", remedy
    )
    for path in (("name",), ("policy", "transform"), ("policy", "procedure")):
        _string(config, path, work_dir / "config.json", remedy)
    remedy = "the `make train` command of this work directory makes it anew, once the file is gone."
    evaluation = parse_evaluation(
        _read_json(work_dir / "evaluation.json", remedy), source=work_dir / "evaluation.json", remedy=remedy
    )
    for name in {"sampling", config["policy"]["procedure"]} - set(evaluation.win_rates):
        raise InputError(
            f"{work_dir / 'evaluation.json'} has no win rate under {name}, the headline of the report; {remedy}"
        )
    return Run(
        config=config,
        evaluation=evaluation,
        arrays=_read_arrays(work_dir / "evaluation.npz", remedy),
        metrics=_columns(_read_lines(work_dir / "metrics.jsonl")),
        samples=_read_samples(work_dir / "samples.jsonl", remedy),
    )


def parse_evaluation(tree: Any, *, source: pathlib.Path | str, remedy: str) -> Evaluation:
    """An Evaluation from the tree of evaluation.json; InputError names `source`, the bad entry and `remedy`."""

    def number(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{source} has {value!r} at {where}, where a finite number must stand; {remedy}")
        return float(value)

    def optional(value: Any, where: str) -> float | None:
        return None if value is None else number(value, where)

    def children(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        return _object(parent.get(key), key, source, remedy)

    def estimate(value: Any, where: str) -> Estimate:
        fields = _object(value, where, source, remedy)
        return Estimate(*(number(fields.get(field), f"{where}.{field}") for field in Estimate._fields))

    def estimates(key: str) -> dict[str, Estimate]:
        return {name: estimate(value, f"{key}.{name}") for name, value in children(tree, key).items()}

    def ideals(name: str, value: Any) -> Ideals:
        fields = _object(value, f"ideal.{name}", source, remedy)
        return Ideals(*(optional(fields.get(field), f"ideal.{name}.{field}") for field in Ideals._fields))

    tree = _object(tree, "the evaluation", source, remedy)
    reward_model = children(tree, "reward_model")
    return Evaluation(
        kl=estimate(tree.get("kl"), "kl"),
        kl_budget=optional(tree.get("kl_budget"), "kl_budget"),
        win_rates=estimates("win_rates"),
        gold_win_rates=estimates("gold_win_rates") if tree.get("gold_win_rates") else {},
        ideal={name: ideals(name, value) for name, value in children(tree, "ideal").items()},
        accuracy=number(reward_model.get("accuracy"), "reward_model.accuracy") if reward_model else None,
        ece=number(reward_model.get("ece"), "reward_model.ece") if reward_model else None,
        ties=number(tree.get("ties"), "ties"),
        timings={name: number(value, f"timings.{name}") for name, value in (tree.get("timings") or {}).items()},
    )


def _object(value: Any, where: str, source: pathlib.Path | str, remedy: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{source} has {value!r} as {where}, where a JSON object must stand; {remedy}")
    return value


def _string(tree: Mapping[str, Any], path: tuple[str, ...], source: pathlib.Path, remedy: str) -> None:
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str) or not value:
        raise InputError(f"{source} has {value!r} at {'.'.join(path)}, where a name must stand; {remedy}")


def _read_text(path: pathlib.Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it, and {remedy}") from error


def _read_json(path: pathlib.Path, remedy: str) -> Any:
    try:
        return json.loads(_read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); remove it, and {remedy}") from error


def _read_lines(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """JSON objects, one a line; none where the file is missing."""
    if not path.exists():
        return []
    rows: list[Mapping[str, Any]] = []
    lines = _read_text(path, "run its job again.").splitlines()
    for index, line in enumerate(lines):
        try:
            rows.append(_object(json.loads(line), f"line {index + 1}", path, "run its job again."))
        except json.JSONDecodeError as error:
            # A kill in mid-write leaves a torn last line; the job that resumes writes that row again.
            if index + 1 == len(lines):
                break
            raise InputError(f"{path} is not JSON on line {index + 1} ({error}); remove that line.") from error
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    # A resumed run may repeat steps: the last row of a step is the one that the parameters went on from.
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = {name for row in ordered for name, value in row.items() if isinstance(value, int | float)}
    return {
        name: np.array(
            [value if isinstance(value := row.get(name), int | float) else math.nan for row in ordered], float
        )
        for name in names
    }


def _read_arrays(path: pathlib.Path, remedy: str) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path} is missing; {remedy}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name], float) for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a whole NumPy archive ({error}); remove it, and {remedy}") from error
    for name in REWARD_ARRAYS:
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r}; {remedy}")
    for name, array in arrays.items():
        if name in REWARD_ARRAYS + GOLD_ARRAYS and (array.ndim != 2 or array.size == 0 or not np.isfinite(array).all()):
            raise InputError(
                f"{path} has {name!r} of shape {array.shape} with {int((~np.isfinite(array)).sum())} values that are "
                f"not finite, where finite rewards [prompts, responses] must stand; {remedy}"
            )
    return arrays


def _read_samples(path: pathlib.Path, remedy: str) -> list[Mapping[str, Any]]:
    rows = _read_lines(path)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise InputError(f"{path} has no prompt on line {index + 1}; {remedy}")
        for side in ("policy", "reference"):
            if not isinstance(_object(row.get(side), side, path, remedy).get("text"), str):
                raise InputError(f"{path} has no {side}.text on line {index + 1}; {remedy}")
    return rows
