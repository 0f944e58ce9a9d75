"""What every reward is to the steps and the stages, wherever it comes from."""

from typing import NamedTuple

from jax.sharding import Mesh

from ctrl_jax.devices.programs import batch_spec, reader
from ctrl_jax.models.networks import Networks
from ctrl_jax.types import RewardApply, Score


class Reward(NamedTuple):
    score: Score
    fingerprint: str
    """Names the reward by content: whatever depends on it has this in its key."""
    name: str = "model"
    """Names it to a reader."""
    tolerance: float = 1e-5
    """How far two of its answers to the same text may be apart, as a share of the largest reward. Of a function it is
    small, but not 0: it may be a network as well, on another machine than before."""
    columns: tuple[str, ...] = ()
    """Columns of the data that it reads beside prompts and responses."""
    functions: tuple["Reward", ...] = ()
    """Of a combination, the Python functions in it: what their answers depend on besides their source, no key knows."""

    @property
    def asked(self) -> tuple["Reward", ...]:
        """Whose answers are asked again before what was made of them is used (pipeline/scored.py)."""
        return self.functions or (self,)


ROUNDING = {"float32": 0.02, "bfloat16": 0.1}
"""The tolerance of a network by its dtype: rounding differs between devices, and another network's answers differ by
far more."""


def scorer(parts: Networks, mesh: Mesh) -> RewardApply:
    """The program (reward parameters, prompts, responses) to raw rewards [B, N] of a network."""
    batch = batch_spec(mesh)
    return reader(mesh, parts.reward, (batch, batch), batch)
