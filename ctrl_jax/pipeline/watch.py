"""What the metrics of a policy's training say about its health: which checkpoint is best, and when to stop."""

import math
import statistics
from collections.abc import Callable, Sequence

from ctrl_jax.config import Policy, Stored, Supervised
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.metrics import RECENT, Row
from ctrl_jax.theory.objective import Raw
from ctrl_jax.theory.procedures import Sampling

BRAKED = 0.25
"""The share of the optimiser's update below which the brake (steps/kl_budget.py) is worth telling."""

TOLERANCE = 1.1
"""Times the budget that still counts as within it: the controller swings about the budget."""

BELOW_FLOORS = 0.02
"""How far below a floor a mean rank of five steps still counts as keeping it: its standard error is about as much."""

OUT_OF_REACH = 12.0
"""Nats per rank: near the reference, a multiplier (steps/multipliers.py) of so many would raise a mean rank by 1."""


def score(policy: Policy, recent: Sequence[Row]) -> float:
    """The calibrated reward, in [0, 1], where the KL is within the budget and floors are kept; else below 0, the nearer
    the better.

    Of an algorithm that does not sample from the policy, and so measures neither, it is the loss, negated.
    """
    if "kl" not in recent[-1]:
        return -_mean(recent, "loss")
    kl = _mean(recent, "kl")
    if kl > TOLERANCE * policy.kl_budget:
        return -kl
    missing = _mean(recent, "above_floors") if "above_floors" in recent[-1] else 0.0
    return missing if missing < -BELOW_FLOORS else _mean(recent, "calibrated_reward")


FLAT = 1e-3
"""β against Φ on its range [0, 1]: below it, what a policy has to learn of Φ is smaller than any it can."""


def too_flat(policy: Policy, beta: float | None) -> str | None:
    """What to say of a KL budget that the transform reaches only where it is flat; None of another.

    An exponential of rate −t sees ranks up to some 1 / t. To be rid of these takes −log(1 − 1 / t) nats; a budget far
    beyond that asks for differences of Φ that hardly exist.
    """
    if beta is None or policy.beta is not None or beta >= FLAT or isinstance(policy.objective.transform, Raw):
        return None
    return (
        f"{policy.transform} reaches {policy.kl_budget:g} nats at β = {beta:.2g}: it is all but flat at the ranks that "
        "are left there, and little can be learned of them. Lower `policy.kl_budget`, or choose a transform with more "
        "slope, such as identity or an exponential of a smaller rate."
    )


STILL = 10
"""Steps that change nothing, one after the other, after which a training stops."""

NOTHING = 1e-13
"""The change of a parameter's entry that counts as none. An entry that is 0, as biases begin, takes any update, however
small; but 100,000 of these are still below the last digit of a float32 near 1."""


def moving(label: str, option: str, stage: Policy | Supervised) -> Callable[[Sequence[Row]], None]:
    """A function of the last rows of metrics that raises InputError where the last STILL steps have changed nothing.

    That is where no entry in the first row of any parameter (programs.guarded) has moved by more than NOTHING. Steps of
    the warmup, which starts at a learning rate of 0, do not count, nor does the last tenth, where a cosine ends near 0.
    `option` is the experiment's field of the stage, such as sft.
    """
    still = 0

    def watch(recent: Sequence[Row]) -> None:
        nonlocal still
        row = recent[-1]
        counts = stage.warmup_steps < row["step"] <= 0.9 * stage.steps
        still = still + 1 if counts and row.get("largest_update", math.inf) <= NOTHING else 0
        if still >= STILL:
            raise InputError(
                f"{label}: the last {STILL} steps, up to {row['step']}, have changed no parameter (by more than "
                f"{row['largest_update']:.1g}). {_why_still(option, stage, row)}"
            )

    return watch


