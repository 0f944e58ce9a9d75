"""Train a policy that will be decoded with best-of-4, on the helpful dialogues: InfAlign-CTRL with Φ(u) = exp(10u).

Claim     At equal KL its best-of-4 win rate against the reference's best-of-4 is above the identity transform's.
Cost      Four to eight minutes on two CPU cores from nothing, set-up included; the sweep 15 to 25.
Expected  KL .60, best-of-4 win rate .87 (.86-.88), 95 % of the ideal lift; the identity at that KL .81 (.80-.82).
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
