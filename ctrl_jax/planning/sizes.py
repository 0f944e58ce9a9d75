"""The networks of an experiment, by its configuration alone."""

from dataclasses import dataclass
from pathlib import Path

from ctrl_jax.config import VOCABULARY, Experiment, Lora
from ctrl_jax.devices import accelerators
from ctrl_jax.models import costs, huggingface
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.pipeline.directories import pretrained_architecture


@dataclass(frozen=True)
class Sizes:
    """The networks of an experiment."""

    policy: Architecture
    lora: Lora
    reward: Architecture | None
    """None where a function of the host scores."""
    reward_lora: Lora
    reward_bytes: float
    """What it adds to a device; a trunk that is the reference itself adds nothing."""
    judge: Architecture | None
    """None without a judge, or where a function of the host judges."""
    device_memory: float | None
    """`Accelerator.own_memory`, which slices and chunks are sized by."""

    @property
    def judge_bytes(self) -> int:
        return 0 if self.judge is None else costs.itemsize(self.judge) * costs.parameters(self.judge)

    @property
    def trained(self) -> int:
        """Parameters that are trained in the policy."""
        return costs.adapter_parameters(self.policy, self.lora) or costs.parameters(self.policy)


def sizes(experiment: Experiment, device_memory: float | None = accelerators.SMALLEST) -> Sizes:
    """What an experiment's networks compute, by its configuration and a directory's config.json.

    A model from scratch is taken to have as many pieces as its tokenizer is asked for.
    """
    model, reward = experiment.model, experiment.reward_model
    if model.path is None:
        policy = model.architecture(experiment.data.vocabulary_size or VOCABULARY)
    else:
        policy = pretrained_architecture(experiment)
    judge = _judge(experiment)
    if reward.function is not None:
        return Sizes(policy, model.lora, None, Lora(), 0, judge, device_memory)
    if reward.path is not None:
        classifier = huggingface.architecture(Path(reward.path), dtype=model.dtype)
        held = costs.itemsize(classifier) * costs.parameters(classifier)
        return Sizes(policy, model.lora, classifier, Lora(), held, judge, device_memory)
    if reward.linear:
        return Sizes(policy, model.lora, policy, Lora(), 0, judge, device_memory)
    trained = costs.adapter_parameters(policy, model.lora) or costs.parameters(policy)
    return Sizes(policy, model.lora, policy, model.lora, costs.FLOAT32 * trained, judge, device_memory)


def _judge(experiment: Experiment) -> Architecture | None:
    name = experiment.evaluation.judge
    if name is None or not Path(name).is_dir():
        return None
    return huggingface.architecture(Path(name), dtype=experiment.model.dtype)
