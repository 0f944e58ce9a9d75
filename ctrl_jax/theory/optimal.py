"""Φ*, the optimal transform of any procedure.

The win rate under a procedure T is W^T = 1 - ∫ T[F] dT[U], with F the policy's CDF of ranks and U the reference's.
The policy that maximises W^T - β KL is the ideal policy of the transform Φ* = δW^T/δp taken at that policy itself
(InfAlign, Balashankar et al. 2024, arXiv 2412.19792). The derivative is taken by automatic differentiation, so a
procedure needs no more than its `rank_cdf`, which may be any increasing and differentiable map of [0, 1] onto itself.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, transforms
from ctrl_jax.theory.precision import double_precision, evaluate
from ctrl_jax.theory.procedures import Procedure

# Cells of ranks, uniform in the logit: the best of many samples, or a high KL, lives within a small distance of an end,
# and of the order of that distance are the cells there.
_CELLS = 4096
_EDGES = np.concatenate([[0.0], 1 / (1 + np.exp(-np.linspace(-24, 24, _CELLS - 1))), [1.0]])
_WIDTHS = np.diff(_EDGES)
_CENTRES = (_EDGES[1:] + _EDGES[:-1]) / 2
_RANKS = np.concatenate([[0.0], _CENTRES, [1.0]])

# Where rounding is all that is left of the win rate's slope, the identity says which rank is better: it is added with
# this weight. Without it Φ* would be flat there and reach no higher KL. It costs no more win rate than its weight.
_TIE_BREAK = 1e-12

_ROUNDING = 1e-6
"""By so much a rank CDF may fall over [0, 1], and miss 0 and 1, as rounding makes one of many terms."""

_ROUNDING_OF_WIN_RATE = 1e-14

_LEAST_KL = 1e-6
"""Below it Φ* is that of this KL: it hardly depends on a policy that is this near to the reference."""

_STARTS = ("identity", "exponential(10)", "exponential(-10)")


@dataclass(frozen=True)
class OptimalTransform:
    """Φ* of a procedure: a transform like any other, with the ideal policy that it belongs to."""

    procedure: Procedure
    transform: transforms.Transform = field(repr=False)
    """Φ* as an increasing table, in units of win rate: 0 at u = 1, and less below."""
    policy: ideal.IdealPolicy
    """The optimal policy; its `beta` weighs the KL against the win rate."""

    def __call__(self, u: jax.Array) -> jax.Array:
        return self.transform(u)

    def __str__(self) -> str:
        return f"optimal({self.procedure})"


def optimal_transform(procedure: Procedure, *, beta: float | None = None, kl: float | None = None) -> OptimalTransform:
    """Φ* of `procedure`: of max W^T - β KL for a given `beta`, or of max W^T at KL = `kl` (nats). Give one of the two.

    For best-of-N it is N² ∫₀ᵘ (s F(s))^(N-1) ds, for worst-of-N N² ∫₀ᵘ ((1-s)(1-F(s)))^(N-1) ds, for sampling u, each
    less its value at u = 1. `transforms.normalized` brings it to [0, 1] for training.

    Where W^T is not concave in p (worst-of-N, the median), a stationary point need not be the best: the climb begins
    from several starts, and the best end is kept.

    Raises InputError unless exactly one of `beta` and `kl` is given, and positive; where `ideal.at_kl` does; and where
    the procedure's `rank_cdf` does not rise from 0 to 1 or cannot be differentiated.

    >>> from ctrl_jax.theory.procedures import BestOfN
    >>> round(optimal_transform(BestOfN(4), kl=1.0).policy.win_rate(BestOfN(4)), 3)
    0.941
    """
    if (beta is None) == (kl is None):
        raise InputError(
            f"optimal_transform got beta={beta} and kl={kl}", field="kl", value=kl, remedy="give one of the two."
        )
    given = beta if kl is None else kl
    if given is None or not 0 < given < math.inf:
        raise InputError(
            f"optimal_transform got beta={beta} and kl={kl}",
            field="kl",
            value=kl,
            remedy="the one given must be greater than 0 and finite.",
        )

    objective = _Objective(procedure, _reference_masses(procedure))
    inverse_temperature = _held(given) if kl is None else functools.partial(_at_kl, kl=max(given, _LEAST_KL))
    starts = [
        _log_normalized(evaluate(policy.phi, _CENTRES) / policy.beta)
        for start_kl in ((0.05, 0.5, 2.0) if kl is None else (max(given, _LEAST_KL),))
        for policy in (ideal.at_kl(phi, start_kl) for phi in map(transforms.parse, _STARTS))
    ]
    ends = [_ascend(objective, start, inverse_temperature, tolerance=1e-5) for start in starts]
    penalty = beta or 0.0
    best = max(ends, key=lambda end: objective(end)[0] - penalty * _kl(end))
    best = _ascend(objective, best, inverse_temperature, tolerance=1e-10)

    values = _from_top(objective(best)[1])
    phi = transforms.tabulated(values, _RANKS)
    policy = ideal.tilt(phi, given) if kl is None else ideal.at_kl(phi, given)
    return OptimalTransform(procedure, phi, policy)


def _from_top(rises: np.ndarray) -> np.ndarray:
    """δW^T/δp at 0, the centres and 1, less its value at 1: most of a policy is near 1, and needs the digits there."""
    return -np.append(np.cumsum(rises[::-1])[::-1], 0.0)


@dataclass(frozen=True)
class _Objective:
    procedure: Procedure
    reference_masses: np.ndarray
    """[cells] probability of each cell under the reference, decoded by the procedure."""

    def __call__(self, log_density: np.ndarray) -> tuple[float, np.ndarray]:
        """W^T, and how much δW^T/δp rises at each edge of the cells.

        F(s) counts the density below s, so that δW/δp at u is ∫_u^1 of δW/δF: at s it rises by -δW/δF = T'[F] dT[U],
        which is not negative; below 0 it is rounding. Both include the tie-break.
        """
        masses = np.exp(log_density) * _WIDTHS
        cdf = np.minimum(np.concatenate([[0.0], np.cumsum(masses)]), 1.0)
        selected, slope = _rank_cdf_and_slope(self.procedure, cdf)
        halves = self.reference_masses / 2
        at_edges = np.append(halves, 0.0) + np.append(0.0, halves)
        win_rate = 1 - float(np.sum(selected * at_edges))
        rises = np.maximum(slope, 0) * at_edges
        return win_rate + _TIE_BREAK * float(np.sum(masses * _CENTRES)), rises + _TIE_BREAK * np.diff(_RANKS)


def _reference_masses(procedure: Procedure) -> np.ndarray:
    """[cells] ∫ dT[U] over each cell. From slopes, since differences of T[U] have no digits left where T[U] is near 1.

    Raises InputError where T[U] is no differentiable CDF.
    """
    ends, _ = _rank_cdf_and_slope(procedure, np.array([0.0, 1.0]))
    points, weights = ideal.gauss(_EDGES[:-1], _EDGES[1:])
    values, slopes = _rank_cdf_and_slope(procedure, points)
    if not all(np.all(np.isfinite(part)) for part in (values, slopes)):
        raise InputError(
            f"The rank CDF of {procedure}, or its derivative, is not finite everywhere in (0, 1).",
            field="procedure",
            value=procedure,
            remedy="Write it so that it can be differentiated at any rank.",
        )
    if np.max(np.abs(ends - [0, 1])) > _ROUNDING:
        raise InputError(
            f"The rank CDF of {procedure} goes from {ends[0]:g} to {ends[1]:g}",
            field="procedure",
            value=procedure,
            remedy="it must go from 0 to 1.",
        )
    falls = -np.sum(np.minimum(slopes, 0) * weights)
    if falls > _ROUNDING:
        lowest = np.unravel_index(np.argmin(slopes), slopes.shape)
        raise InputError(
            f"The rank CDF of {procedure} falls: its slope at {points[lowest]:.4g} is {slopes[lowest]:.4g}.",
            field="procedure",
            value=procedure,
            remedy="A CDF never falls.",
        )
    masses = np.sum(np.maximum(slopes, 0) * weights, axis=-1)
    if abs(masses.sum() - 1) > 1e-3:
        raise InputError(
            f"The rank CDF of {procedure} has slopes that add up to {masses.sum():.4g} in place of 1: it jumps, or is "
            "rounded.",
            field="procedure",
            value=procedure,
            remedy="It must be differentiable, in jax.numpy, from its argument in float64.",
        )
    return masses / masses.sum()


def _rank_cdf_and_slope(procedure: Procedure, cdf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T[F] and T'[F], in float64."""
    try:
        with double_precision():
            value, slope = _with_slope(procedure, jnp.asarray(cdf))
    except (TypeError, ValueError) as error:  # jax's errors of tracing are TypeErrors
        raise InputError(
            f"The rank CDF of {procedure} cannot be differentiated: {str(error).splitlines()[0].rstrip('.')}.",
            field="procedure",
            value=procedure,
            remedy="Write it in jax.numpy, of an array, elementwise; and let the procedure be hashable, such as a "
            "frozen dataclass.",
        ) from error
    return np.asarray(value), np.asarray(slope)


