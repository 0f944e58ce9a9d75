"""How much the policy gradient varies with the baseline of its rewards, and with the responses a prompt: exactly.

    python -m benchmarks.baselines        or        python -m benchmarks.baselines --help

A language of three tokens and at most three a response has 15 responses, so that expectations over responses are sums.
For the reference and the ideal policies on the way from it to the KL budget, it prints the total variance of the
gradient by the logits, times the responses of the batch: all columns cost the same, for a prompt that costs nothing.

    leave-one-out      R − the mean of the prompt's other N − 1 responses: what training uses
    stored             R − the mean of R over the prompt's stored reference responses
    stored, tilted     the same with weights exp(R / β), at the β whose ideal policy has the KL of the policy
    batch              R − the mean over all other prompts, in the limit of many

None depends on its own response, so none biases the gradient. Its KL part, q a response, is the same in all, with the
baseline that it has for N → ∞. With R divided by β, scores s = ∇log π and a baseline b of the prompt, a mean over N
responses has the variance Var((R − b) s + q) / N. The leave-one-out adds (E|s|² Var R + |E R s|²) / (N (N − 1)), since
the terms s_i (R_j − E R) are uncorrelated unless they are of the same pair. The variance between the prompts' gradients
counts once a prompt, so N times at equal cost.

What it printed, for 32 prompts, 128 stored responses each and a budget of .6 nats:

                                    exponential(10)             identity              exponential(-10)
                                 N = 4      8     16      N = 4      8     16      N = 4      8     16
    KL 0      leave-one-out        .93   1.01   1.32       3.97   4.81   7.16       1829   2008   2635
              stored               .78    .96   1.30       3.29   4.55   7.05       1546   1893   2586
              batch                .79    .96   1.31       3.29   4.54   7.05       1561   1908   2602
    KL .15    leave-one-out       1.28   1.14   1.22       2.56   2.54   3.06        152    162    202
              stored              1.12   1.20   1.38       2.26   2.59   3.24        198    221    265
              stored, tilted       .90    .99   1.17       1.98   2.30   2.96        132    154    198
              batch                .95   1.03   1.21       1.98   2.31   2.96        131    154    198
    KL .6     leave-one-out       1.35   1.03    .91       1.26   1.09   1.02        .50    .45    .43
              stored              1.34   1.34   1.34       1.98   1.98   1.98        135    135    135
              stored, tilted       .82    .82    .82        .97    .97    .97        .41    .41    .41
              batch                .91    .91    .91        .98    .98    .98        .41    .41    .41

So the stored mean is the reference's and misleads as soon as the policy has left it; tilted, it takes a policy that is
the ideal one, and then saves 1 to 10 % of the variance at N = 16, 5 to 20 % at 8. The leave-one-out needs neither, and
stays. More prompts with fewer responses each save more, until a prompt costs as much as its responses.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import tyro

from ctrl_jax.theory import ideal, transforms
from ctrl_jax.theory.transforms import Transform

EOS, LENGTH = 2, 3
RESPONSES = [
    body
    for length in range(1, LENGTH + 1)
    for body in itertools.product(range(3), repeat=length)
    if EOS not in body[:-1] and (length == LENGTH or body[-1] == EOS)
]
PREFIXES = sorted({response[:t] for response in RESPONSES for t in range(len(response))})


@dataclass(frozen=True)
class Prompt:
    reference: np.ndarray
    """[Y] the reference's law of the responses."""
    rewards: np.ndarray
    """[Y] transformed rewards of the responses."""
    stored: np.ndarray
    """[K] those of the reference's stored responses."""


@dataclass(frozen=True)
class Terms:
    """What a policy's gradient is made of, at one prompt."""

    law: np.ndarray
    """[Y]."""
    rewards: np.ndarray
    """[Y] R / β."""
    scores: np.ndarray
    """[Y, P] ∇log π by the logits."""
    kl_part: np.ndarray
    """[Y, P] q."""

    @property
    def gradient(self) -> np.ndarray:
        return self.law @ (self.rewards[:, None] * self.scores + self.kl_part)

    def variance(self, baseline: float) -> float:
        """Of one response's (R − b) s + q: the trace."""
        each = (self.rewards - baseline)[:, None] * self.scores + self.kl_part
        return float(self.law @ (each**2).sum(-1) - self.gradient @ self.gradient)

    def leave_one_out(self, samples: int) -> float:
        """N times the variance of a mean over N responses, each with the mean of the others for baseline."""
        mean = self.law @ self.rewards
        of_rewards = self.law @ (self.rewards - mean) ** 2
        slope = self.law @ (self.rewards[:, None] * self.scores)
        pairs = self.law @ (self.scores**2).sum(-1) * of_rewards + slope @ slope
        return self.variance(mean) + float(pairs) / (samples - 1)


