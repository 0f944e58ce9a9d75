"""Inference-time procedures: how a response is picked among samples whose scores are known.

Each looks at the order of n samples alone: it picks the i-th lowest with probability `law()[i]`. That one definition
has three faces: `select` on scores, `rank_cdf` on the ideal model, and `order_weights` for unbiased estimates from more
samples than n. `parse` reads a procedure's `name` back.
"""

import abc
import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.theory.names import check_length, number, split_call, unknown

MOST_SAMPLES = 1_000_000
"""N, at most: a procedure's law is an array of as many probabilities."""


class Procedure(abc.ABC):
    """Picks one of `num_samples` samples by the order of their scores."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What `parse` reads back."""

    @property
    @abc.abstractmethod
    def num_samples(self) -> int:
        """n: samples a pick looks at."""

    @abc.abstractmethod
    def law(self) -> np.ndarray:
        """[n] probability that the i-th lowest of n samples is picked."""

    @abc.abstractmethod
    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        """T[F]: CDF of the picked sample's rank where one sample's is `cdf`; elementwise and differentiable.

        T[F] = Σ_i law_i P(the i-th lowest of n has rank ≤ u), a polynomial in F of degree n.
        """

    def select(self, scores: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Index [...] of the picked sample of `scores` [..., n].

        `key` is used by the procedures that pick at random (soft best-of-N, Best-of-Poisson, mixtures); the others
        ignore it. Among equal scores the later sample counts as the higher, except that best-of-N and worst-of-N pick
        the first. Raises InputError where the last axis is not n, or where a key is missing.
        """
        self._check(scores)
        if key is None:
            raise InputError(
                f"{self} picks at random",
                field="key",
                value=key,
                remedy="give select a key, such as jax.random.key(0).",
            )
        place = jax.random.choice(key, self.num_samples, scores.shape[:-1], p=jnp.asarray(self.law()))
        return jnp.take_along_axis(jnp.argsort(scores, axis=-1), place[..., None], axis=-1)[..., 0]

    def order_weights(self, m: int) -> np.ndarray:
        """[m] probability that the i-th lowest of m samples is picked, where the n it sees are any n of the m.

        Averages over all subsets at once, so that Σ_i w_i x_(i) is the unbiased estimate, of least variance, of the
        picked sample's mean: w_i = Σ_j law_j C(i-1, j-1) C(m-i, n-j) / C(m, n), for best-of-N C(i-1, N-1) / C(m, N).
        Raises InputError where m < n.
        """
        n = self.num_samples
        if m < n:
            raise InputError(
                f"{self} looks at {n} samples, but there are {m}", field="m", value=m, remedy=f"give at least {n}."
            )
        law = self.law()
        log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, m + 1)))])

        def log_choose(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
            possible = (bottom >= 0) & (bottom <= top)
            bottom = np.where(possible, bottom, 0)
            return np.where(possible, log_factorial[top] - log_factorial[bottom] - log_factorial[top - bottom], -np.inf)

        below, subsets = np.arange(m), log_choose(np.array(m), np.array(n))
        weights = np.zeros(m)
        # One place after the other: an array of all m × n would be large for a soft best of many.
        for place in np.flatnonzero(law)[:, None]:
            ways = log_choose(below, place) + log_choose(m - 1 - below, n - 1 - place)
            weights += law[place] * np.exp(ways - subsets)
        return weights

    def __str__(self) -> str:
        return self.name

    def _check(self, scores: jax.Array) -> None:
        if scores.shape[-1:] != (self.num_samples,):
            raise InputError(
                f"{self} picks among {self.num_samples} samples, but the scores have shape {scores.shape}",
                field="scores",
                value=scores.shape,
                remedy=f"their last axis must be {self.num_samples}.",
            )


@dataclass(frozen=True)
class Sampling(Procedure):
    """One sample, as it comes: T[F] = F."""

    @property
    def name(self) -> str:
        return "sampling"

    @property
    def num_samples(self) -> int:
        return 1

    def law(self) -> np.ndarray:
        return np.ones(1)

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        return jnp.asarray(cdf)

    def select(self, scores: jax.Array, key: jax.Array | None = None) -> jax.Array:
        self._check(scores)
        return jnp.zeros(scores.shape[:-1], jnp.int32)


@dataclass(frozen=True)
class BestOfN(Procedure):
    """The highest of n, the first of equals: T[F] = F^n."""

    n: int

    def __post_init__(self) -> None:
        _require_count("best_of_N", self.n)

    @property
    def name(self) -> str:
        return f"best_of_{self.n}"

    @property
    def num_samples(self) -> int:
        return self.n

    def law(self) -> np.ndarray:
        return _one_hot(self.n, self.n - 1)

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        return jnp.asarray(cdf) ** self.n

    def select(self, scores: jax.Array, key: jax.Array | None = None) -> jax.Array:
        self._check(scores)
        return jnp.argmax(scores, axis=-1)


@dataclass(frozen=True)
class WorstOfN(Procedure):
    """The lowest of n, the first of equals, as an attacker with n attempts finds: T[F] = 1 - (1 - F)^n."""

    n: int

    def __post_init__(self) -> None:
        _require_count("worst_of_N", self.n)

    @property
    def name(self) -> str:
        return f"worst_of_{self.n}"

    @property
    def num_samples(self) -> int:
        return self.n

    def law(self) -> np.ndarray:
        return _one_hot(self.n, 0)

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        return 1 - (1 - jnp.asarray(cdf)) ** self.n

    def select(self, scores: jax.Array, key: jax.Array | None = None) -> jax.Array:
        self._check(scores)
        return jnp.argmin(scores, axis=-1)


@dataclass(frozen=True)
class SoftBestOfN(Procedure):
    """Of n samples, the i-th lowest with probability ∝ exp(r_i / temperature), r_i = (i - 1) / (n - 1).

    T[F] = ((b + (1 - b) F)^n - b^n) / (1 - b^n) with b = e^{-1 / (temperature (n - 1))}, by the binomial theorem.
    Its limits are best-of-N as temperature → 0 and sampling as temperature → ∞. After the soft best-of-N of arXiv
    2506.19248, with ranks for rewards, so that it is a procedure like the others.
    """

    n: int
    temperature: float

    def __post_init__(self) -> None:
        _require_count("soft_best_of_N", self.n)
        if not 1e-6 <= self.temperature <= 1e30:
            raise InputError(
                f"The temperature of soft_best_of_{self.n} is {self.temperature}",
                field="temperature",
                value=self.temperature,
                remedy=f"it must be between 1e-06 and 1e+30. Its limits are called best_of_{self.n} and sampling.",
            )

    @property
    def name(self) -> str:
        return f"soft_best_of_{self.n}({number(self.temperature)})"

    @property
    def num_samples(self) -> int:
        return self.n

    def law(self) -> np.ndarray:
        weights = self._decay ** np.arange(self.n - 1, -1, -1)
        return weights / weights.sum()

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        cdf = jnp.asarray(cdf)
        if -self.n * self._log_decay < 40:
            # Divided by b^n, so that as b → 1 no small difference of large numbers is divided by another.
            rise = math.expm1(-self._log_decay)
            return jnp.expm1(self.n * jnp.log1p(rise * cdf)) / math.expm1(-self.n * self._log_decay)
        decay = jnp.asarray(self._decay, cdf.dtype)
        lowest = decay**self.n
        return ((decay + (1 - decay) * cdf) ** self.n - lowest) / (1 - lowest)

    @property
    def _decay(self) -> float:
        """b = e^{-1 / (temperature (n - 1))}: a place lower in the order is as many times less probable."""
        return math.exp(self._log_decay)

    @property
    def _log_decay(self) -> float:
        return -1 / (self.temperature * (self.n - 1)) if self.n > 1 else -math.inf


@dataclass(frozen=True)
class BestOfPoisson(Procedure):
    """The best of N = 1 + Poisson(mu) samples: T[F] = F e^{mu (F - 1)} (arXiv 2506.19248).

    On samples N must have a bound: `num_samples` is the smallest n with P(N > n) ≤ 2^-24, and N is conditioned on
    N ≤ n. That moves no probability by more than 2^-24, the rounding of a float32, so `select` and `order_weights`
    agree with `rank_cdf` to that precision.
    """

    mu: float

    def __post_init__(self) -> None:
        if not 1e-12 <= self.mu <= 500:
            raise InputError(
                f"The mean of best_of_poisson is {self.mu}",
                field="mu",
                value=self.mu,
                remedy="it must be at least 1e-12 and at most 500. Its limit at 0 is called sampling.",
            )

    @property
    def name(self) -> str:
        return f"best_of_poisson({number(self.mu)})"

    @property
    def num_samples(self) -> int:
        return len(self._counts())

    def law(self) -> np.ndarray:
        return _law_of_mixture(
            self.num_samples, [(share, BestOfN(n)) for n, share in enumerate(self._counts(), start=1)]
        )

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        cdf = jnp.asarray(cdf)
        return cdf * jnp.exp(self.mu * (cdf - 1))

    def _counts(self) -> np.ndarray:
        """[n] probability of N = 1, ..., n."""
        more = np.arange(int(self.mu + 12 * math.sqrt(self.mu)) + 30)
        log_factorial = np.cumsum(np.log(np.maximum(more, 1)))
        counts = np.exp(more * math.log(self.mu) - self.mu - log_factorial)
        tail = np.cumsum(counts[::-1])[::-1]
        counts = counts[: int(np.argmax(tail <= 2.0**-24))]
        return counts / counts.sum()


@dataclass(frozen=True)
class Mixture(Procedure):
    """Each of several procedures with its probability, as for an N unknown until deployment: T[F] = Σ_k p_k T_k[F]."""

    components: tuple[tuple[float, Procedure], ...]
    """(probability, procedure), the probabilities summing to 1."""

    def __post_init__(self) -> None:
        weights = [weight for weight, _ in self.components]
        if not all(0 < weight <= 1 for weight in weights) or not abs(sum(weights) - 1) <= 1e-6:
            raise InputError(
                f"The probabilities of a mixture of procedures are {weights}, which sum to {sum(weights):g}",
                field="components",
                value=weights,
                remedy="they must be greater than 0 and sum to 1.",
            )
        if any(isinstance(procedure, Mixture) for _, procedure in self.components):
            raise InputError(
                f"The mixture {self} has a mixture within",
                field="procedure",
                value=self,
                remedy="write all of its procedures side by side.",
            )

    @property
    def name(self) -> str:
        return "+".join(f"{number(weight)}*{procedure.name}" for weight, procedure in self.components)

    @property
    def num_samples(self) -> int:
        return max(procedure.num_samples for _, procedure in self.components)

    def law(self) -> np.ndarray:
        return _law_of_mixture(self.num_samples, self.components)

    def rank_cdf(self, cdf: jax.Array) -> jax.Array:
        cdf = jnp.asarray(cdf)
        return sum((weight * procedure.rank_cdf(cdf) for weight, procedure in self.components), jnp.zeros_like(cdf))


def parse(text: str) -> Procedure:
    """A procedure from its name. Raises InputError with the nearest names.

    "sampling", "best_of_4", "worst_of_4", "soft_best_of_4(0.1)", "best_of_poisson(4)", and mixtures of these such as
    "0.5*best_of_2+0.5*best_of_8"; also as pages print them, "Best-of-4". `name` is canonical.

    >>> parse("best_of_4").law()
    array([0., 0., 0., 1.])
    >>> float(parse("0.5*best_of_2+0.5*worst_of_2").rank_cdf(0.5))
    0.5
    """
    check_length(text)
    terms = _terms(text)
    if len(terms) == 1 and "*" not in text:
        return _parse_one(text)
    components = []
    for part in terms:
        weight, star, name = part.partition("*")
        try:
            components.append((_probability(weight), _parse_one(name)))
        except ValueError as error:
            if isinstance(error, InputError) and star:
                raise
            raise InputError(
                f"{part!r} in {text!r} is not a probability times a procedure",
                field="procedure",
                value=text,
                remedy="write a mixture as 0.5*best_of_2+0.5*best_of_8.",
            ) from None
    return Mixture(tuple(components))


def _terms(text: str) -> list[str]:
    """What stands between the pluses, in one pass; a plus within brackets belongs to a number, as in 1e+20."""
    terms, start, depth = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "+" and depth == 0:
            terms.append(text[start:place])
            start = place + 1
    return [*terms, text[start:]]


def _probability(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(
            f"{text.strip()!r} is not a probability",
            field="procedure",
            value=text,
            remedy="write a number above 0, up to 1.",
        )
    return value


def _parse_one(text: str) -> Procedure:
    name, argument = split_call(text)
    family, _, count = name.rpartition("_")
    with_count = {"best_of": BestOfN, "worst_of": WorstOfN}
    if name == "sampling" and argument is None:
        return Sampling()
    if family in with_count and count.isdecimal() and argument is None:
        return with_count[family](int(count))
    if family == "soft_best_of" and count.isdecimal() and argument is not None:
        return SoftBestOfN(int(count), argument)
    if name == "best_of_poisson" and argument is not None:
        return BestOfPoisson(argument)
    known = ["sampling", "best_of_4", "worst_of_4", "soft_best_of_4(0.1)", "best_of_poisson(4)"]
    raise unknown("procedure", text, [*known, "0.5*best_of_2+0.5*best_of_8"])


def _law_of_mixture(n: int, components: Iterable[tuple[float, Procedure]]) -> np.ndarray:
    """Each procedure looks at some of the same n samples, whichever: its weights over their order say how it picks."""
    return sum((weight * procedure.order_weights(n) for weight, procedure in components), np.zeros(n))


def _one_hot(n: int, place: int) -> np.ndarray:
    law = np.zeros(n)
    law[place] = 1
    return law


def _require_count(name: str, n: int) -> None:
    if not isinstance(n, int) or not 1 <= n <= MOST_SAMPLES:
        raise InputError(
            f"The N of {name} is {n!r}",
            field="n",
            value=n,
            remedy=f"it must be a whole number of samples, at least 1 and at most {MOST_SAMPLES:,}.",
        )
