"""The ideal continuous policy: what a transform Φ and a β make of the ranks, if training were perfect.

Where the reward has no ties, the rank u of a response among the reference's is uniform under the reference policy, and
the policy that maximises E[Φ(u)] - β KL has the density p(u) ∝ exp(Φ(u) / β) on [0, 1], whatever the prompt and the
reward (InfAlign, Balashankar et al. 2024, arXiv 2412.19792). Its KL and its win rates are integrals over u. They are
computed in float64, to 1e-5 or better up to a KL of MOST_KL.
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


MOST_KL = 20.0
"""Nats, the KL of the best of some 10^9 responses. The density of a higher one is too near an end of [0, 1]."""


def gauss(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights [..., 8] of Gauss and Legendre between `left` and `right` [...]."""
    half = ((right - left) / 2)[..., None]
    return left[..., None] + half * (1 + _GAUSS_POINTS), half * _GAUSS_WEIGHTS


_POINTS, _WEIGHTS = gauss(_KNOTS[:-1], _KNOTS[1:])


_SMALL = 3e-3


class _Values(NamedTuple):
    """(Φ - offset) / scale, in [-1, 0], at the points of the panels, and twice near each end."""

    offset: float
    """The highest Φ."""
    scale: float
    """How far Φ goes. β is in these units where it meets the values, so that neither under- nor overflows."""
    panels: np.ndarray
    ends: np.ndarray
    """[low and high end, (at 2 tips, at 1 tip)]."""