def _why_still(option: str, stage: Policy | Supervised, row: Row) -> str:
    norm, sampled = row["gradient_norm"], isinstance(stage, Policy) and "beta" in row
    if isinstance(stage, Policy) and norm == 0 and row.get("constant_rewards") == 1:
        return (
            "All rewards of every prompt are equal, so that all advantages are 0: the policy writes one response alone "
            f"(`policy.temperature` is {stage.temperature:g}), or the reward cannot tell responses apart."
        )
    if isinstance(stage, Policy) and norm == 0 and sampled:
        return (
            f"The gradient is 0, though rewards differ: β, which they are divided by, is {row['beta']:.3g}. Lower "
            "`policy.beta`, or leave it out, so that it follows from the budget; or choose a `policy.transform`, now "
            f"{stage.transform}, that is not flat where the policy's ranks are (mean {row['calibrated_reward']:.3g})."
        )
    if norm == 0:
        return (
            f"The gradient is 0, and the loss {row['loss']:.3g}: there is nothing left to learn (fewer "
            f"`{option}.steps` would do), or the examples hold nothing that the model can tell apart."
        )
    clip = f", clipped at `policy.max_gradient_norm` {stage.max_gradient_norm:g}" if isinstance(stage, Policy) else ""
    divided = f" (the rewards are divided by β, {row['beta']:.3g})" if sampled else ""
    return (
        f"The gradient's norm is {norm:.3g}{divided}{clip}, and `{option}.learning_rate` is {stage.learning_rate:g}: "
        "the update is below the last digit of every parameter in float32. Raise what is too small of these."
    )


PAID = 1 / 3
"""The share of the ideal policy's gain in rank below which a KL is worth telling: nine tenths of it buy nothing."""
PAID_STEPS = 20


def paying(label: str, policy: Policy) -> Callable[[Sequence[Row]], None]:
    """A function of the last rows of metrics that says, once, where the KL buys little of the reward.

    Near the reference the gain in rank goes with the root of the KL: a policy with a share s of the ideal one's gain at
    its KL would have it for s² of that KL. The rest is what the updates move at random. Judged on PAID_STEPS steps at a
    time, by the upper end of the 95 % interval of their mean rank, and from a quarter of the budget on: below, a mean
    rank has as much noise as there is to gain.
    """
    rows: list[Row] = []
    told = False

    def watch(recent: Sequence[Row]) -> None:
        nonlocal told
        row = recent[-1]
        if told or row["step"] <= policy.warmup_steps or not row.keys() >= {"kl", "calibrated_reward"}:
            return
        if row.get("multiplier", 0.0) > 0:  # a part of the KL pays for the floors
            return
        rows.append(row)
        if len(rows) < PAID_STEPS:
            return
        rank, kl = _mean(rows, "calibrated_reward"), _mean(rows, "kl")
        error = statistics.stdev(row["calibrated_reward"] for row in rows) / math.sqrt(PAID_STEPS)
        rows.clear()
        ideal = _ideal_rank(policy, kl) if kl >= 0.25 * policy.kl_budget else None
        if ideal is None or rank + 1.96 * error - 0.5 >= PAID * (ideal - 0.5):
            return
        told = True
        say(
            f"{label}: in the {PAID_STEPS} steps up to {row['step']} a response had a mean rank of {rank:.3f} at a KL "
            f"of {kl:.3g}, for which the ideal policy has {ideal:.3f}. Most of this KL is what the updates do at "
            f"random. A lower `policy.learning_rate`, which is {policy.learning_rate:g}, with more `policy.steps`, or "
            "more responses a step (`policy.prompts_per_step`), gets more of the reward for it; if neither does, the "
            "reward is one that this model can hardly learn, or gives many responses the same.",
            style="yellow",
        )

    return watch


_OF_FLOORS = (
    "The floors (`policy.floors`) ask for more than this KL buys, or against each other: lower them, or raise "
    "`policy.kl_budget`."
)


def reaching(label: str) -> Callable[[Sequence[Row]], None]:
    """A function of the last rows of metrics that says, once, where floors cost more than they can (OUT_OF_REACH)."""
    told = False

    def watch(recent: Sequence[Row]) -> None:
        nonlocal told
        if told or len(recent) < RECENT or not all(row.get("multiplier", 0.0) > OUT_OF_REACH for row in recent):
            return
        told = True
        say(
            f"{label}: up to step {recent[-1]['step']}, a rank of a constrained reward has come to be worth "
            f"{recent[-1]['multiplier']:.3g} nats (metric `multiplier`). {_OF_FLOORS}",
            style="yellow",
        )

    return watch


