"""The folders of an experiment: its claim on a work directory, its stages, and what changed since an earlier run."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh

from ctrl_jax.config import Experiment
from ctrl_jax.data import downloads, pretrained_tokenizers, sources
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.devices.mesh import batch_parts
from ctrl_jax.errors import InputError
from ctrl_jax.models import peft, weights
from ctrl_jax.pipeline import randomness, results
from ctrl_jax.pipeline.directories import check_models
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.pipeline.stages import as_tree, open_stage, versions
from ctrl_jax.rewards import function
from ctrl_jax.runtime import disk, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.loop import open_training
from ctrl_jax.runtime.platform import environment
from ctrl_jax.runtime.stages import Stage, claim, exclusive, write_json


@dataclass(frozen=True)
class Workspace:
    """Where an experiment's files go, with the claim on them, and the devices that it runs on."""

    experiment: Experiment
    work_dir: Path
    """What belongs to this experiment alone."""
    stages_dir: Path
    """What experiments share, by content."""
    mesh: Mesh
    wandb: bool = False
    """Whether the policy's metrics go to Weights & Biases too."""
    open_training: Callable[..., contextlib.AbstractContextManager[Any]] = open_training
    """Opens each training: `loop.open_training`, or `replay.open_training`, which takes the failed step again."""
    functions: Mapping[str, function.Function] = field(default_factory=dict)
    """Those of the experiment's rewards that are functions at hand and not to import (function.given), by their names
    in it."""
    given: Corpus | None = None
    """The records of data.source `given`, which are in no file."""

    def __post_init__(self) -> None:
        for name in self.functions.keys() - self.experiment.functions.keys():
            raise InputError(
                f"A function is given as {name!r}, and the experiment's rewards are {[*self.experiment.functions]}",
                field="functions",
                value=name,
                remedy="give it the name that `reward_model.function` or `combine.rewards` has for it.",
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
        config = self.claimed_config  # on all processes at once: the others take it from the first
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

    @property
    def contents(self) -> dict[str, Any]:
        """Fingerprints of the inputs; a changed one invalidates the stages made from it."""
        return self.fingerprints if self.given is None else {**self.fingerprints, "data": self.given.digests}

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of the input files, which are read for them once, at the claim."""
        return hosts.of_first(lambda: contents(self.experiment, self.functions))


def check_claim(experiment: Experiment, work_dir: Path) -> None:
    """Refuses a work directory that is another experiment's, as `Run.claim` does, and writes nothing."""
    config = claimed(experiment, contents(experiment))
    if (work_dir / "config.json").exists() and not results.is_of(work_dir, config):
        claim(work_dir, config, may_differ=results.may_differ)


def claimed(experiment: Experiment, contents: dict[str, Any]) -> dict[str, Any]:
    """All that the results in a work directory depend on, in clear."""
    tree = as_tree(experiment)
    # The judge decides nothing that is trained: it may be given, or changed, once the policy is there.
    del tree["evaluation"]["judge"]
    return {**tree, "versions": versions(experiment), "contents": contents}


def contents(experiment: Experiment, at_hand: Mapping[str, function.Function] = MappingProxyType({})) -> dict[str, Any]:
    """Fingerprints of what the experiment names: files, the sources of functions, and how jax is set to draw."""
    model, reward = experiment.model, experiment.reward_model
    of_functions = {
        name: at_hand[name].sources if name in at_hand else function.sources_of(name) for name in experiment.functions
    }
    combined = [
        {"function": name, **of_functions[name]} if name in of_functions else _of_model(Path(name))
        for name in experiment.combine.rewards
    ]
    return {
        "data": sources.fingerprint(experiment.data),
        "model": None if model.path is None else _of_model(Path(model.path)),
        "adapter": None if model.adapter is None else downloads.fingerprint(peft.files(Path(model.adapter))),
        "reward_model": None if reward.path is None else _of_model(Path(reward.path)),
        "reward_function": None if reward.function is None else of_functions[reward.function],
        **({"combined_rewards": combined} if combined else {}),
        "draws": randomness.random_settings(),
    }


def _of_model(folder: Path) -> dict[str, str]:
    """Of a model's weights, and of every file beside them that its tokenizer, template or ends of reply come from."""
    beside = pretrained_tokenizers.files(folder)
    return {
        "weights": weights.fingerprint(folder),
        **{name: downloads.fingerprint({name: beside[name]}) for name in beside},
    }
