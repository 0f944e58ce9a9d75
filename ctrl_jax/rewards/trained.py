"""The reward model that was trained here, which reads the policy's own tokens."""

from jax.sharding import Mesh

from ctrl_jax.models import networks
from ctrl_jax.rewards.reward import ROUNDING, Reward, scorer
from ctrl_jax.steps import ensemble
from ctrl_jax.types import Params


def reward(
    models: networks.Networks, mesh: Mesh, params: Params, *, fingerprint: str, members: str | None = None
) -> Reward:
    """The raw rewards that a reward model's variables give.

    Args:
      models: the networks.
      mesh: devices.
      params: the variables.
      fingerprint: names the variables.
      members: what makes one reward of an ensemble's members (ensemble.py); None where there are no members.
    """
    score, tolerance = scorer(models, mesh), ROUNDING[models.architecture.dtype]
    if members is None:
        return Reward(lambda prompts, responses: score(params, prompts, responses), fingerprint, tolerance=tolerance)
    name, one = ensemble.parse(members)
    return Reward(
        lambda prompts, responses: one(score(params, prompts, responses)), f"{fingerprint}-{name}", tolerance=tolerance
    )
