"""Train a policy that will be decoded with best-of-4, on the helpful dialogues: InfAlign-CTRL with Φ(u) = exp(10u).

Claim     At equal KL its best-of-4 win rate against the reference's best-of-4 is above that of the identity transform.
Command   make train EXP=bon_helpful
"""

from ctrl_jax.config import Experiment


def experiment() -> Experiment:
    return Experiment(name="bon_helpful")
