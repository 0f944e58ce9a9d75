"""The reward of an experiment that has several: all of them, made one."""

from ctrl_jax.pipeline import assembly, randomness
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.named import named
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Prompts, Responses

FIELD = "combine.rewards"


def run(run: Run, reference: Trained, reward: Reward) -> Reward:
    """The combination of the reward model's reward with the others; that reward itself where there are none.

    Raises:
      InputError: if another reward cannot be used.
    """
    experiment = run.experiment
    config = experiment.combine
    if not config.rewards:
        return reward
    dtype = experiment.model.dtype
    others = [named(text, run.corpus, run.mesh, dtype=dtype, field=FIELD) for text in config.rewards]
    samples, temperature = experiment.calibration.samples_per_prompt, experiment.policy.temperature
    length, key = experiment.data.response_length, randomness.stage_key(experiment.seed, "combine")
    sample = assembly.sampler(
        run.models, run.mesh, num_samples=samples, max_length=length,
        eos_ids=run.corpus.tokenizer.eos_ids, temperature=temperature,
    )  # fmt: skip

    def references(prompts: Prompts) -> Responses:
        return sample(reference.params, prompts, key).responses

    by = [reference.stage, samples, temperature, length, experiment.seed, randomness.draws()]
    return combined.reward([reward, *others], config.combination, references, drawn=fingerprint({"by": by}))
