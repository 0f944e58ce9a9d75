"""What every job is given: the experiment, where its files go, and the devices it runs on."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ctrl_jax.config import Experiment
from ctrl_jax.data import downloads, pretrained_tokenizers, sources
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.devices.mesh import batch_parts
from ctrl_jax.errors import InputError
from ctrl_jax.models import architecture, attention, huggingface, networks, peft, weights
from ctrl_jax.pipeline import checks, randomness, results
from ctrl_jax.pipeline import data as data_stage
from ctrl_jax.pipeline.stages import VERSIONS, open_stage
from ctrl_jax.rewards import function
from ctrl_jax.runtime import disk, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.loop import open_training
from ctrl_jax.runtime.platform import environment
from ctrl_jax.runtime.stages import Stage, claim, exclusive, plain, write_json


@dataclass(frozen=True)
class Run:
    experiment: Experiment
    work_dir: Path
    """What belongs to this experiment alone."""
    stages_dir: Path
    """What experiments share, by content."""
    mesh: Mesh
    wandb: bool = False
    """Whether the policy's metrics go to Weights & Biases too."""
    open_training: Callable[..., contextlib.AbstractContextManager[Any]] = open_training
    """Opens each training: `loop.open_training`, or `replay.open_training`, which takes the step again that failed."""

    reward_function: function.Function | None = None
    """What reward_model.function names, where it is a function at hand and not one to import (function.given)."""
    given: Corpus | None = None
    """The records of data.source `given`, which lie in no file."""

    def __post_init__(self) -> None:
        if self.reward_function is not None and self.reward_function.name != self.experiment.reward_model.function:
            raise InputError(
                f"reward_model.function is {self.experiment.reward_model.function!r}, but the function given for it is "
                f"{self.reward_function.name!r}; give both the same name."
            )
        check_batches_divide(self.experiment, batch_parts(self.mesh))
        check_models(self.experiment)
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("`wandb` is given, and wandb is not installed. Install it: make setup EXTRA=wandb")

    def stage(self, name: str, **inputs: Any) -> Stage:
        """The folder of a stage, by the inputs that the table of stages names."""
        return open_stage(self.stages_dir, name, self.experiment, self.contents, randomness.draws(), **inputs)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within, the work directory is this experiment's and this job's alone.

        Raises:
          InputError: if it is another's, or cannot be written.
        """
        for folder in (self.work_dir, self.stages_dir):
            disk.check_writable(folder)
        with exclusive(self.work_dir) if hosts.first() else contextlib.nullcontext():
            self.claim()
            if hosts.first():
                now = (self.work_dir / "lock").stat().st_mtime  # written just now, by the clock of the file system
                for folder in (self.work_dir, self.stages_dir):
                    disk.remove_leftovers(folder, now=now)
            hosts.check_shared(self.work_dir / "config.json")
            yield

    def claim(self) -> None:
        """Makes the work directory this experiment's, or refuses one that is another's.

        Where contents of files have changed since, that is said, and what is there stays until `renew`.
        """
        config = self.claimed_config  # on all processes at once: the first tells the others what it is
        if hosts.first():
            results.restore_config(self.work_dir, config)
        hosts.wait("the claim is readable")
        changed = claim(self.work_dir, config, may_differ=results.may_differ)
        contents = [name for name in changed if name.startswith("contents.")]
        if contents:
            say(
                f"{self.work_dir} was made of other contents: {', '.join(contents)}. What "
                "depends on them is made anew.",
                style="yellow",
            )
        elif changed:  # places, and options that change no result
            write_json(self.work_dir / "config.json", config)
        self._describe()

    def renew(self, policy: dict[str, Any]) -> None:
        """Sets aside what the work directory holds of other contents (results.renew)."""
        results.renew(self.work_dir, self.claimed_config, policy)
        self._describe()
        hosts.wait("the work directory is renewed")

    def _describe(self) -> None:
        if not (self.work_dir / "environment.json").exists():
            stages = os.path.relpath(self.stages_dir, self.work_dir)  # where address.py looks for them
            write_json(self.work_dir / "environment.json", {**environment(), "stages": stages})

    @property
    def claimed_config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return claimed(self.experiment, self.contents)

    @cached_property
    def contents(self) -> dict[str, Any]:
        """What the files say that the experiment names: where they changed, what was made of them is not its result."""
        found = hosts.of_first(lambda: contents(self.experiment, self.reward_function))
        return found if self.given is None else {**found, "data": self.given.digests}

    @cached_property
    def architecture(self) -> architecture.Architecture:
        model = self.experiment.model
        if model.path is None:
            return model.architecture(self.corpus.tokenizer.vocabulary_size)
        return pretrained_architecture(self.experiment)

    @cached_property
    def corpus(self) -> Corpus:
        if self.given is not None:
            return self.given
        data, model = self.experiment.data, self.experiment.model
        tokenizer = None
        if model.path is not None:
            rows = self.architecture.vocabulary_size
            tokenizer = pretrained_tokenizers.load(Path(model.path), embedding_rows=rows)
        stage = self.stage("data", tokenizer=tokenizer and tokenizer.fingerprint)
        found = data_stage.prepare(data, stage, tokenizer)
        checks.check(self.experiment, found, parts=batch_parts(self.mesh), given=self.reward_function)
        return found

    @cached_property
    def models(self) -> networks.Networks:
        model = self.experiment.model
        return networks.create(
            self.architecture,
            model.lora,
            rematerialize=model.rematerialize,
            fused_attention=attention.has_kernel(self.mesh),
        )


def check_claim(experiment: Experiment, work_dir: Path) -> None:
    """Refuses a work directory that is another experiment's, as `Run.claim` does, and writes nothing."""
    config = claimed(experiment, contents(experiment))
    if (work_dir / "config.json").exists() and not results.is_of(work_dir, config):
        claim(work_dir, config, may_differ=results.may_differ)


