"""A language model in a Hugging Face directory, perhaps with a PEFT adapter merged into it."""

from pathlib import Path
from typing import Literal

from ctrl_jax.models import huggingface, peft, weights
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.weights import Place
from ctrl_jax.types import Params

Type = Literal["float32", "bfloat16"]


def architecture(folder: Path, adapter: Path | None, *, dtype: Type) -> Architecture:
    """What the model computes with its adapter, by its config.json and the adapter's names alone.

    Raises:
      InputError: if one of them cannot be read, or describes no model of a known family.
    """
    base = huggingface.architecture(folder, dtype=dtype)
    return base if adapter is None else peft.architecture(adapter, base)


def check(folder: Path, adapter: Path | None, *, dtype: Type) -> None:
    """Refuses files that do not fit each other; of weights only headers are read.

    Raises:
      InputError: naming the file, the tensor or the value.
    """
    base = huggingface.architecture(folder, dtype=dtype)
    weights.check(folder, base)
    if adapter is not None:
        peft.check(adapter, base, base=folder)


def load(folder: Path, adapter: Path | None, *, dtype: Type, place: Place) -> Params:
    """The variables, of which each device reads its part alone.

    Raises:
      InputError: as `weights.load`, `peft.load` and `peft.merge`.
    """
    base = huggingface.architecture(folder, dtype=dtype)
    params = weights.load(folder, base, place=place)
    if adapter is not None:
        params = peft.merge(params, peft.load(adapter, base, base=folder, place=place), place=place)
    return {"params": params}
