"""What the metrics of a policy's training say about its health: which checkpoint is best, and when to stop."""

from collections.abc import Callable, Sequence

from ctrl_jax.config import Policy
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.metrics import RECENT, Row

TOLERANCE = 1.1
"""Times the budget that still counts as within it: the controller swings about the budget."""


def score(policy: Policy, recent: Sequence[Row]) -> float:
    """The calibrated reward, in [0, 1], where the KL is within the budget; else below 0, the nearer the better."""
    kl = _mean(recent, "kl")
    return _mean(recent, "calibrated_reward") if kl <= TOLERANCE * policy.kl_budget else -kl


def watcher(label: str, policy: Policy) -> Callable[[Sequence[Row]], None]:
    """A function of the last rows of metrics that warns once of constant rewards.

    It raises InputError where the KL, a mean of the rows, is beyond `policy.kl_limit` times the budget.
    """
    limit = policy.kl_limit
    if limit is None and policy.beta is None:
        limit = 10.0
    told = False

    def watch(recent: Sequence[Row]) -> None:
        nonlocal told
        if len(recent) < RECENT:
            return
        if not told and all(row["constant_rewards"] == 1 for row in recent):
            told = True
            say(
                f"{label}: in each of the last {RECENT} steps, up to {recent[-1]['step']}, all rewards of "
                "every prompt were equal: there is nothing to learn from them. Either the policy writes one response "
                "alone (lower --policy.kl-budget or --policy.learning-rate), or the reward cannot tell responses "
                "apart.",
                style="yellow",
            )
        kl = _mean(recent, "kl")
        if limit is not None and kl > limit * policy.kl_budget:
            raise InputError(
                f"{label}: the KL has run away. It is {kl:.3g} nats per response, the mean of the last {RECENT} steps, "
                f"up to {recent[-1]['step']}: {kl / policy.kl_budget:.3g} times the budget of {policy.kl_budget:g}, "
                f"where --policy.kl-limit allows {limit:g}. {_cause(policy, recent)} The checkpoints of earlier steps "
                "stay, and the best within the budget is one of them."
            )

    return watch


def _cause(policy: Policy, recent: Sequence[Row]) -> str:
    first, last = recent[0], recent[-1]
    if policy.beta is not None:
        return (
            f"β is held at {policy.beta:g}, too small for this budget: raise --policy.beta, or leave it out, so that "
            "it follows from the budget."
        )
    if last["kl"] > 3 * max(first["kl"], policy.kl_budget):
        return (
            f"It rose from {first['kl']:.3g} to {last['kl']:.3g} within these steps, faster than any β could hold it: "
            f"lower --policy.learning-rate, which is {policy.learning_rate:g}."
        )
    if _mean(recent, "calibrated_reward") > 0.95:
        return (
            f"The calibrated reward is {_mean(recent, 'calibrated_reward'):.3g}: the policy writes what the reward "
            "prizes above nearly all that the reference writes, and goes on. Look whether it is any good (`make "
            "sample`): it may be a weakness of the reward model (reward hacking), which longer training or more data "
            "mends."
        )
    return (
        f"β, which is {last['beta']:.3g} by now, does not hold it: lower --policy.learning-rate, which is "
        f"{policy.learning_rate:g}, or hold a larger --policy.beta."
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
