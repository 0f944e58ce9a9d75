"""Two evaluated runs on the same prompts: what each measured, and their paired differences with 95 % intervals.

Each win rate is against the reference under the procedure, so both runs must have been evaluated beside the same
responses of the same reference. What is computed here follows from the two `evaluation.npz` alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import ALONG_ARRAYS, KL_ARRAY, Estimate
from ctrl_jax.report.html import brackets, signed
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.names import spoken
from ctrl_jax.steps import comparison, win_rate
from ctrl_jax.steps.comparison import Curve
from ctrl_jax.theory import procedures
from ctrl_jax.theory.precision import double_precision

OF_THE_REFERENCE = (
    "contents", "seed", "data", "model", "sft", "reward_model", "combine", "policy.temperature", "evaluation.prompts",
    "evaluation.responses_per_prompt",
)  # fmt: skip
"""The entries of config.json that the reference's evaluation depends on."""


class Difference(NamedTuple):
    """What two runs measured of one thing, and run − baseline with its paired interval."""

    run: float
    baseline: float
    difference: Estimate

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval of the difference does; None where there is none."""
        low, high = self.difference.low, self.difference.high
        return None if low is None or high is None else low > 0 or high < 0

    @property
    def verdict(self) -> str:
        """In words."""
        if self.excludes_zero is None:
            return "no interval"
        higher = "higher" if self.difference.mean > 0 else "lower"
        return f"{higher}: the interval excludes 0" if self.excludes_zero else "the interval includes 0"

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "baseline": self.baseline,
            "difference": self.difference._asdict(),
            "excludes_zero": self.excludes_zero,
        }


@dataclass(frozen=True)
class Comparison:
    """A run beside a baseline."""

    run: str
    """Its name, as that of the baseline."""
    baseline: str
    prompts: int
    procedure: str
    """That the run was trained for."""
    win_rates: Mapping[str, Difference]
    """By the training reward, by procedure."""
    gold_win_rates: Mapping[str, Difference] = field(default_factory=dict)
    """Of the same picks, where both runs have a gold reward."""
    judge_win_rates: Mapping[str, Difference] = field(default_factory=dict)
    """Likewise, where both have the same independent judge."""
    kl: Difference | None = None
    """Nats per response; None where a run was evaluated by an older version, which kept no KL by prompt."""
    equal_kl: float | None = None
    """The highest KL that both trainings measured, nats; None where they were not measured along their way, or have no
    KL in common."""
    at_equal_kl: Mapping[str, Difference] = field(default_factory=dict)
    """Win rates by procedure at that KL, by interpolation along both trainings."""

    def as_json(self) -> dict[str, Any]:
        tables = ("win_rates", "gold_win_rates", "judge_win_rates", "at_equal_kl")
        return {
            "run": self.run,
            "baseline": self.baseline,
            "prompts": self.prompts,
            "procedure": self.procedure,
            "kl": None if self.kl is None else self.kl.as_json(),
            "equal_kl": self.equal_kl,
            **{name: {key: one.as_json() for key, one in getattr(self, name).items()} for name in tables},
        }


def compare(run: Run, baseline: Run, *, names: tuple[str, str]) -> Comparison:
    """The run beside the baseline, by every procedure that both have.

    Args:
      run: what was measured of it.
      baseline: likewise.
      names: of the two.

    Raises:
      InputError: if they were not evaluated beside the same responses of the same reference, or the baseline not under
        the procedure that the run was trained for.
    """
    check_same_reference(run, baseline, names=names)
    if run.procedure not in baseline.evaluation.win_rates:
        raise InputError(
            f"{names[0]} was trained for {run.procedure}, under which {names[1]} was not evaluated",
            field="evaluation.procedures",
            value=list(baseline.evaluation.win_rates),
            remedy=f"evaluate it with {run.procedure} too.",
        )
    rules = [rule for rule in run.evaluation.win_rates if rule in baseline.evaluation.win_rates]
    judges = {"gold": True, "judge": run.evaluation.judge_fingerprint == baseline.evaluation.judge_fingerprint}
    sides = (run, baseline)
    with double_precision():
        tables = {
            f"{judge}_win_rates": {rule: _paired(*(win_rates(one, rule, judge) for one in sides)) for rule in rules}
            for judge, same in judges.items()
            if same and all(f"policy_{judge}" in one.arrays for one in sides)
        }
        equal_kl, at_equal_kl = _at_equal_kl(run, baseline, rules)
        return Comparison(
            run=names[0],
            baseline=names[1],
            prompts=len(run.arrays["policy_rewards"]),
            procedure=run.procedure,
            win_rates={rule: _paired(*(win_rates(one, rule) for one in sides)) for rule in rules},
            kl=_paired(*(one.arrays[KL_ARRAY] for one in sides))
            if all(KL_ARRAY in one.arrays for one in sides)
            else None,
            equal_kl=equal_kl,
            at_equal_kl=at_equal_kl,
            **tables,
        )


def check_same_reference(run: Run, baseline: Run, *, names: tuple[str, str]) -> None:
    """Raises InputError unless both were evaluated beside the same responses of one reference, by the same reward."""
    kept, nothing = ("reference_rewards", "reference_lengths"), np.empty(0)
    if all(np.array_equal(run.arrays.get(name, nothing), baseline.arrays.get(name, nothing)) for name in kept):
        return
    ours, theirs = _entries(run.config), _entries(baseline.config)
    apart = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    problem = f"{names[0]} and {names[1]} were not evaluated beside the same responses of one reference"
    if not apart:
        raise InputError(
            problem,
            field="reference_rewards",
            value=None,
            remedy="their options are the same, but each has another evaluation of the reference. Give both one "
            "`runs_dir`, whose stages they then share, and evaluate them again.",
        )
    values = ours.get(apart[0]), theirs.get(apart[0])
    raise InputError(
        f"{problem}: `{apart[0]}` is {values[0]!r:.80} for the first and {values[1]!r:.80} for the second",
        field=apart[0],
        value=values,
        remedy="runs are compared prompt by prompt where they share data, reference, reward, seed and the size of the "
        "evaluation; train one of them with the other's.",
    )


def sentences(one: Comparison) -> str:
    """Which of two runs wins more under the procedure that the first was trained for, and whether that is sure."""
    said = _said(one, one.win_rates[one.procedure], f"under {spoken(one.procedure)}")
    if one.procedure not in one.at_equal_kl:
        return said
    place = f"at equal KL, {one.equal_kl:.3f} nats along both trainings"
    return f"{said} {_said(one, one.at_equal_kl[one.procedure], place)}"


def _said(one: Comparison, found: Difference, place: str) -> str:
    mean, interval = signed(found.difference.mean), brackets(found.difference, sign="+")
    if found.excludes_zero is None:
        return f"{one.run} less {one.baseline} {place}: {mean} points, without an interval."
    if not found.excludes_zero:
        return (
            f"{one.prompts} prompts show no difference between {one.run} and {one.baseline} {place}: {mean} points, "
            f"and the interval {interval} includes 0."
        )
    more = "more" if found.difference.mean > 0 else "less"
    return f"{one.run} wins {mean[1:]} points {more} than {one.baseline} {place}: the interval {interval} excludes 0."


def _entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference's evaluation depends on, by its path in a configuration."""

    def flat(tree: Any, path: str) -> dict[str, Any]:
        if not isinstance(tree, Mapping):
            return {path: tree}
        return {name: value for key, one in tree.items() for name, value in flat(one, f"{path}.{key}").items()}

    found = {name: value for key, tree in config.items() for name, value in flat(tree, key).items()}
    if "policy.floors" in found:  # rewards that are constrained are not made one with the one that is evaluated
        found = {name: value for name, value in found.items() if "combine" not in name}
    return {
        name: value
        for name, value in found.items()
        if any(name == entry or name.startswith(f"{entry}.") for entry in OF_THE_REFERENCE)
    }


