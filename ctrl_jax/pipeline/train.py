"""The main job: align a policy with the transformed, calibrated reward at a KL budget."""

from typing import Any, NamedTuple

from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, programs
from ctrl_jax.models import lora
from ctrl_jax.pipeline import assembly, calibrate, data, optimizers, randomness, reward_model, sft, watch
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
    depends: dict[str, Any]
    """What the policy depends on besides the options, in clear."""


def run(run: Run) -> Aligned:
    """Runs the stages that are missing, and trains the policy, or goes on, or reads it where it is done.

    Raises:
      InputError: if no policy of the transform reaches the KL budget, or the policy stops changing (watch.py).
    """
    experiment, config = run.experiment, run.experiment.policy
    objective, num_references = config.objective, experiment.calibration.rewards_per_prompt
    if config.beta is None:
        objective.check(num_references)
    reference = sft.run(run)
    reward, reward_seconds = reward_model.run(run, reference)
    table, calibration_seconds, table_digest = calibrate.run(run, reference, reward)
    depends = inputs_key(
        "policy",
        {
            "corpus": data.key(run.corpus, "train"),
            "reference": reference.stage,
            "reward_model": reward.fingerprint,
            "calibration": table_digest,
        },
        randomness.draws(),
    )
    run.renew(depends)

    beta = objective.beta(num_references, table.rewards) if config.beta is None else config.beta
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
    prompts = run.corpus.prompts("train", experiment.calibration.prompts).prompts
    with run.open_training(
        experiment.name,
        state,
        batches(PolicyBatch(prompts, table.rewards), batch_size=config.prompts_per_step, seed=experiment.seed),
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
    policy = lora.overlay(reference.params, training.state.params)
    seconds = {"sft": reference.seconds, "reward_model": reward_seconds, "calibration": calibration_seconds}
    return Aligned(policy, reference, reward, seconds, depends)
