"""The objective of a training: a transform of the calibrated reward, the procedure that decodes, and a KL budget.

    max_π E[Φ(C(x, y))] − β KL(π || π_ref),    with the β at which the ideal policy has the KL budget

(InfAlign, Balashankar et al. 2024, arXiv 2412.19792). Φ is one of `transforms`, any callable, or one of two special
cases: `optimal()`, the Φ* of the procedure at the budget, and `raw()`, the reward itself without calibration (RLHF).
"""

import functools
import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, procedures, transforms
from ctrl_jax.theory.ideal import IdealPolicy
from ctrl_jax.theory.optimal import OptimalTransform, optimal_transform
from ctrl_jax.theory.precision import evaluate
from ctrl_jax.theory.procedures import Procedure, Sampling
from ctrl_jax.theory.transforms import Transform

Transformed = Callable[[Any, Any], Any]
"""(raw rewards, calibrated rewards) to the rewards that a policy is trained on: arrays of one shape."""

ROWS_FOR_BETA = 2**14
"""Prompts that the β of raw rewards is computed from, at most; more would move it less than the controller will."""


@dataclass(frozen=True)
class Raw:
    def __str__(self) -> str:
        return "raw"


@dataclass(frozen=True)
class Optimal:
    def __str__(self) -> str:
        return "optimal"


def raw() -> Raw:
    """No transform, and no calibration: the policy is trained on the raw reward, as in RLHF."""
    return Raw()


def optimal() -> Optimal:
    """Φ*, the optimal transform of the objective's procedure at the KL in question (optimal.py)."""
    return Optimal()


@dataclass(frozen=True)
class Ideal:
    """The ideal policy of an objective: what perfect training would reach."""

    policy: IdealPolicy = field(repr=False)
    procedure: Procedure = field(repr=False)

    @property
    def kl(self) -> float:
        """KL(policy || reference), nats per response."""
        return self.policy.kl

    @property
    def beta(self) -> float:
        """The weight of the KL against Φ on the range [0, 1], or, unless `beta_is_normalized`, against Φ itself."""
        return self.policy.beta / self._span if self.beta_is_normalized else self.policy.beta

    @property
    def beta_is_normalized(self) -> bool:
        """False where Φ is infinite at an end of [0, 1], so that it has no range to be normalised by."""
        return math.isfinite(self._span)

    @property
    def win_rates(self) -> dict[str, float]:
        """Against the reference, by procedure: `sampling`, and the objective's own for both sides."""
        return {one.name: self.win_rate(one) for one in dict.fromkeys([Sampling(), self.procedure])}

    def win_rate(self, procedure: Procedure) -> float:
        """How often it beats the reference, both decoded by `procedure`."""
        return self.policy.win_rate(procedure)

    @property
    def _span(self) -> float:
        return float(np.ptp(evaluate(self.policy.phi, np.array([0.0, 1.0]))))

    def __repr__(self) -> str:
        win_rates = ", ".join(f"{name}: {value:.4f}" for name, value in self.win_rates.items())
        return f"Ideal(kl={self.kl:.4g}, beta={self.beta:.4g}, win_rates={{{win_rates}}})"


