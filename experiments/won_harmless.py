"""Train against best-of-N jailbreaks, on the harmless dialogues: worst-of-4, with Φ(u) = −exp(−10u).

An attacker who samples four responses and keeps the most harmful one decodes with worst-of-4. The transform puts the
reward where that attacker looks: it keeps the policy out of the lowest ranks.

Claim     At equal KL its worst-of-4 win rate against the reference's worst-of-4 is above the identity transform's.
Cost      About bon_helpful's; it shares no stages with it.
Expected  KL .31, worst-of-4 win rate .85 (.84-.86), 91 % of the ideal lift; the identity at that KL .80 (.79-.81).
Command   make train EXP=won_harmless        make sweep EXP=won_harmless
"""

from ctrl_jax.config import Data, Experiment, Policy, grid


def experiment() -> Experiment:
    return Experiment(
        name="won_harmless",
        data=Data(source="dialogues/harmless"),
        policy=Policy(transform="exponential(-10)", procedure="worst_of_4", kl_budget=0.3),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(-10)"), kl_budgets=(0.3, 0.5))
