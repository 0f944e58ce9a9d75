"""The ideal continuous policy: what a transform Φ and a β make of the ranks, if training were perfect.

Where the reward has no ties, the rank u of a response among the reference's is uniform under the reference policy, and
the policy that maximises E[Φ(u)] - β KL has the density p(u) ∝ exp(Φ(u) / β) on [0, 1], whatever the prompt and the
reward (InfAlign, Balashankar et al. 2024, arXiv 2412.19792). Its KL and its win rates are integrals over u. They are
computed in float64, to 1e-5 or better up to a KL of 10 nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory.names import number
from ctrl_jax.theory.precision import double_precision, evaluate
from ctrl_jax.theory.procedures import Procedure

# A logarithm or a logit has its singularity at an end of [0, 1], and a small β piles the density up there: eight panels
# an octave towards both ends resolve every scale alike, down to _TIP, where 1 - u still has eight bits in float64. The
# panels are many and of a low order because a clipped or a tabulated Φ has corners.
_TIP = 2.0**-45
_OCTAVES = 2.0 ** np.linspace(-45, -5, 40 * 8, endpoint=False)
_KNOTS = np.concatenate([_OCTAVES, np.linspace(1 / 32, 31 / 32, 121), 1 - _OCTAVES[::-1]])
_GAUSS_POINTS, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(8)


def _gauss(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights [..., 8] of Gauss and Legendre between `left` and `right` [...]."""
    half = ((right - left) / 2)[..., None]
    return left[..., None] + half * (1 + _GAUSS_POINTS), half * _GAUSS_WEIGHTS


_POINTS, _WEIGHTS = _gauss(_KNOTS[:-1], _KNOTS[1:])


class _Values(NamedTuple):
    """Φ at the points of the panels, and twice near each end."""

    panels: np.ndarray
    ends: np.ndarray
    """[low and high end, (at 2 tips, at 1 tip)]."""


class _Masses(NamedTuple):
    """Integrals of exp((Φ - offset) / β)."""

    kl: float
    offset: float
    log_normalizer: float
    panels: np.ndarray
    """Probability of each panel."""
    tips: np.ndarray
    """[2] probability below _TIP and above 1 - _TIP."""


@dataclass(frozen=True)
class IdealPolicy:
    """The policy with density exp(Φ(u) / β) / Z on the ranks u in [0, 1]. Built by `tilt` and `at_kl`."""

    phi: Callable[[jax.Array], jax.Array]
    beta: float
    kl: float
    """KL(policy || reference) = ∫ p log p du, in nats per response."""
    offset: float = field(repr=False)
    log_normalizer: float = field(repr=False)
    """log ∫ exp((Φ(u) - offset) / β) du."""
    knots_cdf: tuple[float, ...] = field(repr=False, compare=False)
    """F at the ends of the panels."""

    def density(self, u: np.ndarray) -> np.ndarray:
        """p(u), of the shape of `u`."""
        with np.errstate(over="ignore"):
            return np.exp((evaluate(self.phi, u) - self.offset) / self.beta - self.log_normalizer)

    def cdf(self, u: np.ndarray) -> np.ndarray:
        """F(u) = ∫₀ᵘ p, of the shape of `u`; 0 below the ranks, and 1 above them."""
        u = np.clip(np.asarray(u, np.float64), 0, 1)
        at_knots = np.array(self.knots_cdf)
        panel = np.clip(np.searchsorted(_KNOTS, u, side="right") - 1, 0, len(_KNOTS) - 2)
        points, weights = _gauss(_KNOTS[panel], np.clip(u, _TIP, 1 - _TIP))
        inside = at_knots[panel] + np.sum(self.density(points) * weights, axis=-1)
        # Within a tip a straight line will do: the tips are narrower than any question asked.
        below = at_knots[0] * u / _TIP
        above = 1 - (1 - at_knots[-1]) * (1 - u) / _TIP
        return np.where(u < _TIP, below, np.where(u > 1 - _TIP, above, inside))

    def win_rate(self, procedure: Procedure) -> float:
        """W^T = 1 - ∫ T[F](u) dT[U](u): how often this policy beats the reference, both decoded by `procedure`.

        U(u) = u is the CDF of the reference's ranks. 0.5 for the reference itself.
        """
        with double_precision():
            u = jnp.asarray(_POINTS)
            _, reference_density = jax.jvp(procedure.rank_cdf, (u,), (jnp.ones_like(u),))
            loss = procedure.rank_cdf(jnp.asarray(self.cdf(_POINTS))) * reference_density
            return 1 - float(np.sum(np.asarray(loss) * _WEIGHTS))


