"""The start of a policy: a training on the reference's stored responses, from which the policy's training goes on."""

from ctrl_jax.devices import parameters
from ctrl_jax.pipeline import assembly, data, optimizers, randomness, supervised, train
from ctrl_jax.pipeline.calibrate import Calibrated
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained

LABEL = "start of the policy"


def run(run: Run, reference: Trained, calibrated: Calibrated) -> Trained | None:
    """Trains the start, goes on training it, or reads it where it is done; None where the experiment has none.

    Its parameters are those that are trained alone: an adapter, or all.

    Raises:
      InputError: if a step is not finite, or the parameters stop changing.
    """
    config = run.experiment.start
    if config is None:
        return None
    stage = run.stage(
        "start",
        corpus=data.key(run.corpus, "train"),
        reference=reference.stage,
        calibration=calibrated.all_digests,
    )
    algorithm = train.algorithm_of(run, config, calibrated)
    optimizer = optimizers.policy(config)
    key = randomness.stage_key(run.experiment.seed, "adapter")
    return supervised.train(
        run,
        stage,
        LABEL,
        "start",
        batch_size=config.prompts_per_step,
        start=parameters.adapt_decoder(run.models, run.mesh, key, reference.params),
        frozen=reference.params,
        optimizer=optimizer,
        step=assembly.update(run.models, run.mesh, optimizer, algorithm, micro_batches=config.micro_batches),
        examples=train.examples(run, config, calibrated),
        metrics=algorithm.metrics,
    )
