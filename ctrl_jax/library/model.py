"""Language models from Hugging Face directories, and texts that they write."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from ctrl_jax.config import Data
from ctrl_jax.data import pipelines, pretrained_tokenizers
from ctrl_jax.data.conversations import Record, transcript
from ctrl_jax.data.forms import FORMS, Format
from ctrl_jax.data.rows import read_plain_row, read_row
from ctrl_jax.data.tokenizers import Tokenizer
from ctrl_jax.devices import partitioning
from ctrl_jax.devices.mesh import batch_parts, make_mesh, shard
from ctrl_jax.errors import InputError
from ctrl_jax.models import attention, huggingface, networks, pretrained
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.lora import Lora
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.rollouts import prompts_at_a_time
from ctrl_jax.runtime import platform
from ctrl_jax.runtime.console import progress
from ctrl_jax.types import Params

Prompt = str | Sequence[dict[str, str]]
"""A text, or messages {role, content} of which the last is the user's."""

LENGTHS = 16
"""Prompts are padded to a multiple of it, so that few programs are compiled."""
UNLIMITED = 2**20
"""Tokens, for a model that names no limit."""


@dataclass(frozen=True, eq=False)
class Model:
    """A language model with its tokenizer, on devices. Made by `load_model` and `align`.

    Attributes:
      path: its Hugging Face directory.
      tokenizer: reads and writes its tokens, with the chat template if it has one and the format is not plain.
      mesh: the devices that it runs on.
    """

    path: Path
    adapter: Path | None
    dtype: Literal["float32", "bfloat16"]
    mesh: Mesh
    architecture: Architecture
    tokenizer: Tokenizer
    format: Format
    """What its prompts are: `chat` or `plain`."""
    lora: Lora
    """The adapter that `params` has beside the weights, if its rank is above 0."""
    load: Callable[[], Params]

    @functools.cached_property
    def params(self) -> Params:
        """The weights, read at their first use."""
        return self.load()

    @property
    def context(self) -> int | None:
        """The most tokens of a prompt with its response, where the model names a limit."""
        return huggingface.context(self.path)

    @functools.cached_property
    def networks(self) -> networks.Networks:
        return networks.create(self.architecture, self.lora, fused_attention=attention.has_kernel(self.mesh))

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a model is kept as long as what it compiled)
    def sampler(self, num_samples: int, max_length: int, temperature: float) -> Callable[..., Any]:
        """The compiled sampler of these settings."""
        return assembly.sampler(
            self.networks,
            self.mesh,
            num_samples=num_samples,
            max_length=max_length,
            eos_ids=self.tokenizer.eos_ids,
            temperature=temperature,
        )

    def __repr__(self) -> str:
        return f"<Model {self.path}>"


