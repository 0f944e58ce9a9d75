"""A rival of bon_helpful: variational best-of-N, which fits the policy to the law of best-of-4 itself.

Claim     Its β of 1/3 is held, so that it is to end near log 4 − 3/4 = .636 nats, where one of its samples wins as
          often as the best of 4 of the reference; under best-of-4 it is to be below bon_helpful at equal KL.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .62, best-of-4 win rate .792 (.783-.801).
Command   make train EXP=rivals/vbon
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Vbon
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="vbon", policy=Vbon(procedure="best_of_4", kl_budget=0.6))
