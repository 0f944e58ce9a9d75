"""Φ, the transforms of a calibrated reward: increasing functions of the rank u in [0, 1].

A transform is a callable on arrays of any shape, elementwise; it can be hashed, differentiated, and used inside `jit`.
Any other increasing callable serves as well. `str(phi)` names it, and `parse` reads the name back.

Under the reference policy u is uniform; the policy that maximises E[Φ(u)] - β KL has density ∝ exp(Φ(u) / β)
(InfAlign, Balashankar et al. 2024, arXiv 2412.19792). Adding a constant to Φ changes nothing, and scaling Φ scales β:
compare transforms by KL, never by β, or after `normalized`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory.names import check_length, number, split_call, unknown
from ctrl_jax.theory.precision import evaluate

Transform = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class _Identity:
    def __call__(self, u: jax.Array) -> jax.Array:
        return jnp.asarray(u)

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class _Logarithm:
    def __call__(self, u: jax.Array) -> jax.Array:
        return jnp.log(u)

    def __str__(self) -> str:
        return "logarithm"


@dataclass(frozen=True)
class _Logit:
    def __call__(self, u: jax.Array) -> jax.Array:
        return jnp.log(u) - jnp.log1p(-u)

    def __str__(self) -> str:
        return "logit"


@dataclass(frozen=True)
class _Exponential:
    rate: float

    def __call__(self, u: jax.Array) -> jax.Array:
        return math.copysign(1.0, self.rate) * jnp.exp(self.rate * u)

    def __str__(self) -> str:
        return f"exponential({number(self.rate)})"


@dataclass(frozen=True)
class _NormalizedExponential:
    rate: float

    def __call__(self, u: jax.Array) -> jax.Array:
        # (e^{tu} - 1) / (e^t - 1), with every exponent at most 0 and no difference of nearly equal numbers.
        decay = -abs(self.rate)
        rise = jnp.expm1(decay * u) / math.expm1(decay)
        return rise * jnp.exp(decay * (1 - u)) if self.rate > 0 else rise

    def __str__(self) -> str:
        return f"normalized(exponential({number(self.rate)}))"


@dataclass(frozen=True)
class _Tabulated:
    values: tuple[float, ...]
    ranks: tuple[float, ...]

    def __call__(self, u: jax.Array) -> jax.Array:
        u = jnp.asarray(u)
        return jnp.interp(u, jnp.asarray(np.array(self.ranks), u.dtype), jnp.asarray(np.array(self.values), u.dtype))

    def __str__(self) -> str:
        return f"tabulated({len(self.values)} values)"

    def __repr__(self) -> str:
        return f"<{self}>"


@dataclass(frozen=True)
class _Named:
    name: str
    transform: Transform

    def __call__(self, u: jax.Array) -> jax.Array:
        return self.transform(u)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Normalized:
    transform: Transform
    low: float
    """The least rank that is distinguished; smaller ones are clipped to it."""
    high: float
    bottom: float
    """Φ(low)."""
    top: float
    """Φ(high)."""

    def __call__(self, u: jax.Array) -> jax.Array:
        return (self.transform(jnp.clip(u, self.low, self.high)) - self.bottom) / (self.top - self.bottom)

    def __str__(self) -> str:
        return f"normalized({self.transform})"


def identity() -> Transform:
    """Φ(u) = u: the calibrated reward itself, as in online IPO; optimal for the standard win rate."""
    return _Identity()


def logarithm() -> Transform:
    """Φ(u) = log u: its policy at β = 1/(n - 1) is the best of n samples of the reference. -∞ at u = 0."""
    return _Logarithm()


def logit() -> Transform:
    """Φ(u) = log(u / (1 - u)). Infinite at both ends; exp(Φ/β) can be integrated for β > 1 only."""
    return _Logit()


def exponential(rate: float) -> Transform:
    """Φ_t(u) = sign(t) e^{tu}: close to optimal for best-of-N with t > 0, for worst-of-N with t < 0.

    As t → 0 the normalised transform becomes the identity. Raises InputError unless 1e-8 ≤ |t| ≤ 700: below, it is the
    identity to all digits that matter, and above, e^{tu} has no float64.

    >>> float(exponential(-1)(0.0))
    -1.0
    """
    rate = float(rate)
    if not 1e-8 <= abs(rate) <= 700:
        raise InputError(
            f"exponential({number(rate)}) is no transform",
            field="rate",
            value=rate,
            remedy="its rate must be finite, and between 1e-8 and 700, or between -700 and -1e-8. Its limit at 0 is "
            "called identity; beyond 700, e^rate is too large a number.",
        )
    return _Exponential(rate)


def tabulated(values: np.ndarray, ranks: np.ndarray | None = None) -> Transform:
    """Φ through `values` [G] at `ranks` [G], by default 0, 1/(G-1), ..., 1, and piecewise linear between them.

    Raises InputError unless the values are at least two, finite and nowhere decreasing, and the ranks increase from 0
    to 1.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 1 or table.size < 2:
        raise InputError(
            f"A table of a transform has shape {table.shape}",
            field="values",
            value=values,
            remedy="it must be one row of at least 2 values.",
        )
    knots = np.linspace(0, 1, table.size) if ranks is None else np.asarray(ranks, np.float64)
    if knots.shape != table.shape or knots[0] != 0 or knots[-1] != 1 or not np.all(np.diff(knots) > 0):
        raise InputError(
            f"The ranks of a table of a transform have shape {knots.shape} and go from {knots.flat[0]:g} to "
            f"{knots.flat[-1]:g}",
            field="ranks",
            value=ranks,
            remedy=f"they must be as many as the {table.size} values, and increase from 0 to 1.",
        )
    if not np.all(np.isfinite(table)):
        raise InputError(
            f"A table of a transform has {np.sum(~np.isfinite(table))} values that are not finite.",
            field="values",
            value=values,
            remedy="Give finite ones.",
        )
    if np.any(np.diff(table) < 0):
        place = int(np.argmax(np.diff(table) < 0))
        raise InputError(
            f"A table of a transform falls from {table[place]:g} to {table[place + 1]:g} after value {place}",
            field="values",
            value=values,
            remedy="a transform must be increasing, so that a better response never earns less.",
        )
    return _Tabulated(tuple(table.tolist()), tuple(knots.tolist()))