def tilt(phi: Callable[[jax.Array], jax.Array], beta: float) -> IdealPolicy:
    """The ideal policy of the transform Φ under a KL penalty of weight β, in units of Φ per nat.

    Raises InputError where β is not positive, where Φ is not finite inside (0, 1), or where exp(Φ/β) has no integral
    (the logit, for β ≤ 1).
    """
    beta = float(beta)
    if not 0 < beta < math.inf:
        raise InputError(f"β is {number(beta)}; the weight of the KL must be greater than 0 and finite.")
    masses = _masses(_values(phi), beta)
    if masses.kl == math.inf:
        raise InputError(
            f"exp(Φ/β) has no integral for Φ = {phi} at β = {number(beta)}: it is infinite at an end of [0, 1], and "
            "grows too fast. Raise β (the logit needs β > 1), or normalise Φ, which clips it."
        )
    knots_cdf = masses.tips[0] + np.concatenate([[0.0], np.cumsum(masses.panels)])
    return IdealPolicy(phi, beta, masses.kl, masses.offset, masses.log_normalizer, tuple(knots_cdf.tolist()))


def at_kl(phi: Callable[[jax.Array], jax.Array], kl: float) -> IdealPolicy:
    """The ideal policy of the transform Φ whose KL to the reference is `kl` nats; β by bisection on its logarithm.

    Raises InputError where `kl` is not positive, or more than Φ reaches at any β: a Φ whose highest value is held on a
    share s of the ranks reaches log(1/s).
    """
    if not 0 < kl < math.inf:
        raise InputError(f"The KL is {kl}; a KL to aim at is a positive number of nats per response, such as 0.75.")
    values = _values(phi)
    mean = np.sum(values.panels * _WEIGHTS)
    spread = math.sqrt(np.sum((values.panels - mean) ** 2 * _WEIGHTS))
    # For a large β, KL ≈ Var Φ / 2β².
    high = low = spread / math.sqrt(2 * kl)
    while _masses(values, high).kl > kl:
        high *= 4
    while (reached := _masses(values, low).kl) < kl:
        low /= 4
        if low < 1e-290 + 1e-60 * spread:
            raise InputError(
                f"Φ = {phi} reaches a KL of {reached:.4g} nats at most, however small β, because it is flat near its "
                f"top; ask for less than {number(kl)}."
            )
    for _ in range(200):
        beta = math.sqrt(low * high)
        if not low < beta < high:
            break
        low, high = (beta, high) if _masses(values, beta).kl > kl else (low, beta)
    return tilt(phi, high)


def _values(phi: Callable[[jax.Array], jax.Array]) -> _Values:
    low, high = evaluate(phi, np.array([[2 * _TIP, _TIP], [1 - 2 * _TIP, 1 - _TIP]]))
    values = _Values(evaluate(phi, _POINTS), np.stack([low, high]))
    if not all(np.all(np.isfinite(part)) for part in values):
        raise InputError(
            f"Φ = {phi} is not finite everywhere inside (0, 1), computed in float64; a transform may be infinite at 0 "
            "and at 1 alone."
        )
    if np.ptp(values.panels) == 0:
        raise InputError(f"Φ = {phi} is constant: its policy is the reference at every β.")
    return values


def _masses(values: _Values, beta: float) -> _Masses:
    offset = max(values.panels.max(), values.ends.max())
    log_panels = (values.panels - offset) / beta
    log_ends = (values.ends - offset) / beta
    # Within a tip, at distance x from the end, the density is taken as a power x^-a, which a logarithm and a logit are
    # exactly. A logit at a high KL has a per cent of its probability there. Its integral is the density at the tip
    # times _TIP / (1 - a), and the mean of its logarithm lies a / (1 - a) above the logarithm there.
    power = (log_ends[:, 1] - log_ends[:, 0]) / math.log(2)
    if np.any(power >= 1):
        return _Masses(math.inf, offset, math.inf, np.ones_like(_KNOTS[1:]), np.zeros(2))
    panels = np.exp(log_panels) * _WEIGHTS
    tips = np.exp(log_ends[:, 1]) * _TIP / (1 - power)
    total = panels.sum() + tips.sum()
    with np.errstate(invalid="ignore"):
        mean_log = np.sum(panels * log_panels) + np.sum(tips * (log_ends[:, 1] + power / (1 - power)))
    kl = mean_log / total - math.log(total)
    return _Masses(float(kl), float(offset), math.log(total), panels.sum(axis=-1) / total, tips / total)
