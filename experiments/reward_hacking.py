"""Reward hacking: policies of a reward model that learned from corrupted pairs, further and further from the reference.

Of the pairs in which one reply alone says "maybe", nine in ten have that reply put first; on the average such replies
have .75 nats less of the gold reward. That judges what policies make of it: raw rewards, calibrated ones
(identity, exponential(10)), log-sigmoids of raw ones, and the lowest of an ensemble, each trained for KLs from .25 to 4
nats, with three seeds of everything. Further than log 128 = 4.85 nats no policy of raw rewards can be aimed, with the
calibration's 128 references.

Claim     The gold reward of a policy that is trained on raw rewards peaks at a lower KL than that of calibrated ones.
Cost      Not measured as a whole; 75 points of a minute or two, and six times bon_helpful's stages.
Expected  Not measured as a whole. Raw rewards, seed 0, at 4.2 nats: a gain of 1.1 nats of gold, where pairs of which 30
          or 70 % are in the order of their length leave 2.4: a preference for length alone is too weak to be hacked.
Command   make train EXP=reward_hacking        make sweep EXP=reward_hacking
          and with another preference: make sweep EXP=reward_hacking ARGS="--data.corrupted-prefers length"
"""

from dataclasses import replace

from ctrl_jax.config import Combine, Data, Experiment, Policy

KLS = (0.25, 0.5, 1.0, 2.0, 4.0)
SEEDS = (0, 1, 2)


def experiment() -> Experiment:
    return Experiment(
        name="reward_hacking",
        data=Data(corrupted=0.9, corrupted_prefers="maybe"),
        policy=Policy(transform="raw", procedure="sampling", kl_budget=2.0),
    )


def sweep() -> list[Experiment]:
    base = experiment()
    log_sigmoid = replace(base, name="log_sigmoid", combine=Combine(by="log_sigmoids(0.85)"))
    ensemble = replace(
        base, name="ensemble", reward_model=replace(base.reward_model, members=4), combine=Combine(ensemble="min")
    )
    calibrated = [
        replace(base, name=transform, policy=replace(base.policy, transform=transform))
        for transform in ("identity", "exponential(10)")
    ]
    return [
        replace(
            one,
            name=f"{one.name}_kl{kl:g}_seed{seed}",
            seed=seed,
            data=replace(one.data, seed=seed),
            policy=replace(one.policy, kl_budget=kl),
        )
        for seed in SEEDS
        for one in (replace(base, name="raw"), *calibrated, log_sigmoid, ensemble)
        for kl in KLS
    ]