def named(name: str, phi: Transform) -> Transform:
    """Φ under a name that stands for it where runs are compared; without one a function is known by its source."""
    return _Named(name, phi)


def normalized(phi: Transform, edge: float = 1e-4) -> Transform:
    """(Φ(u) - Φ(low)) / (Φ(high) - Φ(low)): Φ on the range [0, 1], so that its β means the same as others'.

    Where Φ is infinite at an end of [0, 1], ranks are clipped `edge` short of that end; at an end where Φ is finite
    they are not. A rank from K reference responses knows no more than 1/K anyway.

    Raises InputError where Φ is constant or not a number, and where float32, which it is trained with, does not carry
    it.
    """
    if isinstance(phi, _Exponential):
        return _NormalizedExponential(phi.rate)
    if not 0 < edge < 0.5:
        raise InputError(
            f"The edge of a normalised transform is {edge}",
            field="edge",
            value=edge,
            remedy="it must lie between 0 and 0.5.",
        )
    ends = np.array([0.0, 1.0])
    # In steps of 2^-24, both edge and 1 - edge are exact in float32: the ends are the same ranks here and in training.
    edge = max(round(edge * 2**24), 1) / 2**24
    ends = np.where(np.isfinite(evaluate(phi, ends)), ends, np.array([edge, 1 - edge]))
    bottom, top = evaluate(phi, ends).tolist()
    if not top > bottom:
        raise InputError(
            f"{phi} cannot be normalised: it goes from {bottom} to {top}",
            field="phi",
            value=phi,
            remedy="it must increase.",
        )
    scaled = _Normalized(phi, low=float(ends[0]), high=float(ends[1]), bottom=bottom, top=top)
    ranks = np.linspace(0, 1, 65)
    error = np.max(np.abs(evaluate(scaled, ranks, np.float32) - evaluate(scaled, ranks)))
    if not error < 1e-3:
        raise InputError(
            f"{phi} goes from {number(bottom)} to {number(top)}, and float32, which it is trained with, does not keep "
            f"its values apart: of its range, {error:.2g} are lost.",
            field="phi",
            value=phi,
            remedy="Shift and scale it, such as to the range [0, 1].",
        )
    return scaled


def parse(text: str) -> Transform:
    """Φ from its name: "identity", "logarithm", "logit", or "exponential(-5)" with any rate. Raises InputError.

    "exp(5)", "exp5", "exponential:5" and "log" are read too; `str(phi)` is the canonical name.

    >>> parse("exp5") == exponential(5)
    True
    """
    constants = {"identity": identity, "logarithm": logarithm, "logit": logit}
    check_length(text)
    # Without brackets only a rate above 0: in exp-5 the sign could be a dash, as in best-of-4.
    short = re.fullmatch(r"\s*exp(?:onential)?(\d[^\s():]*)\s*", text, re.IGNORECASE)
    name, argument = split_call(f"exponential({short[1]})" if short else text)
    name = {"log": "logarithm", "exp": "exponential"}.get(name, name)
    if name in constants:
        if argument is not None:
            raise InputError(
                f"{text!r} has a number, but {name} takes none", field="transform", value=text, remedy=f"write {name}."
            )
        return constants[name]()
    if name == "exponential":
        if argument is None:
            raise InputError(
                "exponential needs its rate",
                field="transform",
                value=text,
                remedy="write exponential(10), or exponential(-10).",
            )
        return exponential(argument)
    raise unknown("transform", text, [*constants, "exponential(t)"])