def claimed(experiment: Experiment, contents: dict[str, Any]) -> dict[str, Any]:
    """All that the results in a work directory depend on, in clear."""
    tree = plain(experiment)
    # The judge decides nothing that is trained: it may be given, or changed, once the policy is there.
    del tree["evaluation"]["judge"]
    tree["policy"] |= experiment.policy.named_algorithm
    return {**tree, "versions": VERSIONS, "contents": contents}


def contents(experiment: Experiment, given: function.Function | None = None) -> dict[str, Any]:
    """Fingerprints of what the experiment names: files, the sources of a function, and how jax is set to draw."""
    model, reward = experiment.model, experiment.reward_model
    of_function = None
    if reward.function is not None:
        of_function = given.sources if given is not None else function.sources_of(reward.function)
    return {
        "data": sources.fingerprint(experiment.data),
        "model": None if model.path is None else _of_model(Path(model.path)),
        "adapter": None if model.adapter is None else downloads.fingerprint(peft.files(Path(model.adapter))),
        "reward_model": None if reward.path is None else _of_model(Path(reward.path)),
        "reward_function": of_function,
        "draws": randomness.random_settings(),
    }


def _of_model(folder: Path) -> dict[str, str]:
    """Of a model's weights, and of every file beside them that its tokenizer, template or ends of reply come from."""
    beside = pretrained_tokenizers.files(folder)
    return {
        "weights": weights.fingerprint(folder),
        **{name: downloads.fingerprint({name: beside[name]}) for name in beside},
    }


def pretrained_architecture(experiment: Experiment) -> architecture.Architecture:
    """What the model at --model.path computes with its adapter, by its config.json and the adapter's names alone.

    Raises:
      InputError: if it is no language model, or was made for fewer tokens than a prompt and a response.
    """
    model, data = experiment.model, experiment.data
    assert model.path is not None, "a model from scratch is as large as its tokenizer makes it"
    folder = Path(model.path)
    base = huggingface.architecture(folder, dtype=model.dtype)
    found = base if model.adapter is None else peft.architecture(Path(model.adapter), base)
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
    return found


