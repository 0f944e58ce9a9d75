"""The reward model that was trained here, which reads the policy's own tokens."""

from jax.sharding import Mesh

from ctrl_jax.models import networks
from ctrl_jax.rewards.reward import ROUNDING, Reward, scorer
from ctrl_jax.types import Params


def reward(models: networks.Networks, mesh: Mesh, params: Params, *, fingerprint: str) -> Reward:
    """The raw rewards that a reward model's variables give; `fingerprint` names these variables."""
    score = scorer(models, mesh)
    tolerance = ROUNDING[models.architecture.dtype]
    return Reward(lambda prompts, responses: score(params, prompts, responses), fingerprint, tolerance=tolerance)