class _Masses(NamedTuple):
    """Integrals of exp((Φ - offset) / β)."""

    kl: float
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
        points, weights = gauss(_KNOTS[panel], np.clip(u, _TIP, 1 - _TIP))
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

    >>> from ctrl_jax.theory.transforms import logarithm
    >>> best_of_4 = tilt(logarithm(), beta=1 / 3)  # log 4 - 3/4 nats
    >>> round(best_of_4.kl, 4)
    0.6363
    """
    beta = float(beta)
    if not 0 < beta < math.inf:
        raise InputError(
            f"β is {number(beta)}",
            field="beta",
            value=beta,
            remedy="the weight of the KL must be greater than 0 and finite.",
        )
    values = _values(phi)
    masses = _masses(values, beta / values.scale)
    if masses.kl == math.inf:
        raise InputError(
            f"exp(Φ/β) has no integral for Φ = {phi} at β = {number(beta)}: it is infinite at an end of [0, 1], and "
            "grows too fast.",
            field="beta",
            value=beta,
            remedy="Raise β (the logit needs β > 1), or normalise Φ, which clips it.",
        )
    knots_cdf = masses.tips[0] + np.concatenate([[0.0], np.cumsum(masses.panels)])
    return IdealPolicy(phi, beta, masses.kl, values.offset, masses.log_normalizer, tuple(knots_cdf.tolist()))


def at_kl(phi: Callable[[jax.Array], jax.Array], kl: float) -> IdealPolicy:
    """The ideal policy of the transform Φ whose KL to the reference is `kl` nats; β by bisection on its logarithm.

    Raises InputError where `kl` is not positive or above MOST_KL, where it is more than Φ reaches at any β (a Φ whose
    highest value is held on a share s of the ranks reaches log(1/s)), and where no float64 is that β.

    >>> from ctrl_jax.theory.procedures import BestOfN
    >>> from ctrl_jax.theory.transforms import exponential, identity
    >>> [round(at_kl(phi, 0.5).win_rate(BestOfN(4)), 4) for phi in (identity(), exponential(10))]
    [0.7998, 0.8715]
    """
    if not 0 < kl < math.inf:
        raise InputError(
            f"The KL is {kl}",
            field="kl",
            value=kl,
            remedy="a KL to aim at is a positive number of nats per response, such as 0.75.",
        )
    if kl > MOST_KL:
        raise InputError(
            f"The KL is {number(kl)} nats",
            field="kl",
            value=kl,
            remedy=f"ideal policies are computed up to {MOST_KL:g} nats, the KL of the best of some 10^9 responses. "
            "Give less.",
        )
    values = _values(phi)
    mean = np.sum(values.panels * _WEIGHTS)
    spread = math.sqrt(np.sum((values.panels - mean) ** 2 * _WEIGHTS))
    # For a large β, KL ≈ Var Φ / 2β².
    high = low = spread / math.sqrt(2 * kl)
    while _masses(values, high).kl > kl:
        high *= 4
    while (reached := _masses(values, low).kl) < kl:
        low /= 4
        if low < 1e-300:
            raise InputError(
                f"Φ = {phi} reaches a KL of {reached:.4g} nats at most, however small β, because it is flat near its "
                "top, to the digits of float64",
                field="kl",
                value=kl,
                remedy=f"ask for less than {number(kl)}.",
            )
    for _ in range(200):
        beta = math.sqrt(low) * math.sqrt(high)
        if not low < beta < high:
            break
        low, high = (beta, high) if _masses(values, beta).kl > kl else (low, beta)
    if not 0 < high * values.scale < math.inf:
        raise InputError(
            f"Φ = {phi} has a KL of {number(kl)} nats at β = {high:.3g} times its range of {values.scale:.3g}, which "
            "is no float64.",
            field="kl",
            value=kl,
            remedy="Normalise Φ, or ask for another KL.",
        )
    return tilt(phi, high * values.scale)


def reachable_kl(num_references: int, ties: int = 1) -> float:
    """The KL, in nats, that a reward can ask for which is a rank among K reference responses.

    It asks for no more than a place above all but `ties` - 1 of them. As the ranks of K references are uniform, that
    place has a KL of E[-log P] = Σ_{j = ties}^{K} 1/j to the reference, about log(K / ties).

    >>> round(reachable_kl(128), 2)
    5.43
    """
    return float(np.sum(1 / np.arange(ties, num_references + 1)))


def _values(phi: Callable[[jax.Array], jax.Array]) -> _Values:
    panels, (low, high) = evaluate(phi, _POINTS), evaluate(phi, np.array([[2 * _TIP, _TIP], [1 - 2 * _TIP, 1 - _TIP]]))
    ends = np.stack([low, high])
    if not (np.all(np.isfinite(panels)) and np.all(np.isfinite(ends))):
        raise InputError(
            f"Φ = {phi} is not finite everywhere inside (0, 1), computed in float64",
            field="phi",
            value=phi,
            remedy="a transform may be infinite at 0 and at 1 alone.",
        )
    offset, bottom = float(max(panels.max(), ends.max())), float(min(panels.min(), ends.min()))
    scale = offset - bottom
    if panels.max() == panels.min():
        raise InputError(
            f"Φ = {phi} is constant: its policy is the reference at every β.",
            field="phi",
            value=phi,
            remedy="Give a transform that increases.",
        )
    if not 1e-300 < scale < math.inf:
        raise InputError(
            f"Φ = {phi} goes from {bottom:g} to {offset:g}, which float64 cannot divide",
            field="phi",
            value=phi,
            remedy="scale it.",
        )
    return _Values(offset, scale, (panels - offset) / scale, (ends - offset) / scale)


def _masses(values: _Values, beta: float) -> _Masses:
    """Of the density ∝ exp(value / β)."""
    with np.errstate(over="ignore"):
        # Below -1e4, exp is 0 whatever the rest; -inf would make nan of it.
        log_panels = np.maximum(values.panels / beta, -1e4)
        log_ends = np.maximum(values.ends / beta, -1e4)
    # Within a tip, at distance x from the end, the density is taken as a power x^-a, which a logarithm and a logit are
    # exactly. A logit at a high KL has a per cent of its probability there. Its integral is the density at the tip
    # times _TIP / (1 - a), and the mean of its logarithm is a / (1 - a) above the logarithm there.
    power = (log_ends[:, 1] - log_ends[:, 0]) / math.log(2)
    if np.any(power >= 1):
        return _Masses(math.inf, math.inf, np.ones_like(_KNOTS[1:]), np.zeros(2))
    panels = np.exp(log_panels) * _WEIGHTS
    tips = np.exp(log_ends[:, 1]) * _TIP / (1 - power)
    total = panels.sum() + tips.sum()
    if min(log_panels.min(), log_ends.min()) > -_SMALL:
        kl = _small_kl(log_panels)
    else:
        mean_log = np.sum(panels * log_panels) + np.sum(tips * (log_ends[:, 1] + power / (1 - power)))
        kl = float(mean_log / total - math.log(total))
    return _Masses(kl, math.log(total), panels.sum(axis=-1) / total, tips / total)


def _small_kl(log_weights: np.ndarray) -> float:
    """KL of the density ∝ exp(log_weights) at the points of the panels, none of which is as large as _SMALL.

    By its cumulants, κ₂/2 + κ₃/3 + κ₄/8 + ..., because E[log p] is the difference of numbers that are far larger.
    """
    deviations = log_weights - np.sum(log_weights * _WEIGHTS)
    second, third, fourth = (float(np.sum(deviations**k * _WEIGHTS)) for k in (2, 3, 4))
    return second / 2 + third / 3 + (fourth - 3 * second**2) / 8