@functools.partial(jax.jit, static_argnums=0)
def _with_slope(procedure: Procedure, cdf: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(procedure.rank_cdf, (cdf,), (jnp.ones_like(cdf),))


_InverseTemperature = Callable[[np.ndarray, float], float]
"""(direction, damping L) to 1 / (β + L), the scale of the direction in the next log density."""


def _ascend(
    objective: _Objective, log_density: np.ndarray, inverse_temperature: _InverseTemperature, tolerance: float
) -> np.ndarray:
    """Mirror ascent p ← argmax ⟨δW/δp, p⟩ - β KL(p || reference) - L KL(p || old p), to the stationary log density.

    The step is p ∝ exp((δW/δp + L log p) / (β + L)). L, the damping, follows the curvature met: a step that gains less
    than its linear model promises, less L KL, is taken back and L doubled; otherwise L is halved. Where W is convex L
    vanishes. Plain fixed-point iteration, which is L = 0, diverges for best-of-N at a small β.
    """
    win_rate, rises = objective(log_density)
    damping = 0.1 * float(np.sum(rises))
    for _ in range(1000):
        gradient = _from_top(rises)[1:-1]
        direction = gradient + damping * log_density
        inverse = inverse_temperature(direction, damping)
        proposal = _log_normalized(inverse * direction)
        moved = np.exp(proposal) * _WIDTHS
        distance = float(np.sum(moved * (proposal - log_density)))
        promised = float(np.sum((moved - np.exp(log_density) * _WIDTHS) * gradient))
        # A damped step goes 1 - inverse * damping of the way. Below 1e-15, the distance is rounding; and so is what is
        # gained, (β + L) times the distance.
        if distance <= max(tolerance * (1 - inverse * damping) ** 2, 1e-15, inverse * _ROUNDING_OF_WIN_RATE):
            return proposal
        new_win_rate, new_rises = objective(proposal)
        if new_win_rate < win_rate + promised - damping * distance - _ROUNDING_OF_WIN_RATE:
            damping = max(2 * damping, 1e-6 * float(np.sum(rises)))
        else:
            log_density, win_rate, rises = proposal, new_win_rate, new_rises
            damping /= 2
    return log_density


def _held(beta: float) -> _InverseTemperature:
    return lambda direction, damping: 1 / (beta + damping)


def _at_kl(direction: np.ndarray, damping: float, *, kl: float) -> float:
    """The scale at which the next density has `kl` nats, by Newton's method on log KL against log scale.

    β is its multiplier, and is not negative: the scale is at most 1 / damping.
    """
    low, high = 0.0, math.inf
    mean = np.sum(direction * _WIDTHS)
    scale = math.sqrt(2 * kl / np.sum((direction - mean) ** 2 * _WIDTHS))
    for _ in range(100):
        log_density = _log_normalized(scale * direction)
        masses = np.exp(log_density) * _WIDTHS
        reached = float(np.sum(masses * log_density))
        low, high = (scale, high) if reached < kl else (low, scale)
        mean = np.sum(masses * direction)
        slope = scale**2 * np.sum(masses * (direction - mean) ** 2) / reached
        step = math.log(kl / reached) / slope
        if abs(step) < 1e-13:
            break
        scale *= math.exp(min(max(step, -1.0), 1.0))
        if not low < scale < high:
            scale = (low + high) / 2
    return min(scale, 1 / damping) if damping > 0 else scale


def _log_normalized(log_density: np.ndarray) -> np.ndarray:
    log_density = log_density - log_density.max()
    return log_density - math.log(np.sum(np.exp(log_density) * _WIDTHS))


def _kl(log_density: np.ndarray) -> float:
    return float(np.sum(np.exp(log_density) * log_density * _WIDTHS))
