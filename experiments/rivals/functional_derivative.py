"""A rival of bon_helpful: the best-of-4 win rate itself as the objective, by its derivative at the policy's responses.

Claim     Its optimum is that of Φ*, as bon_helpful_optimal's, without a transform that theory computes in advance; with
          16 responses a prompt it is to be noisier, and to end near that one at equal KL.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .62, best-of-4 win rate .878 (.871-.885).
Command   make train EXP=rivals/functional_derivative
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, FunctionalDerivative
from experiments import bon_helpful


def experiment() -> Experiment:
    policy = FunctionalDerivative(procedure="best_of_4", kl_budget=0.6)
    return replace(bon_helpful.experiment(), name="functional_derivative", policy=policy)
