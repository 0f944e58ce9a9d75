"""The whole path, from the data to the evaluation. Each stage is made, continued, or read where it is done."""

import numpy as np

from ctrl_jax.config import Experiment
from ctrl_jax.evaluation import Evaluation, RewardSignal
from ctrl_jax.pipeline import assembly, calibrate, evaluate, reward_model, sft, start, train
from ctrl_jax.pipeline.run import Run, prepare
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.pipeline.workspace import Workspace


def run(workspace: Workspace) -> Evaluation:
    """Runs the stages that are missing; returns the evaluation, which evaluation.json holds.

    Raises:
      InputError: if anything that the experiment names cannot be used.
    """
    experiment = workspace.experiment
    with workspace.claimed():
        # Whether a function still answers alike, and whether a judge is the same, takes the data to know.
        asks = bool(experiment.functions) or experiment.evaluation.judge is not None
        evaluation = None if asks else evaluate.stored(workspace)
        if evaluation is None:
            check_budget(experiment)
            run = prepare(workspace)
            evaluation = evaluate.read(run) if asks else None
            if evaluation is None:
                evaluation = evaluate.run(run, policy(run))
    return evaluation


def policy(run: Run) -> Aligned:
    """The aligned policy, with all that it was made of.

    Raises:
      InputError: if no policy of the transform reaches the KL budget, or a training fails.
    """
    check_budget(run.experiment)
    reference = sft.run(run)
    rewarded = reward_model.run(run, reference)
    reward, seconds = rewarded.reward, {"sft": reference.seconds, "reward_model": rewarded.seconds}
    seconds |= {} if rewarded.combine_seconds is None else {"combine": rewarded.combine_seconds}
    calibrated = begun = None
    if assembly.is_calibrated(run.experiment):
        calibrated = calibrate.run(run, reference, reward)
        seconds["calibration"] = calibrated.seconds
        begun = start.run(run, reference, calibrated)
        seconds |= {} if begun is None else {"start": begun.seconds}
    constraints = rewarded.constraints
    policy = train.run(run, reference, reward, calibrated, begun, constraints)
    depends = train.depends_on(run, reference, reward, calibrated, begun, constraints)
    signal = RewardSignal() if calibrated is None else calibrated.signal
    return Aligned(
        policy,
        reference,
        reward,
        rewarded.alone,
        seconds,
        depends,
        rewarded.training,
        signal,
        rewarded.curve,
        constraints,
        None if calibrated is None else np.asarray(calibrated.table.rewards),
    )


def check_budget(experiment: Experiment) -> None:
    """Refuses a KL budget that no policy of the transform reaches, and floors that none reaches within the budget. A β
    that is given aims at no budget."""
    experiment.policy.check_floors()
    for options in reversed(experiment.trainings.values()) if assembly.is_calibrated(experiment) else ():
        if options.beta is None:
            options.objective.check(experiment.calibration.rewards_per_prompt)
