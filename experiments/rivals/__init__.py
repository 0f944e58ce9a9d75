"""Every algorithm at three strengths on one axis: best-of-4 win rate against KL, with one reference, data and reward.

Claim     At equal KL the algorithms that train for best-of-4 are ahead of those that do not, and CTRL's exponential(10)
          is among the first.
Cost      Two hours and a quarter of two cores (`--jobs 2`), stages included: 66 points of two minutes each.
Expected  At equal KL the functional derivative, CTRL with a critic, PPO-clip, k-sample and group projection are within
          .3 points of exponential(10); QRPO and weighted likelihood .6 behind, RLHF 3, GRPO 4, the identity 5 to 6,
          vBoN and BOND 6 to 8, DPO and IPO 10 (docs/rivals.md).
Command   make train EXP=rivals        make sweep EXP=rivals
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from ctrl_jax.config import Calibration, Experiment
from experiments import (
    actor_critic_helpful,
    baseline_identity,
    baseline_raw,
    bon_helpful,
    dpo_helpful,
    group_projection_helpful,
    ppo_clip_helpful,
    regression_helpful,
    weighted_likelihood_helpful,
)
from experiments.rivals import (
    best_of_n_sft,
    bon_rl,
    bonbon,
    bond,
    functional_derivative,
    grpo,
    ipo,
    j_bond,
    k_sample,
    reward_distillation,
    robust_dpo,
    slic,
    vbon,
)

BASELINE = "exponential(10)"
"""The method beside which the others are set."""

BUDGETS = [{"kl_budget": kl} for kl in (0.3, 0.6, 1.0)]
BEST_OF = [{"samples_per_prompt": n, "prompts_per_step": 512 // n} for n in (2, 4, 8)]
"""The law of best-of-n has the KL log n − (n − 1) / n: .19, .64 and 1.20 nats."""
HELD = [{"beta": 1 / (n - 1)} for n in (2.5, 3.9, 6.3)]
"""Of vBoN and BOND, whose optimum is best-of-n at β = 1 / (n − 1): .32, .62 and 1.00 nats."""

STRENGTHS: dict[ModuleType, list[dict[str, Any]]] = {
    bon_helpful: BUDGETS,
    baseline_identity: BUDGETS,
    actor_critic_helpful: BUDGETS,
    ppo_clip_helpful: BUDGETS,
    baseline_raw: BUDGETS,
    grpo: BUDGETS,
    k_sample: BUDGETS,
    bon_rl: BUDGETS,
    functional_derivative: BUDGETS,
    j_bond: BUDGETS,
    vbon: HELD,
    bond: HELD,
    regression_helpful: BUDGETS,
    group_projection_helpful: BUDGETS,
    weighted_likelihood_helpful: BUDGETS,
    reward_distillation: BUDGETS,
    best_of_n_sft: BEST_OF,
    bonbon: BEST_OF,
    dpo_helpful: [{"beta": beta} for beta in (2.0, 1.0, 0.6)],
    robust_dpo: [{"beta": beta} for beta in (2.0, 1.0, 0.6)],
    ipo: [{"beta": beta} for beta in (0.3, 0.15, 0.1)],
    slic: [{"margin": margin} for margin in (0.3, 1.0, 3.0)],
}
"""The options that make each algorithm's runs weaker or stronger, by its experiment."""


SHORT = {"kl_budget": "kl", "samples_per_prompt": "n"}


def experiment() -> Experiment:
    """CTRL, beside which the others are set."""
    return replace(bon_helpful.experiment(), name="rivals")


def sweep() -> list[Experiment]:
    return list(points(STRENGTHS))


def points(strengths_of: Mapping[ModuleType, list[dict[str, Any]]]) -> Iterator[Experiment]:
    """All with kept responses, so that their calibration table is made once."""
    for module, strengths in strengths_of.items():
        base = module.experiment()
        for options in strengths:
            option, value = next(iter(options.items()))
            said = f"{SHORT.get(option, option)}{value:.2g}"
            yield replace(
                base,
                name=f"{base.name}_{said}",
                calibration=Calibration(keep_responses=True),
                policy=replace(base.policy, **options),
            )
