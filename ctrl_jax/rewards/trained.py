"""The reward model that was trained here, which reads the policy's own tokens."""

from jax.sharding import Mesh

from ctrl_jax.models import networks
from ctrl_jax.rewards.reward import ROUNDING, Reward, scorer
from ctrl_jax.steps.ensemble import Ensemble
from ctrl_jax.types import Params


def reward(
    models: networks.Networks, mesh: Mesh, params: Params, *, fingerprint: str, one: Ensemble | None = None
) -> Reward:
    """The raw rewards that a reward model's variables give.

    Args:
      models: the networks.
      mesh: devices.
      params: the variables.
      fingerprint: names the variables, and `one`.
      one: what makes one reward of those of an ensemble's members.
    """
    score, tolerance = scorer(models, mesh), ROUNDING[models.architecture.dtype]
    if one is None:
        return Reward(lambda prompts, responses: score(params, prompts, responses), fingerprint, tolerance=tolerance)
    return Reward(lambda prompts, responses: one(score(params, prompts, responses)), fingerprint, tolerance=tolerance)
