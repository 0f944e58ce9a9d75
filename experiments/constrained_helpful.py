"""bon_helpful under a constraint: as helpful as it can be, and by rank as brief as the reference.

Claim     bon_helpful's policy writes more words than the reference, which its reward likes. Here its mean rank by
          brevity stays at .5, that of the reference, at the same KL.
Cost      That of bon_helpful, whose stages it shares, and half a minute for the reference's own brevity.
Expected  KL .60, mean rank by brevity .496 (.490-.502), 24.2 tokens where the reference has 23.9 and bon_helpful 26.5;
          best-of-4 win rate .839 (.831-.846) instead of bon_helpful's .873 (.866-.881): what the floor costs.
Command   make train EXP=constrained_helpful        make sweep EXP=constrained_helpful
"""

from dataclasses import replace

from ctrl_jax.config import Combine, Experiment
from experiments import bon_helpful

BASELINE = "exponential(10)"
BREVITY = "experiments.rewards.brevity:words"


def experiment() -> Experiment:
    free = bon_helpful.experiment()
    policy = replace(free.policy, floors=(0.5,))
    return replace(free, name="constrained_helpful", combine=Combine(rewards=(BREVITY,)), policy=policy)


def sweep() -> list[Experiment]:
    """Beside the policy without the constraint."""
    return [replace(bon_helpful.experiment(), name="without_floor"), replace(experiment(), name="with_floor")]