@dataclass(frozen=True)
class Objective:
    """What a policy is trained for.

    Args:
      transform: Φ, an increasing function of the rank in [0, 1]: one of `transforms`, any callable on arrays,
        `raw()` or `optimal()`.
      procedure: how the policy will be decoded.
      kl_budget: KL(policy || reference) to end at, nats per response.

    Raises:
      InputError: if one of them is of another kind, or the budget is not positive.
    """

    transform: Transform | Raw | Optimal
    procedure: Procedure
    kl_budget: float

    def __post_init__(self) -> None:
        if not (callable(self.transform) or isinstance(self.transform, Raw | Optimal)):
            raise InputError(
                f"Objective.transform is {self.transform!r}",
                field="transform",
                value=self.transform,
                remedy="give a function of ranks, such as exponential(10). Objective.parse reads names.",
            )
        if not isinstance(self.procedure, Procedure):
            raise InputError(
                f"Objective.procedure is {self.procedure!r}",
                field="procedure",
                value=self.procedure,
                remedy="give a procedure, such as best_of(4). Objective.parse reads names.",
            )
        if not 0 < self.kl_budget < math.inf:
            raise InputError(
                f"Objective.kl_budget is {self.kl_budget}",
                field="kl_budget",
                value=self.kl_budget,
                remedy="give a number of nats per response above 0, such as 0.6.",
            )

    @classmethod
    def parse(cls, transform: str, procedure: str, kl_budget: float) -> "Objective":
        """The objective of a transform's and a procedure's names; raises InputError for names that do not exist."""
        return cls(parse_transform(transform), procedures.parse(procedure), kl_budget)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the objective is, as JSON. A callable enters by its source and the values it closes over.

        Raises:
          InputError: if the source of a callable cannot be read.
        """
        transform = _fingerprint(self.transform)
        return {"transform": transform, "procedure": self.procedure.name, "kl_budget": self.kl_budget}

    def transformed(self, num_references: int) -> Transformed:
        """The function (raw, calibrated) to the rewards that are trained on, where K reference responses calibrate.

        Φ on the range [0, 1]; where it is infinite at an end, half a reference response before that. Raw rewards stay
        as they are.
        """
        phi = self._phi(num_references)
        if phi is None:
            return lambda raw, calibrated: raw
        return lambda raw, calibrated: phi(calibrated)

    def beta(self, num_references: int, reference_rewards: Any) -> float:
        """The β at which the ideal policy has the KL budget, in the units of `transformed`.

        Args:
          num_references: K reference responses a prompt, or the Q quantiles of their rewards.
          reference_rewards: [B, K] raw rewards, of which `raw()` alone reads some: of ranks the law is known.
            Quantiles lack the ends of the sample, so that β comes out a little too small; the controller trims it.

        Raises:
          InputError: if no β has that KL.
        """
        phi = self._phi(num_references)
        if phi is not None:
            return ideal.at_kl(phi, self.kl_budget).beta
        every = -(-len(reference_rewards) // ROWS_FOR_BETA)
        return empirical_beta(jnp.asarray(reference_rewards[::every]), self.kl_budget)

    def ideal(self, kl: float | None = None) -> Ideal | None:
        """The ideal policy at `kl` nats, by default the budget; None for a raw reward: the theory is one of ranks.

        Raises:
          InputError: if no policy of Φ has that KL.
        """
        kl = self.kl_budget if kl is None else kl
        match self.transform:
            case Raw():
                return None
            case Optimal():
                phi: Transform = _optimal(self.procedure, kl)
            case phi:
                pass
        return Ideal(ideal.at_kl(phi, kl), self.procedure)

    def most_kl(self, num_references: int) -> float:
        """The KL below which a budget must be, nats: what K reference responses support, whatever the shape of Φ.

        The ideal policy of raw rewards tilts the K responses themselves, up to log K; that of ranks reaches
        `ideal.reachable_kl`.
        """
        return math.log(num_references) if isinstance(self.transform, Raw) else ideal.reachable_kl(num_references)

    def check(self, num_references: int) -> None:
        """Raises InputError where K reference responses do not support the KL budget.

        A calibrated reward has K + 1 levels, and float32 may round Φ at the highest few to one number.
        """
        reached, ties = self.most_kl(num_references), 1
        phi = self._phi(num_references)
        if phi is not None:
            ideal.at_kl(phi, self.kl_budget)
            levels = np.asarray(phi(jnp.arange(num_references + 1, dtype=jnp.float32) / num_references))
            ties = int(np.sum(levels == levels.max()))
            reached = ideal.reachable_kl(num_references, ties)
        if self.kl_budget >= reached:
            flat = f"; float32 gives the {ties} highest ranks the same Φ" if ties > 1 else ""
            less_flat = ", choose a transform that is less flat near its top" if ties > 1 else ""
            raise InputError(
                f"Policy.kl_budget is {self.kl_budget:g} nats, but with {num_references} reference responses a prompt "
                f"{self.transform} reaches {reached:.3g} at most{flat}.",
                field="policy.kl_budget",
                value=self.kl_budget,
                remedy=f"Lower `policy.kl_budget`{less_flat}, raise `calibration.samples_per_prompt` (and "
                "`calibration.quantiles`, if it is given), or give `policy.beta`.",
            )

    def _phi(self, num_references: int) -> Transform | None:
        """Φ on its range [0, 1]; None for a raw reward."""
        match self.transform:
            case Raw():
                return None
            case Optimal():
                phi: Transform = _optimal(self.procedure, self.kl_budget)
            case phi:
                pass
        return transforms.normalized(phi, edge=0.5 / num_references)


def parse_transform(text: str) -> Transform | Raw | Optimal:
    """As `transforms.parse`, which see, and `raw` and `optimal`."""
    special: dict[str, Raw | Optimal] = {str(one): one for one in (Raw(), Optimal())}
    return special.get(text.strip().lower()) or transforms.parse(text)


@functools.lru_cache(maxsize=64)
def _optimal(procedure: Procedure, kl: float) -> OptimalTransform:
    return optimal_transform(procedure, kl=kl)


def _fingerprint(transform: Any) -> str:
    if not inspect.isroutine(transform):
        return str(transform)
    try:
        source = inspect.getsource(transform)
    except (OSError, TypeError) as error:
        raise InputError(
            f"The source of the transform {transform!r} cannot be read, so that a later run could not know it again.",
            field="transform",
            value=transform,
            remedy='Define it in a file or a notebook, or name it: transforms.named("mine", phi).',
        ) from error
    closed_over = inspect.getclosurevars(transform).nonlocals
    digest = hashlib.sha256(f"{source}\n{sorted(closed_over.items())}".encode()).hexdigest()[:16]
    return f"{transform.__name__}-{digest}"


def check_reachable(rewards: jax.Array, budget: float) -> None:
    """Raises InputError where no tilt of the K reference responses with these rewards [B, K] has a KL of the budget."""
    # As β falls, all weight goes to the responses that share a prompt's highest reward.
    highest = (rewards == rewards.max(axis=-1, keepdims=True)).sum(-1)
    most = float(jnp.log(rewards.shape[-1] / highest).mean())
    if most == 0:
        raise InputError(
            "All reference responses of every prompt have the same reward; nothing can be learned from it.",
            field="reference_rewards",
            value=rewards,
            remedy="Train the reward model longer (`reward_model.steps`) or on more data, or give a reward that "
            "distinguishes responses.",
        )
    if budget >= most:
        raise InputError(
            f"The KL budget is {budget} nats, but of {rewards.shape[-1]} reference responses a prompt "
            f"{float(highest.mean()):.3g} share the highest reward, which gives β only up to {most:.3g}.",
            field="policy.kl_budget",
            value=budget,
            remedy="Lower `policy.kl_budget`, take a reward with more levels (of BonRl a higher `policy.success`), "
            "raise `calibration.samples_per_prompt` (and `calibration.quantiles`, if it is given), or give "
            "`policy.beta`.",
        )


def empirical_beta(rewards: jax.Array, budget: float) -> float:
    """β with E_x KL(tilted || uniform) = budget, where exp(r / β) tilts a prompt's K reference responses: [B, K]."""

    def mean_kl(beta: jax.Array, rewards: jax.Array) -> jax.Array:
        log_weights = jax.nn.log_softmax(rewards / beta, axis=-1)
        return (jnp.exp(log_weights) * (log_weights + jnp.log(rewards.shape[-1]))).sum(-1).mean()

    check_reachable(rewards, budget)
    # On their own scale, or float32 would not hold the squares of rewards of 1e20.
    rewards = rewards - rewards.max(axis=-1, keepdims=True)
    scale = float(-rewards.min())
    rewards = rewards / scale
    spread = float(jnp.std(rewards, axis=-1).mean())

    @jax.jit
    def bisect(low: jax.Array, high: jax.Array, rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
        def halve(_: jax.Array, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bracket
            middle = (low + high) / 2
            # The KL falls as β grows.
            too_far = mean_kl(jnp.exp(middle), rewards) > budget
            return jnp.where(too_far, middle, low), jnp.where(too_far, high, middle)

        return jax.lax.fori_loop(0, 50, halve, (low, high))

    return scale * float(jnp.exp(bisect(jnp.log(1e-3 * spread), jnp.log(1e3 * spread), rewards)[0]))
