"""The main job: align a policy, by the algorithm that the experiment chooses."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from ctrl_jax.algorithms.protocol import Algorithm, Source
from ctrl_jax.config import Policy
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, programs
from ctrl_jax.evaluation import RewardSignal, RewardTraining
from ctrl_jax.models import lora
from ctrl_jax.pipeline import along, assembly, data, optimizers, randomness, stored, watch
from ctrl_jax.pipeline.calibrate import Calibrated
from ctrl_jax.pipeline.combine import Constraints
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.stages import inputs_key, options_key
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Params, PolicyBatch


class Aligned(NamedTuple):
    policy: Params
    """The whole policy: what was trained over what was frozen."""
    reference: Trained
    reward: Reward
    alone: Reward
    """The reward model's own, without those that it is combined with."""
    seconds: dict[str, float]
    """What the stages before took."""
    depends: dict[str, Any]
    """What the policy depends on besides the options, in clear."""
    reward_training: RewardTraining | None = None
    """How the reward model was trained; None where it was not trained here."""
    reward_signal: RewardSignal = RewardSignal()
    """What the reference's responses say of the reward."""
    validation: Mapping[str, np.ndarray] = {}
    """The curve of that training's validation (evaluation.VALIDATION_ARRAYS), where it had one."""
    constraints: Constraints | None = None
    """The other rewards that it was to keep at floors, where there are any."""
    table: np.ndarray | None = None
    """[B, K] of the calibration, where there is one: the reference's rewards on the training prompts, ascending."""

    @property
    def asked(self) -> tuple[Reward, ...]:
        """Whose answers are asked again before the results are used: the functions, in their order, where there are."""
        if self.constraints is None:
            return self.reward.asked
        return (*combined.functions([self.reward]), *self.constraints.functions) or self.reward.asked


def run(
    run: Run, reference: Trained, reward: Reward, calibrated: Calibrated | None, start: Trained | None = None,
    constraints: Constraints | None = None,
) -> Params:  # fmt: skip
    """The trained policy, all of it: trained from the reference or its start, continued, or read where it is done.

    Args:
      run: has the data and the options.
      reference: what the policy's KL is measured against.
      reward: scores the policy's responses, where the algorithm samples them.
      calibrated: the reference's rewards, or None where the algorithm learns from preference pairs.
      start: the parameters that the policy's training goes on from (start.py); None for those of the reference.
      constraints: the rewards that the policy keeps at floors, where the algorithm holds any there.

    Raises:
      InputError: if a step is not finite, the KL runs away, or the policy stops changing (watch.py).
    """
    experiment, config = run.experiment, run.experiment.policy
    depends = depends_on(run, reference, reward, calibrated, start, constraints)
    run.renew(depends)

    algorithm = algorithm_of(run, config, calibrated)
    if warning := watch.too_flat(config, getattr(algorithm, "beta", None)):
        say(f"{experiment.name}: {warning}", style="yellow")
    optimizer = optimizers.policy(config, updates=algorithm.updates)
    adapter_key = randomness.stage_key(experiment.seed, "adapter")
    trained = (
        parameters.adapt_decoder(run.models, run.mesh, adapter_key, reference.params) if start is None
        else start.params
    )  # fmt: skip
    step = _step(run, algorithm, optimizer, reward, constraints)
    with run.open_training(
        experiment.name,
        programs.init_state(trained, optimizer, run.mesh, algorithm.start()),
        # The responses to a prompt are a function of the step and the prompt: one that is there twice has the same.
        batches(
            examples(run, config, calibrated),
            batch_size=config.prompts_per_step,
            seed=experiment.seed,
            distinct=algorithm.source is Source.POLICY,
        ),
        metrics=algorithm.metrics,
        devices=programs.Devices(run.mesh),
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        rest_at=along.steps(experiment),
        directory=run.work_dir,
        fingerprint=fingerprint({**options_key("policy", experiment, run.contents), **depends}),
        wandb=run.wandb,
    ) as training:
        see_its_health = watch.watcher(experiment.name, config)
        for update in training.updates(lambda state, batch: step(state, reference.params, batch)):
            training.refuse_unsound(update)
            rows = training.report(update)
            see_its_health(rows)
            along.keep(run, update, training.state.params)  # first: behind its checkpoint no step is made again
            training.save(update, score=watch.score(config, rows))
    return lora.overlay(reference.params, training.state.params)