def load_model(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    format: Literal["chat", "plain"] = "chat",
    devices: int | None = None,
    fsdp: int = 1,
    model_parallel: int = 1,
) -> Model:
    """A language model from a Hugging Face directory: config.json, safetensors and tokenizer.

    Its files are checked at once; the weights are read when they are first needed.

    Args:
      path: the directory of a Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2 or Gemma 3 model.
      adapter: a PEFT adapter's directory, merged into the model.
      dtype: of the computation; bfloat16 is for accelerators.
      format: `chat`, or `plain` for a base model: prompts are texts that it continues, with no chat template, nor Human
        and Assistant, around them.
      devices: how many to use; by default all.
      fsdp: devices that split the parameters as well as a batch.
      model_parallel: devices that split each layer.

    Raises:
      InputError: if the directory is no such model, or its files do not fit each other.
    """
    _check_jax()
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"path is {str(path)!r}, which has no config.json",
            field="path",
            value=str(path),
            remedy="give the directory of a Hugging Face model, such as models/SmolLM2-135M-Instruct.",
        )
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}", field="dtype", value=dtype, remedy="give float32 or bfloat16.")
    if format not in FORMS:
        raise InputError(f"format is {format!r}", field="format", value=format, remedy="give chat or plain.")
    mesh = make_mesh(devices, fsdp=fsdp, model=model_parallel)
    of_adapter = None if adapter is None else Path(adapter).expanduser()
    architecture = pretrained.architecture(folder, of_adapter, dtype=dtype)
    if huggingface.is_classifier(folder):
        raise InputError(
            f"path is {folder}, a sequence classifier, which writes no text",
            field="path",
            value=str(path),
            remedy="give a language model.",
        )
    pretrained.check(folder, of_adapter, dtype=dtype)
    tokenizer = pretrained_tokenizers.load(folder, embedding_rows=architecture.vocabulary_size, format=format)
    place = functools.partial(partitioning.sharding, mesh)
    load = functools.partial(pretrained.load, folder, of_adapter, dtype=dtype, place=place)
    return Model(folder, of_adapter, dtype, mesh, architecture, tokenizer, format, Lora(), load)


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 1,
    max_length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """Texts that a model writes: N for each of B prompts, [B][N].

    A text depends on the seed, its prompt and its index among the N alone: not on the other prompts, nor on the
    devices. Equal prompts get equal texts; another seed gives others.

    Args:
      model: from `load_model`, or the `policy` or `reference` of what `align` returns.
      prompts: texts, or lists of messages {role, content}. A text in hh-rlhf's form is read as its turns. Of a model of
        plain format texts alone, which it continues as they are.
      num_samples: N.
      max_length: T, tokens; a text that has not ended by then is cut.
      temperature: 1 is the model's own law; towards 0 it becomes greedy.
      seed: of the draws.

    Raises:
      InputError: naming the prompt or the option that cannot be used.
    """
    for name, value in (("num_samples", num_samples), ("max_length", max_length)):
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"{name} is {value!r}", field=name, value=value, remedy="give a whole number of at least 1."
            )
    if not 1e-3 <= temperature <= 1e3:
        raise InputError(
            f"temperature is {temperature!r}",
            field="temperature",
            value=temperature,
            remedy="give a number between 0.001 and 1000.",
        )
    found = records(prompts, "prompts", model.format)
    if not found:
        return []
    longest, room = longest_prompt(model, found, "prompts", max_length=max_length)
    length = min(-(-longest // LENGTHS) * LENGTHS, room)
    asked = pipelines.prompts(found, model.tokenizer, prompt_length=length)
    texts = dict(zip(asked.texts, _sampled(model, asked, num_samples, max_length, temperature, seed), strict=True))
    return [[*texts[transcript(record.prompt)]] for record in found]


def records(prompts: Sequence[Prompt], name: str, format: Format) -> list[Record]:
    """The prompts as the pipeline reads them. Raises InputError with the place, `name`[i], of one that is none."""
    if isinstance(prompts, str):
        raise InputError(
            f"{name} is one text, {prompts[:40]!r}", field=name, value=prompts, remedy="give a list of prompts."
        )
    rows = [[*prompt] if isinstance(prompt, tuple) else prompt for prompt in prompts]
    read = {"chat": read_row, "plain": read_plain_row}[format]
    found = [read({"prompt": prompt}, f"{name}[{i}]") for i, prompt in enumerate(rows)]
    return [record for record in found if isinstance(record, Record)]


def longest_prompt(model: Model, found: Sequence[Record], name: str, *, max_length: int) -> tuple[int, int]:
    """Tokens of the longest prompt, and those that the model has room for beside a response of `max_length`.

    Raises:
      InputError: if the longest has no room.
    """
    longest = max(len(model.tokenizer.encode_prompt(record.prompt)) for record in found)
    room = UNLIMITED if model.context is None else model.context - max_length
    if longest > room:
        raise InputError(
            f"The longest of the {name} has {longest} tokens and max_length is {max_length}, but {model.path} was made "
            f"for {model.context} tokens together",
            field="max_length",
            value=max_length,
            remedy="shorten one of them.",
        )
    return longest, room


def _sampled(
    model: Model, asked: pipelines.PromptSet, num_samples: int, max_length: int, temperature: float, seed: int
) -> list[list[str]]:
    """[B][N] texts, by batches that the devices have room for."""
    parts, count = batch_parts(model.mesh), len(asked.texts)
    lengths = Data(prompt_length=asked.prompts.tokens.shape[1], response_length=max(2, max_length))
    most = prompts_at_a_time(model.architecture, lengths, num_samples)
    size = parts * min(most, -(-count // parts))
    sample, key = model.sampler(num_samples, max_length, temperature), jax.random.key(seed)

    def texts(start: int) -> list[list[str]]:
        index = np.minimum(np.arange(start, start + size), count - 1)
        batch = jax.tree.map(lambda x: np.asarray(x)[index], asked.prompts)
        responses = jax.device_get(sample(model.params, shard(model.mesh, batch), key).responses)
        return pipelines.decoded(responses, model.tokenizer)[: count - start]

    found = texts(0)
    if size < count:
        with progress("responses", count, start=size) as bar:
            for start in range(size, count, size):
                found += texts(start)
                bar.update(len(found))
    return found


def _check_jax() -> None:
    """Refuses libraries that compute wrong numbers, and settings of jax under which a seed gives other draws."""
    platform.check_jaxlib()
    for name, value in platform.PINNED.items():
        if getattr(jax.config, name) != value:
            raise InputError(
                f"{name} is {getattr(jax.config, name)!r}, under which a seed gives other draws",
                field=name,
                value=getattr(jax.config, name),
                remedy=f"call jax.config.update({name!r}, {value!r}) first.",
            )
