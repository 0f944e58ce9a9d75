"""Whether the model directories that an experiment names fit: their files, each other, and the lengths asked for."""

from pathlib import Path

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.models import architecture, huggingface, pretrained, weights
from ctrl_jax.rewards import classifier


def pretrained_architecture(experiment: Experiment) -> architecture.Architecture:
    """What the model at --model.path computes with its adapter, by its config.json and the adapter's names alone.

    Raises:
      InputError: if it is no language model, was made for fewer tokens than a prompt and a response, or has fewer
        layers than are to be adapted.
    """
    model, data = experiment.model, experiment.data
    assert model.path is not None, "a model from scratch is as large as its tokenizer makes it"
    folder = Path(model.path)
    found = pretrained.architecture(folder, model.adapter_path, dtype=model.dtype)
    if huggingface.is_classifier(folder):
        raise InputError(
            f"`model.path` is {folder}, a sequence classifier, which writes no text. Give it as "
            "`reward_model.path`, and a language model here."
        )
    context = huggingface.context(folder)
    if context is not None and data.prompt_length + data.response_length > context:
        raise InputError(
            f"`data.prompt_length` {data.prompt_length} and `data.response_length` {data.response_length} make "
            f"{data.prompt_length + data.response_length} tokens, but {model.path} was made for "
            f"{context} (max_position_embeddings); lower one of them."
        )
    model.lora.first_layer(len(found.layers))  # refuses more layers than there are
    return found


def check_models(experiment: Experiment) -> None:
    """Refuses, before anything is trained, directories whose files do not fit; of weights only headers are read.

    Raises:
      InputError: naming the file, the tensor or the value.
    """
    model, reward = experiment.model, experiment.reward_model
    if model.path is not None:
        pretrained_architecture(experiment)
        pretrained.check(Path(model.path), model.adapter_path, dtype=model.dtype)
    given = [] if reward.path is None else [(reward.path, classifier.FIELD)]
    for name, field in [*given, *((name, "combine.rewards") for name in experiment.combine.directories)]:
        folder = Path(name)
        weights.check(folder, huggingface.architecture(folder, dtype=model.dtype), reward=True)
        classifier.check_format(folder, experiment.data.format, field=field)
    judge = experiment.evaluation.judge
    if judge is not None and Path(judge).is_dir():
        classifier.check_format(Path(judge), experiment.data.format, field="evaluation.judge")