def curve(run: Run, procedure: str) -> Curve | None:
    """Win rates of a run against its KL, along its training and at its end; None where it was not measured there."""
    if not {*ALONG_ARRAYS, KL_ARRAY} <= run.arrays.keys():
        return None
    rule, reference = procedures.parse(procedure), jnp.asarray(run.arrays["reference_rewards"])
    win_rates = [
        win_rate.win_rate(jnp.asarray(rewards), reference, rule)
        for rewards in (*run.arrays["along_rewards"], run.arrays["policy_rewards"])
    ]
    kl = np.concatenate([run.arrays["along_kl"], run.arrays[KL_ARRAY][None]])
    return comparison.of_training(kl, np.stack(win_rates))


def _at_equal_kl(run: Run, baseline: Run, rules: Sequence[str]) -> tuple[float | None, dict[str, Difference]]:
    """(the highest KL that both curves have, the win rates by procedure there); (None, nothing) without one."""
    kl, found = None, {}
    for rule in rules:
        ours, theirs = curve(run, rule), curve(baseline, rule)
        both = None if ours is None or theirs is None else comparison.kl_range(ours, theirs)
        if ours is not None and theirs is not None and both is not None:
            kl = both[1]  # the same for every procedure
            found[rule] = at_kl(ours, theirs, kl)
    return kl, found


def at_kl(run: Curve, baseline: Curve, kl: float) -> Difference:
    """Two curves at a KL that both have."""
    run_there, baseline_there = (float(comparison.at_kl(one, kl, _key()).mean) for one in (run, baseline))
    return Difference(run_there, baseline_there, Estimate.of(*comparison.difference_at_kl(run, baseline, kl, _key())))


def win_rates(run: Run, procedure: str, judge: str | None = None) -> np.ndarray:
    """[B] of the policy's picks by the training reward, as that or another judge decides."""
    rule = procedures.parse(procedure)
    policy, reference = (jnp.asarray(run.arrays[f"{side}_rewards"]) for side in ("policy", "reference"))
    if judge is None:
        return np.asarray(win_rate.win_rate(policy, reference, rule))
    ours, theirs = (jnp.asarray(run.arrays[f"{side}_{judge}"]) for side in ("policy", "reference"))
    return np.asarray(win_rate.judged_win_rate(policy, reference, ours, theirs, rule))


def _paired(run: np.ndarray, baseline: np.ndarray) -> Difference:
    found = comparison.difference(jnp.asarray(run), jnp.asarray(baseline), _key())
    return Difference(float(run.mean()), float(baseline.mean()), Estimate.of(*found))


def _key() -> jax.Array:
    """Draws the resamples of every difference: the same ones, so that two of them can be compared."""
    return jax.random.key(0)