def _ideal_rank(policy: Policy, kl: float) -> float | None:
    """The mean rank of the ideal policy at a KL; None of a raw reward, or where no policy has that KL."""
    try:
        ideal = policy.objective.ideal(kl)
    except InputError:
        return None
    return None if ideal is None else ideal.win_rate(Sampling())


def watcher(label: str, policy: Policy) -> Callable[[Sequence[Row]], None]:
    """A function of the last rows of metrics that warns once of constant rewards, of a brake that is on, of floors that
    are out of reach, and of a KL that buys little (`paying`).

    It raises InputError where the KL, a mean of the rows, is beyond `policy.kl_limit` times the budget, and where the
    policy no longer changes (`moving`).
    """
    see_it_move, see_it_pay, see_floors = moving(label, "policy", policy), paying(label, policy), reaching(label)
    limit = policy.kl_limit
    # From stored responses the KL is an estimate in which a single one of a large ratio may count for a thousand nats.
    estimated = isinstance(policy, Stored)
    if limit is None and policy.beta is None and not estimated:
        limit = 10.0
    warned = told = False

    def watch(recent: Sequence[Row]) -> None:
        nonlocal warned, told
        see_it_move(recent)
        see_floors(recent)
        if not estimated:
            see_it_pay(recent)
        if len(recent) < RECENT or "kl" not in recent[-1]:
            return
        if not warned and all(row["constant_rewards"] == 1 for row in recent):
            warned = True
            say(
                f"{label}: in each of the last {RECENT} steps, up to {recent[-1]['step']}, all rewards of "
                "every prompt were equal: there is nothing to learn from them. Either the policy writes one response "
                "alone (lower `policy.kl_budget` or `policy.learning_rate`), or the reward gives all "
                "responses the same.",
                style="yellow",
            )
        if not told and all(row.get("update_share", 1.0) < BRAKED for row in recent):
            told = True
            say(
                f"{label}: of the last {RECENT} updates, up to step {recent[-1]['step']}, "
                f"{_mean(recent, 'update_share'):.0%} was made: whole ones would carry the KL past its budget of "
                f"{policy.kl_budget:g}. A lower `policy.learning_rate`, which is {policy.learning_rate:g}, learns as "
                "fast, and steadier.",
                style="yellow",
            )
        kl = _mean(recent, "kl")
        if limit is not None and kl > limit * policy.kl_budget:
            raise InputError(
                f"{label}: the KL has run away. It is {kl:.3g} nats per response, the mean of the last {RECENT} steps, "
                f"up to {recent[-1]['step']}: {kl / policy.kl_budget:.3g} times the budget of {policy.kl_budget:g}, "
                f"where `policy.kl_limit` allows {limit:g}. {_cause(policy, recent)} The checkpoints of earlier steps "
                "stay, and the best within the budget is one of them."
            )

    return watch


def _cause(policy: Policy, recent: Sequence[Row]) -> str:
    first, last = recent[0], recent[-1]
    if policy.beta is not None:
        return (
            f"β is held at {policy.beta:g}, too small for this budget: raise `policy.beta`, or leave it out, so that "
            "it follows from the budget."
        )
    if last.get("multiplier", 0.0) > OUT_OF_REACH:
        return _OF_FLOORS
    if last["kl"] > 3 * max(first["kl"], policy.kl_budget):
        return (
            f"It rose from {first['kl']:.3g} to {last['kl']:.3g} within these steps, faster than any β could hold it: "
            f"lower `policy.learning_rate`, which is {policy.learning_rate:g}."
        )
    if _mean(recent, "calibrated_reward") > 0.95:
        return (
            f"The calibrated reward is {_mean(recent, 'calibrated_reward'):.3g}: the policy writes what the reward "
            "prizes above nearly all that the reference writes, and goes on. Look whether it is any good (`make "
            "sample`): it may be a weakness of the reward model (reward hacking), which longer training or more data "
            "mends."
        )
    return (
        f"β, which is {last['beta']:.3g} by now, does not hold it: lower `policy.learning_rate`, which is "
        f"{policy.learning_rate:g}, or hold a larger `policy.beta`."
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
