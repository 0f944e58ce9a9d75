"""Decoders by their names."""

import re

from ctrl_jax.decoding.decoder import MOST_SAMPLES
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures
from ctrl_jax.theory.names import check_length
from ctrl_jax.theory.procedures import Procedure

FORMS = "best_of_8, blockwise_best_of_8(4), tree_of_8(2,4) or any procedure"


def parse(text: str) -> Procedure | Tree:
    """A procedure's name, or `blockwise_best_of_K(L)` or `tree_of_K(m,L)`: K responses at a time, of which m are kept
    after every L tokens.

    Raises:
      InputError: for another name, with the nearest; for numbers that make no tree.
    """
    check_length(text)
    if found := re.fullmatch(r"\s*blockwise[_-]best[_-]of[_-](\d+)\s*\(\s*(\d+)\s*\)\s*", text, re.IGNORECASE):
        return Tree(int(found[1]), 1, int(found[2]))
    if found := re.fullmatch(r"\s*tree[_-]of[_-](\d+)\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*", text, re.IGNORECASE):
        return Tree(int(found[1]), int(found[2]), int(found[3]))
    try:
        found_procedure = procedures.parse(text)
    except InputError as error:
        raise InputError(
            f"There is no decoder {text!r}", field="decoder", value=text, remedy=f"give {FORMS}. {error}"
        ) from None
    if found_procedure.num_samples > MOST_SAMPLES:
        raise InputError(
            f"{found_procedure} draws {found_procedure.num_samples} responses",
            field="decoder",
            value=found_procedure.num_samples,
            remedy=f"at most {MOST_SAMPLES} are drawn at a time.",
        )
    return found_procedure
