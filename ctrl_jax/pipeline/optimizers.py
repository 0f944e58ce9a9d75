"""The optimisers of the trainings."""

import optax

from ctrl_jax import config


def supervised(stage: config.Supervised) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, stage.warmup_steps, stage.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def policy(policy: config.Policy, *, updates: int = 1) -> optax.GradientTransformation:
    """Adam without its first moment (RMSProp with bias correction), so that the KL settles on its budget.

    Momentum is an inertia. It carries the policy past the KL at which reward and penalty balance, and back: with Adam's
    .9 the KL swings by 10 to 15 % for a whole run of 150 steps, even at a constant β, and no controller that sees it
    afterwards can damp that. Batches of hundreds of responses need no averaging over steps. What a step adds at random
    grows with the learning rate, which falls as the square of a cosine for that reason.

    Args:
      policy: rates, and their schedule by step.
      updates: how many a step makes.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        policy.learning_rate,
        updates * policy.warmup_steps,
        updates * policy.steps,
        0.1 * policy.learning_rate,
        exponent=2.0,
    )
    # The same arithmetic as optax.adam(b1=0), without its copy of the gradient.
    rmsprop = optax.rmsprop(schedule, decay=0.99, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(optax.clip_by_global_norm(policy.max_gradient_norm), rmsprop)