def depends_on(
    run: Run, reference: Trained, reward: Reward, calibrated: Calibrated | None, start: Trained | None = None,
    constraints: Constraints | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the policy depends on besides the options, in clear."""
    from_stored = assembly.learns_from_stored(run.experiment.policy)
    inputs = {
        "corpus": data.key(run.corpus, "train"),
        "reference": reference.stage,
        "reward_model": reward.fingerprint,
        "calibration": calibrated and (calibrated.all_digests if from_stored else calibrated.digest),
    }
    if start is not None:
        inputs["start"] = start.stage
    if constraints is not None:
        inputs["constraints"] = constraints.fingerprint
    return inputs_key("policy", inputs, randomness.draws())


def algorithm_of(run: Run, options: Policy, calibrated: Calibrated | None) -> Algorithm:
    """The algorithm of the options, of the policy's training or its start, with the β of its KL budget."""
    experiment, calibration = run.experiment, run.experiment.calibration
    num_references = calibration.rewards_per_prompt
    if assembly.learns_from_stored(options):
        num_references = calibration.samples_per_prompt

    def made(beta: float | None) -> Algorithm:
        return assembly.algorithm(
            run.models, run.mesh, options,
            beta=beta, num_references=num_references, eos_ids=run.corpus.tokenizer.eos_ids,
            goes_on=experiment.start is not None and options is experiment.policy,
        )  # fmt: skip

    if options.beta is not None or calibrated is None:
        return made(options.beta)
    beta = made(None).first_beta(options.objective, num_references, calibrated.table.rewards)
    if options.beta_share is not None:
        beta *= options.beta_share
    elif assembly.is_on_policy(options):
        mixed = experiment.combines and experiment.combine.rewards
        alone = experiment.reward_model.linear and not mixed
        beta *= LEARNED_OF_LINEAR if alone else learned_share(calibrated.signal)
    return made(beta)


LEARNED_OF_LINEAR = 0.5
"""By what β is multiplied for a reward that is linear in the features that the probe reads: of that the probe says
nothing. SmolLM2-135M learned .35 to .6 of such rewards on hh-rlhf, by the transform (docs/real_models.md)."""
LEAST_LEARNED = 0.25
"""As far as β goes down on the word of a probe alone: two rests below the budget would bring it as far."""


def learned_share(signal: RewardSignal) -> float:
    """By what the ideal policy's β is multiplied for a policy that learns a part of the reward.

    A policy whose log-ratio has the correlation r with the ideal one has r² of its KL at the same β, to first order in
    1 / β, and both KLs go as 1 / β²: it meets the budget at r β. The probe's rank correlation is linear, and a policy
    learns more than that, so r is somewhere from there to 1: half way, by its root. 1 where the probe saw nothing. From
    there the controller trims β; it finds the way down fast, and the way up slowly.
    """
    probe = signal.learnability
    return 1.0 if probe is None or probe.bounds[0] <= 0 else max(math.sqrt(probe.mean), LEAST_LEARNED)


def examples(run: Run, options: Policy, calibrated: Calibrated | None) -> Any:
    """What an algorithm learns from: preference pairs, or prompts with what calibrates or with stored responses."""
    source = assembly.algorithm_class(options).source
    if source is Source.PREFERENCES:
        return data.pairs(run.corpus, "train").examples
    prompts = run.corpus.prompts("train", run.experiment.calibration.prompts).prompts
    assert calibrated is not None, "align.is_calibrated"
    if source is Source.POLICY:
        return PolicyBatch(prompts, calibrated.table.rewards)
    assert calibrated.responses is not None, "Experiment.__post_init__ asks for calibration.keep_responses"
    if repeated := stored.warning(options, run.experiment.calibration):
        say(repeated, style="yellow")
    return stored.examples(prompts, calibrated.responses, options.samples_per_prompt)


def _step(
    run: Run,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    reward: Reward,
    constraints: Constraints | None,
) -> assembly.PolicyStep | programs.Step:
    """(state, reference, batch) to (state, metrics)."""
    experiment = run.experiment
    if algorithm.source is not Source.POLICY:
        micro_batches = experiment.policy.micro_batches
        return assembly.update(run.models, run.mesh, optimizer, algorithm, micro_batches=micro_batches)
    return assembly.policy_step(
        run.models,
        run.mesh,
        experiment.policy,
        algorithm,
        optimizer,
        reward.score,
        key=randomness.stage_key(experiment.seed, "policy"),
        max_length=experiment.data.response_length,
        eos_ids=run.corpus.tokenizer.eos_ids,
        rank=None if constraints is None else constraints.rank,
    )
