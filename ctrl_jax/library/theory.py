"""Procedures and ideal policies by short names."""

from ctrl_jax.errors import InputError
from ctrl_jax.theory import ideal, procedures
from ctrl_jax.theory.ideal import IdealPolicy
from ctrl_jax.theory.objective import Optimal, Raw, parse_transform
from ctrl_jax.theory.procedures import BestOfN, BestOfPoisson, Mixture, Procedure, Sampling, SoftBestOfN, WorstOfN
from ctrl_jax.theory.transforms import Transform


def sampling() -> Procedure:
    """One sample, as it comes: T[F] = F."""
    return Sampling()


def best_of(n: int) -> Procedure:
    """The highest reward of n samples: T[F] = F^n. Raises InputError for n < 1."""
    return BestOfN(n)


def worst_of(n: int) -> Procedure:
    """The lowest reward of n samples, what a best-of-n jailbreak gets: T[F] = 1 − (1 − F)^n.

    Raises InputError for n < 1.
    """
    return WorstOfN(n)


def soft_best_of(n: int, temperature: float) -> Procedure:
    """One of n samples, with a probability that grows with its rank (`procedures.SoftBestOfN`)."""
    return SoftBestOfN(n, temperature)


def best_of_poisson(mu: float) -> Procedure:
    """The highest reward of N = 1 + Poisson(mu) samples: T[F] = F e^{mu (F − 1)} (arXiv 2506.19248)."""
    return BestOfPoisson(mu)


def mixture(*components: tuple[float, Procedure]) -> Procedure:
    """Each procedure with its probability, for an N that is unknown until deployment: T[F] = Σ_k p_k T_k[F].

    Args:
      components: (probability, procedure); the probabilities sum to 1.
    """
    return Mixture(components)


def procedure(name: str) -> Procedure:
    """The procedure of a name: "sampling", "best_of_4", "worst_of_4", "0.5*best_of_2+0.5*best_of_8", ...

    Raises:
      InputError: with the nearest names, where there is no such procedure.
    """
    return procedures.parse(name)


def transform(name: str) -> Transform | Raw | Optimal:
    """The transform of a name: "identity", "logarithm", "logit", "exponential(10)", "optimal" or "raw".

    Raises:
      InputError: with the nearest names, where there is no such transform.
    """
    return parse_transform(name)


def ideal_policy(phi: Transform, *, kl: float | None = None, beta: float | None = None) -> IdealPolicy:
    """What perfect training with Φ makes of the ranks: the density p(u) ∝ exp(Φ(u) / β) on [0, 1].

    Args:
      phi: Φ, an increasing function of the rank.
      kl: KL(policy || reference) of the policy, nats per response; β follows. Give either this or `beta`.
      beta: weight of the KL, in units of Φ per nat.

    Returns:
      A policy with `.kl`, `.beta`, `.density(u)`, `.cdf(u)` and `.win_rate(procedure)`.

    Raises:
      InputError: unless one of `kl` and `beta` is given, and where no policy of Φ has it.
    """
    if (kl is None) == (beta is None):
        raise InputError(
            f"kl is {kl} and beta is {beta}", field="kl", value=kl, remedy="give one of them, such as kl=0.6."
        )
    return ideal.tilt(phi, beta) if beta is not None else ideal.at_kl(phi, kl)  # type: ignore[arg-type]