def draw(rng: np.random.Generator, phi: Transform, references: int) -> Prompt:
    """A prompt with random next-token laws, and a random order of its responses as reward."""
    logits = rng.normal(size=(len(PREFIXES), 3))
    laws = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    law = np.array([np.prod([laws[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))]) for y in RESPONSES])
    order = rng.permutation(len(RESPONSES))
    stored = order[rng.choice(len(RESPONSES), size=references, p=law / law.sum())]

    def transformed(values: np.ndarray) -> np.ndarray:
        ranks = (values[:, None] > stored).mean(-1) + 0.5 * (values[:, None] == stored).mean(-1)
        return np.asarray(phi(ranks.astype(np.float32)), np.float64)

    return Prompt(law, transformed(order), transformed(stored))


def next_tokens(law: np.ndarray) -> np.ndarray:
    """[prefix, 3] the next-token laws of a law [Y] of responses."""
    counts = np.zeros((len(PREFIXES), 3))
    for probability, y in zip(law, RESPONSES, strict=True):
        for t in range(len(y)):
            counts[PREFIXES.index(y[:t]), y[t]] += probability
    return counts / counts.sum(-1, keepdims=True)


def terms(law: np.ndarray, prompt: Prompt, beta: float) -> Terms:
    """Those of the policy `law`, where the objective divides rewards by `beta`."""
    laws, others = next_tokens(law), next_tokens(prompt.reference)
    log_ratio = np.log(laws / others)
    kl = (laws * log_ratio).sum(-1)
    scores, slopes = np.zeros((2, len(RESPONSES), LENGTH, *laws.shape))
    to_go = np.zeros((len(RESPONSES), LENGTH))
    for i, y in enumerate(RESPONSES):
        for t in range(len(y)):
            place = PREFIXES.index(y[:t])
            scores[i, t, place] = np.eye(3)[y[t]] - laws[place]
            slopes[i, t, place] = laws[place] * (log_ratio[place] - kl[place])
            to_go[i, t] = sum(kl[PREFIXES.index(y[:u])] for u in range(t + 1, len(y)))
    later = scores * (to_go - law @ to_go)[..., None, None]
    flat = (len(RESPONSES), -1)
    return Terms(law, prompt.rewards / beta, scores.sum(1).reshape(flat), -(later + slopes).sum(1).reshape(flat))


def tilted(law: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """The law ∝ law · exp(R / β); the law itself for an infinite β."""
    weights = law * np.exp((rewards - rewards.max()) / beta)
    return weights / weights.sum()


def variances(prompts: list[Prompt], beta: float, now: float, samples: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Total variance · responses, by baseline for each N, of the policies tilted by `now` under an objective of β."""
    policies = [terms(tilted(p.reference, p.rewards, now), p, beta) for p in prompts]
    batch = float(np.mean([policy.law @ policy.rewards for policy in policies]))
    between = float(np.var([policy.gradient for policy in policies], axis=0).sum())
    within: dict[str, list[list[float]]] = {}
    for prompt, policy in zip(prompts, policies, strict=True):
        weights = tilted(np.ones(len(prompt.stored)), prompt.stored, now)
        baselines = {
            "stored": prompt.stored.mean() / beta,
            "stored, tilted": weights @ prompt.stored / beta,
            "batch": batch,
        }
        rows = {"leave-one-out": [policy.leave_one_out(n) for n in samples]}
        rows |= {name: [policy.variance(baseline)] * len(samples) for name, baseline in baselines.items()}
        for name, row in rows.items():
            within.setdefault(name, []).append(row)
    return {name: np.mean(rows, axis=0) + np.array(samples) * between for name, rows in within.items()}


def main(prompts: int = 32, references: int = 128, budget: float = 0.6, seed: int = 0) -> None:
    samples = (2, 4, 8, 16)
    for name in ("exponential(10)", "identity", "exponential(-10)"):
        phi, rng = transforms.normalized(transforms.parse(name)), np.random.default_rng(seed)
        drawn = [draw(rng, phi, references) for _ in range(prompts)]
        beta = ideal.at_kl(phi, budget).beta
        for kl in (0.0, 0.25 * budget, budget):
            now = ideal.at_kl(phi, kl).beta if kl else np.inf
            print(f"\n{f'{name}, KL {kl:g}':30s}" + "".join(f"{f'N = {n}':>10s}" for n in samples))
            for row, values in variances(drawn, beta, now, samples).items():
                print(f"  {row:28s}" + "".join(f"{value:10.2f}" for value in values))


if __name__ == "__main__":
    tyro.cli(main)
