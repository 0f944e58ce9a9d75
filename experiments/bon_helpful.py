"""Train a policy that will be decoded with best-of-4, on the helpful dialogues: InfAlign-CTRL with Φ(u) = exp(10u).

Claim     At equal KL its best-of-4 win rate against the reference's best-of-4 is above the identity transform's.
Command   make train EXP=bon_helpful        make sweep EXP=bon_helpful
"""

from ctrl_jax.config import Experiment, Policy, grid


def experiment() -> Experiment:
    return Experiment(
        name="bon_helpful",
        policy=Policy(transform="exponential(10)", procedure="best_of_4", kl_budget=0.6),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)", "optimal"), kl_budgets=(0.6, 1.0))
