"""Ideal policies in NumPy by their definitions, on midpoints of the ranks: density ∝ exp(Φ / β), β by bisection."""

import numpy as np
from scipy import optimize, special

COUNT = 50_000
RANKS = (np.arange(COUNT) + 0.5) / COUNT


class Law:
    """A policy on the ranks of the reference, whose own are uniform."""

    def __init__(self, values: np.ndarray, beta: float):
        weights = np.exp((values - values.max()) / beta)
        self.beta, self.density = beta, weights / weights.mean()
        self.cdf = (np.cumsum(self.density) - self.density / 2) / COUNT
        self.kl = float(special.xlogy(self.density, self.density).mean())

    def win_rate(self, side: str, n: int) -> float:
        """How often the best (worst) of n of the policy beats that of n of the reference."""
        if side == "best":
            picked, beaten = n * self.cdf ** (n - 1) * self.density, RANKS**n
        else:
            picked, beaten = n * (1 - self.cdf) ** (n - 1) * self.density, 1 - (1 - RANKS) ** n
        return float(np.mean(picked * beaten))


def at_kl(phi, kl: float) -> Law:
    """The law whose KL to the reference is `kl`, tilted by Φ, a function on ranks."""
    values = phi(RANKS)
    spread = np.ptp(values)
    ends = np.log(1e-6 * spread), np.log(1e2 * spread)
    found = optimize.brentq(lambda log_beta: Law(values, np.exp(log_beta)).kl - kl, *ends, xtol=1e-12)
    return Law(values, np.exp(found))


def best_at_kl(side: str, n: int, kl: float) -> Law:
    """The law of the highest win rate: the one tilted by the win rate's own slope by the density,

        Φ*(u) = ∫_0^u n² (v F(v))^{n−1} dv    or, for the worst of n,    ∫_0^u n² ((1 − v) (1 − F(v)))^{n−1} dv,

    found by going from a law to the law that its slope tilts to, at one KL, until it no longer changes.
    """
    values = RANKS
    for _ in range(200):
        law = at_kl(lambda _, values=values: values, kl)
        both = RANKS * law.cdf if side == "best" else (1 - RANKS) * (1 - law.cdf)
        slope = np.cumsum(n**2 * both ** (n - 1)) / COUNT
        if np.abs(at_kl(lambda _, slope=slope: slope, kl).cdf - law.cdf).max() < 1e-6:
            return law
        values = (values + slope) / 2  # whole steps swing at large KL
    raise AssertionError("it does not settle")
