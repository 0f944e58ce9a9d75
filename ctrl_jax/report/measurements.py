"""What the jobs measured, read from their files and checked, so that figures and page need not ask again.

Rewards are *raw* (the reward model's score), *calibrated* (their rank among the reference's rewards of the same
prompt, in [0, 1]) or *transformed* (Φ of that rank). KL is in nats per response. Intervals are 95 %.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrl_jax.checked_json import JsonFile, finite, parse
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import (
    ALONG_ARRAYS,
    FEW_PAIRS,
    KL_ARRAY,
    MARGINS_ARRAY,
    RELIABILITY_ARRAYS,
    REWARD_ARRAYS,
    VALIDATION_ARRAYS,
    Evaluation,
    RewardTraining,
)
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import parse_transform


@dataclass(frozen=True)
class Run:
    """A work directory after its evaluation. What is optional is empty where its file is missing."""

    config: Mapping[str, Any]
    evaluation: Evaluation
    arrays: Mapping[str, np.ndarray]
    """evaluation.npz: rewards and lengths [B, M], KL [B]; gold, judge and reliability arrays where they exist."""
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


def reward_warnings(evaluation: Evaluation) -> list[str]:
    """What to say of a reward model that may not be worth climbing, and what to do."""
    quality, found = evaluation.reward_model, []
    if quality.accuracy is not None and quality.is_chance:
        found.append(
            "As far as these held-out pairs show, the reward model is no better than chance: a policy that climbs "
            "it may gain nothing. Give it more pairs (`data.prompt_length`, `reward_model.long_prompts=truncate`), or "
            "stop its training where it begins to learn by heart (`reward_model.validation.every`), or fit a linear "
            "one (`reward_model.linear`)."
        )
    if quality.accuracy is not None and quality.pairs is not None and quality.pairs < FEW_PAIRS:
        found.append(
            f"The reward model is judged on {quality.pairs} held-out pairs; fewer than {FEW_PAIRS} say little. "
            "Give the test split more pairs, or let in those of longer prompts (`data.prompt_length`, "
            "`reward_model.long_prompts=truncate`)."
        )
    return found


def floor_warnings(evaluation: Evaluation) -> list[str]:
    """What to say of rewards that the policy was to keep at floors and did not, and what to do."""
    return [
        f"The policy does not keep {name} at its floor: mean rank {one.mean_rank}, and {one.floor:g} was asked for. "
        "Train it for longer (`policy.steps`), ask for less (`policy.floors`), or leave it more KL for both "
        "(`policy.kl_budget`)."
        for name, one in evaluation.floors.items()
        if not one.is_kept
    ]


def trained_on(training: RewardTraining) -> str:
    """A sentence about the pairs that a reward model learned from."""
    lengths = [f"{training.cut} with the beginning of their prompt cut off"] * bool(training.cut)
    lengths += [f"{training.dropped} more left out, for their prompt is too long"] * bool(training.dropped)
    text = ", ".join([f"The reward model was trained on {training.pairs} pairs", *lengths])
    if training.used_step is None:
        return f"{text}."
    return (
        f"{text}. Of its {training.steps} steps that of step {training.used_step} is used, the best by the likelihood "
        f"of {training.validation_pairs} validation pairs."
    )


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
    evaluation = Evaluation.from_json(
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


def _read_config(path: pathlib.Path) -> Mapping[str, Any]:
    remedy = "`make train`, with the options of the run, writes it anew where there is none; nothing is trained again."
    file = JsonFile(path, remedy)
    config = file.object(_read_json(path, remedy), "the configuration")
    file.text(config.get("name"), "name")
    policy = file.under(config, "policy")
    transform, procedure = (file.text(policy.get(name), f"policy.{name}") for name in ("transform", "procedure"))
    file.optional(policy.get("beta"), "policy.beta")
    try:
        procedures.parse(procedure)
        data = config.get("data")
        if not (isinstance(data, Mapping) and data.get("source") == "given"):  # by a program, whose Φ may be a function
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


def _read_json(path: pathlib.Path, remedy: str) -> Any:
    text = _read_text(path, remedy)
    try:
        return parse(text)
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
            rows.append(JsonFile(path, remedy).object(parse(line), f"line {index + 1}"))
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
    kl = arrays.get(KL_ARRAY, np.zeros(prompts))
    if kl.shape != (prompts,) or not np.isfinite(kl).all():
        raise InputError(f"{path} has {KL_ARRAY!r} of shape {kl.shape} that is no finite KL a prompt; {remedy}")
    _check_along(path, arrays, prompts, remedy)
    margins = arrays.get(MARGINS_ARRAY, np.zeros(1))
    if margins.ndim != 1 or margins.size == 0 or not np.isfinite(margins).all():
        raise InputError(f"{path} has {MARGINS_ARRAY!r} that is no column of finite numbers; {remedy}")
    for what, names in (("reliability", RELIABILITY_ARRAYS), ("validation", VALIDATION_ARRAYS)):
        columns = [arrays[name] for name in names if name in arrays]
        if any(array.ndim != 1 or array.shape != columns[0].shape for array in columns):
            raise InputError(f"{path} has {what} arrays that are no columns of one table; {remedy}")
    return arrays


def _check_along(path: pathlib.Path, arrays: Mapping[str, np.ndarray], prompts: int, remedy: str) -> None:
    """Steps [P], rewards [P, B, M] and KLs [P, B]: all or none."""
    found = [arrays[name] for name in ALONG_ARRAYS if name in arrays]
    if not found:
        return
    shapes = [array.shape for array in found]
    points = shapes[0][:1]
    right = len(found) == 3 and shapes[0] == points and shapes[1][:2] == shapes[2] == (*points, prompts)
    if not right or len(shapes[1]) != 3 or 0 in shapes[1] or not all(np.isfinite(array).all() for array in found):
        raise InputError(
            f"{path} has arrays along the training of shapes {shapes}, where finite ones of [points], [points, "
            f"prompts, responses] and [points, prompts] must stand, of {prompts} prompts; {remedy}"
        )


def _read_samples(path: pathlib.Path, remedy: str) -> list[Mapping[str, Any]]:
    rows = _read_lines(path, remedy)
    file = JsonFile(path, remedy)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise InputError(f"{path} has no prompt on line {index + 1}; {remedy}")
        for side in ("policy", "reference"):
            if not isinstance(file.object(row.get(side), f"{side} of line {index + 1}").get("text"), str):
                raise InputError(f"{path} has no {side}.text on line {index + 1}; {remedy}")
    return rows