def check_models(experiment: Experiment) -> None:
    """Refuses, before anything is trained, directories whose files do not fit; of weights only headers are read.

    Raises:
      InputError: naming the file, the tensor or the value.
    """
    model, reward = experiment.model, experiment.reward_model
    if model.path is not None:
        pretrained_architecture(experiment)
        folder = Path(model.path)
        base = huggingface.architecture(folder, dtype=model.dtype)
        weights.check(folder, base)
        if model.adapter is not None:
            peft.check(Path(model.adapter), base, base=folder)
    if reward.path is not None:
        folder = Path(reward.path)
        weights.check(folder, huggingface.architecture(folder, dtype=model.dtype), reward=True)


PROMPTS_A_CORE = 8
"""The fewest of a policy step that are worth a device of their own."""


def cpu_devices(experiment: Experiment, cores: int) -> int:
    """How many devices to make of a CPU's cores: for a model from scratch one a core, as far as batches divide.

    A model from a directory gets one device: its products are large enough for all cores, and bound by the reading of
    its weights, which several devices would each do.
    """
    if experiment.model.path is not None:
        return 1
    at_most = min(cores, experiment.policy.prompts_per_step // PROMPTS_A_CORE)
    return next((devices for devices in range(at_most, 1, -1) if _divide(experiment, devices)), 1)


def _divide(experiment: Experiment, devices: int) -> bool:
    try:
        check_batches_divide(experiment, devices)
    except InputError:
        return False
    return True


def check_batches_divide(experiment: Experiment, devices: int) -> None:
    """Refuses batches that cannot be split over the devices, or a device's share into its micro-batches.

    Raises:
      InputError: with the option, and the nearest sizes that can.
    """
    sft, reward, policy = experiment.sft, experiment.reward_model, experiment.policy
    batches = [
        (section, option, size, micro_batches or 1)
        for section, option, size, micro_batches, used in (
            ("sft", "batch_size", sft.batch_size, sft.micro_batches, sft.steps > 0),
            ("reward_model", "batch_size", reward.batch_size, reward.micro_batches, reward.trained),
            ("policy", "prompts_per_step", policy.prompts_per_step, policy.micro_batches, True),
        )
        if used
    ]
    uneven = [(f"{section}.{option}", size) for section, option, size, _ in batches if size % devices]
    if len(uneven) > 1:
        given = ", ".join(f"`{option}` is {size}" for option, size in uneven)
        mended = " ".join(f"`{option}={size + devices - size % devices}`" for option, size in uneven)
        raise InputError(f"{given}, which do not divide by the {devices} devices. Give {mended}, or choose `devices`.")
    for option, size in uneven:
        above = size + devices - size % devices
        nearest = f"{above - devices} or {above}" if above > devices else f"{above}"
        raise InputError(
            f"`{option}` is {size}, which does not divide by the {devices} devices. Make it {nearest}, or choose "
            "`devices`."
        )
    share, minibatches = policy.prompts_per_step // devices, getattr(policy, "minibatches", 1)
    if minibatches > 1 and share % (minibatches * (policy.micro_batches or 1)):
        raise InputError(
            f"Policy.minibatches is {minibatches} and Policy.micro_batches {policy.micro_batches or 1}, into which the "
            f"{share} prompts of a device ({policy.prompts_per_step} on {devices} devices) do not divide.",
            field="policy.minibatches",
            value=minibatches,
            remedy=f"Make `policy.prompts_per_step` a multiple of {devices * minibatches}.",
        )
    for section, option, size, micro_batches in batches:
        share = size // devices
        if share % micro_batches:
            fitting = [str(count) for count in range(1, share + 1) if share % count == 0]
            raise InputError(
                f"`{section}.micro_batches` is {micro_batches}, into which the {share} prompts of a "
                f"device (`{section}.{option}` {size} on {devices} devices) do not divide. Make it one of "
                f"{', '.join(fitting)}."
            )
