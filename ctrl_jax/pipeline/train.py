"""The main job: align a policy with the transformed, calibrated reward at a KL budget."""

from typing import NamedTuple

from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, programs
from ctrl_jax.models import lora
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, watch
from ctrl_jax.pipeline.calibrate import Calibrated
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.sft import Trained
from ctrl_jax.pipeline.stages import inputs_key, options_key
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Params, PolicyBatch


class Aligned(NamedTuple):
    policy: Params
    """The whole policy: what was trained over what was frozen."""
    reference: Trained
    reward: Reward
    seconds: dict[str, float]
    """What the stages before took."""


def run(run: Run, reference: Trained, reward: Reward, calibrated: Calibrated) -> Params:
    """The trained policy, all of it: trained from the reference, continued, or read where it is done.

    Raises:
      InputError: if a step is not finite, the KL runs away, or the policy stops changing (watch.py).
    """
    experiment, config = run.experiment, run.experiment.policy
    objective, num_references = config.objective, experiment.calibration.rewards_per_prompt
    depends = inputs_key(
        "policy",
        {
            "corpus": data.key(run.corpus, "train"),
            "reference": reference.stage,
            "reward_model": reward.fingerprint,
            "calibration": calibrated.digest,
        },
        randomness.draws(),
    )
    run.renew(depends)

    beta = objective.beta(num_references, calibrated.table.rewards) if config.beta is None else config.beta
    eos_ids = run.corpus.tokenizer.eos_ids
    algorithm = assembly.ctrl(run.models, run.mesh, config, beta=beta, num_references=num_references, eos_ids=eos_ids)
    optimizer = optimizers.policy(config, updates=algorithm.updates)
    trained = parameters.adapt_decoder(
        run.models, run.mesh, randomness.stage_key(experiment.seed, "adapter"), reference.params
    )
    state = programs.init_state(trained, optimizer, run.mesh, algorithm.start())
    step = assembly.policy_step(
        run.models,
        run.mesh,
        config,
        algorithm,
        optimizer,
        reward.score,
        key=randomness.stage_key(experiment.seed, "policy"),
        max_length=experiment.data.response_length,
        eos_ids=eos_ids,
    )
    prompts = PolicyBatch(run.corpus.prompts("train", experiment.calibration.prompts).prompts, calibrated.table.rewards)
    with run.open_training(
        experiment.name,
        state,
        batches(prompts, batch_size=config.prompts_per_step, seed=experiment.seed),
        metrics=algorithm.metrics,
        mesh=run.mesh,
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        directory=run.work_dir,
        fingerprint=fingerprint({**options_key("policy", experiment, run.contents), **depends}),
        wandb=run.wandb,
    ) as training:
        see_its_health = watch.watcher(experiment.name, config)
        for update in training.updates(lambda state, batch: step(state, reference.params, batch)):
            training.refuse_unsound(update)
            rows = training.report(update)
            see_its_health(rows)
            training.save(update, score=watch.score(config, rows))
    return lora.overlay(reference.params, training.state.params)
