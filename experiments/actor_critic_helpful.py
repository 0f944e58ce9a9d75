"""CTRL with a critic on the embedded dialogues: bon_helpful's reward, transform and KL budget.

Claim     A token that is moved by what it changed has a gradient with less noise, and with λ < 1 a bias.
Expect    CTRL's own win rates: at .30, .61 and .98 nats within .1 of a point of them, at the default λ = 1
          (docs/rivals.md). With λ = .7 (`--policy.trace 0.7`) 82 % of the ideal lift at its KL, measured once, where
          bon_helpful has 95 %. Of the squared gradient, `python -m benchmarks.gradient_signal bon_helpful` finds along
          CTRL's expected one: .67 without a critic, .77 with λ = 1, .63 with .7 and .31 with 0. So here the bias costs
          more than the noise.
Cost      About three minutes on two CPU cores after bon_helpful, whose stages it shares.
Command   make train EXP=actor_critic_helpful
"""

from ctrl_jax.config import ActorCritic, Experiment


def experiment() -> Experiment:
    return Experiment(
        name="actor_critic_helpful",
        policy=ActorCritic(transform="exponential(10)", procedure="best_of_4", kl_budget=0.6),
    )
