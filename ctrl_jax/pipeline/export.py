"""The trained policy as a directory that other tools serve: merged weights, or the adapter alone."""

from pathlib import Path

import jax

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, networks, peft, weights
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say

# What belongs to a model beside its weights and config.json.
BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def check(experiment: Experiment, output: Path, form: str) -> None:
    """Refuses, before anything is trained, what could not be written.

    Raises:
      InputError: if the policy is not one that a Hugging Face directory can hold, or the output is not empty.
    """
    check_model(experiment, "the policy")
    model = experiment.model
    weights.check_new(output)
    if form == "adapter" and model.lora.rank == 0:
        raise InputError(
            "`format` is adapter, but `model.lora.rank` is 0: all weights were trained.",
            field="format",
            value=form,
            remedy="Export merged.",
        )
    if form == "adapter" and (experiment.sft.steps or model.adapter is not None):
        raise InputError(
            "`format` is adapter, but the reference is not the model at `model.path`: it was fine-tuned (`sft.steps`) "
            "or has an adapter of its own (`model.adapter`), merged.",
            field="format",
            value=form,
            remedy="Export merged.",
        )


def check_model(experiment: Experiment, what: str) -> None:
    """Refuses a model that no Hugging Face directory can hold.

    Raises:
      InputError: if it is trained from scratch; it says that `what` cannot be exported.
    """
    if experiment.model.path is None:
        raise InputError(
            "The model of this experiment is trained from scratch, and its embedding scale is none of Hugging Face's "
            "architectures",
            field="model.path",
            value=None,
            remedy=f"only {what} of an experiment with a `model.path` can be exported.",
        )


def beside(folder: Path) -> list[Path]:
    """The files of `BESIDE` that a model's directory has."""
    return [folder / name for name in BESIDE if (folder / name).is_file()]


def run(run: Run, aligned: Aligned, output: Path, form: str) -> None:
    """Writes the policy to `output`; call `check` first."""
    model = run.experiment.model
    assert model.path is not None, "check refuses it"
    folder = Path(model.path)
    if form == "adapter":
        adapters = hosts.addressable(aligned.policy["lora"])
        if not hosts.first():
            return
        peft.save(output, adapters, run.architecture, model.lora, base=str(folder))
        say(f"Adapter: {output}. Load it with peft.PeftModel.from_pretrained(model, {str(output)!r}).")
        return
    params = networks.merged(run.models, aligned.policy)["params"]
    params = hosts.addressable(jax.tree.map(lambda x: x.astype(run.architecture.dtype), params))
    if not hosts.first():
        return
    weights.save(output, params, run.architecture, huggingface.read_config(folder), beside=beside(folder))
    say(f"Merged model: {output}. Load it with transformers.AutoModelForCausalLM.from_pretrained({str(output)!r}).")
