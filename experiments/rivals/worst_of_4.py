"""Every algorithm that is not made for best-of-N at three strengths on one axis, decoded with worst-of-4.

Claim     At equal KL CTRL's exponential(-10) is ahead of the algorithms that do not know how they are decoded.
Cost      Not yet measured: 45 points of a minute or two, after won_harmless's stages, which they share; the calibration
          table is made anew once, with its responses.
Expected  Not yet measured.
Command   make train EXP=rivals/worst_of_4        make sweep EXP=rivals/worst_of_4
"""

from dataclasses import replace

from ctrl_jax.config import Experiment
from experiments import rivals, won_harmless
from experiments.rivals import best_of_n_sft, bon_rl, bonbon, bond, j_bond, k_sample, vbon

BASELINE = "exponential(-10)"

BUDGETS = [{"kl_budget": kl} for kl in (0.15, 0.3, 0.5)]
FOR_BEST_OF_N = (k_sample, bon_rl, j_bond, vbon, bond, best_of_n_sft, bonbon)
STRENGTHS = {
    module: BUDGETS if strengths is rivals.BUDGETS else strengths
    for module, strengths in rivals.STRENGTHS.items()
    if module not in FOR_BEST_OF_N
}

OTHER_END = {"exponential(10)": "exponential(-10)"}
"""The transform of the lower end in place of the upper's."""


def experiment() -> Experiment:
    """CTRL, beside which the others are set."""
    return replace(won_harmless.experiment(), name="worst_of_4")


def sweep() -> list[Experiment]:
    return [_at_the_other_end(point) for point in rivals.points(STRENGTHS)]


def _at_the_other_end(point: Experiment) -> Experiment:
    transform = OTHER_END.get(point.policy.transform, point.policy.transform)
    policy = replace(point.policy, procedure="worst_of_4", transform=transform)
    return replace(point, name=point.name.replace("helpful", "harmless"), data=experiment().data, policy=policy)
