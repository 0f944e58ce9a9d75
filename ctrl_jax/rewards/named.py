"""A reward by the text that names it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from jax.sharding import Mesh

from ctrl_jax.data.corpus import Corpus
from ctrl_jax.errors import InputError
from ctrl_jax.rewards import classifier, function
from ctrl_jax.rewards.reward import Reward


def named(
    text: str,
    corpus: Corpus,
    mesh: Mesh,
    *,
    dtype: Literal["float32", "bfloat16"],
    field: str,
    at_hand: Mapping[str, function.Function] = MappingProxyType({}),
) -> Reward:
    """The reward that `text`, the value of `field`, names: a sequence classifier's directory or module:name, which is
    imported where it is not `at_hand`.

    Raises:
      InputError: if it is neither, or cannot be used.
    """
    if Path(text).is_dir():
        return classifier.reward(Path(text), corpus, mesh, dtype=dtype, field=field)
    if text.count(":") == 1:
        return function.reward(function.found(text, at_hand, field=field), corpus)
    raise InputError(
        f"{field} is {text!r}, which is neither a directory here nor module:name.",
        field=field,
        value=text,
        remedy="Give a Hugging Face directory of a sequence classifier with one label, or a Python function such as "
        "rewards:brevity.",
    )
