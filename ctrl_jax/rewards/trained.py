"""The reward model that was trained here, which reads the policy's own tokens."""

from jax.sharding import Mesh

from ctrl_jax import build
from ctrl_jax.rewards.reward import ROUNDING, Reward
from ctrl_jax.types import Params


def reward(models: build.Models, mesh: Mesh, params: Params, *, fingerprint: str) -> Reward:
    """The raw rewards that a reward model's variables give; `fingerprint` names these variables."""
    scorer = build.scorer(models, mesh)
    tolerance = ROUNDING[models.architecture.dtype]
    return Reward(lambda prompts, responses: scorer(params, prompts, responses), fingerprint, tolerance=tolerance)
