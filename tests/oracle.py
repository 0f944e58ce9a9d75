"""One whole step of policy training in NumPy: float64, loops and definitions, nothing of the package but data types.

The policy is a table of logits over (prompt id mod 2, position, last two tokens), as in tests/steps/fakes.py. Uniform
numbers come from jax.random, folded as DESIGN.md says: key, step, prompt, sample.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from ctrl_jax.types import Prompts, Responses, Rollouts

NONE, EOS, LENGTH = 3, 2, 3
"""The token before the first one; the token that ends a response; the longest response."""


def place(prompt: int, before: Sequence[int]) -> tuple[int, int, int, int]:
    """Where the table has the logits of the token behind those `before`."""
    last_but_one, last = [NONE, NONE, *before][-2:]
    return int(prompt) % 2, len(before), int(last_but_one), int(last)


def log_law(table: np.ndarray, prompt: int, before: Sequence[int], temperature: float) -> np.ndarray:
    """[V] log-probabilities of the next token."""
    logits = np.asarray(table, np.float64)[place(prompt, before)] / temperature
    return logits - math.log(np.exp(logits).sum())


def draw(table: np.ndarray, prompts: Prompts, key: jax.Array, *, samples: int, temperature: float) -> Rollouts:
    """N responses a prompt: of each token the first index whose cumulative probability exceeds its uniform."""
    size = len(prompts.ids)
    tokens = np.full((size, samples, LENGTH), EOS, np.int32)
    lengths, log_probs = np.zeros((size, samples), np.int32), np.zeros((size, samples, LENGTH))
    for (b, prompt), n in itertools.product(enumerate(np.asarray(prompts.ids)), range(samples)):
        own = jax.random.fold_in(jax.random.fold_in(key, prompt), n)
        for t, uniform in enumerate(np.asarray(jax.random.uniform(own, (LENGTH,)), np.float64)):
            law = log_law(table, prompt, tokens[b, n, :t], temperature)
            token = int(np.argmax(np.cumsum(np.exp(law)) > uniform))
            tokens[b, n, t], log_probs[b, n, t], lengths[b, n] = token, law[token], t + 1
            if token == EOS:
                break
    return Rollouts(prompts, Responses(tokens, lengths), log_probs)


def calibrated(raw: np.ndarray, references: np.ndarray) -> np.ndarray:
    """[B, N] rewards beside [B, K] of the reference: the share below, and half of the share that ties."""
    own, other = np.asarray(raw, np.float64)[:, :, None], np.asarray(references, np.float64)[:, None, :]
    return np.mean((own > other) + 0.5 * (own == other), axis=-1)


def quantiles(rewards: np.ndarray, count: int | None) -> np.ndarray:
    """Of [B, K] rewards the quantiles at (j − ½) / Q, between two rewards their mean; all of them for None."""
    rewards = np.sort(np.asarray(rewards, np.float64), axis=-1)
    if count is None:
        return rewards
    levels = (np.arange(count) + 0.5) / count
    return np.quantile(rewards, levels, axis=-1, method="averaged_inverted_cdf").T


def transform(name: str, ranks: np.ndarray, num_references: int) -> np.ndarray:
    """Φ of its name, shifted and scaled to the range [0, 1]; an infinite end is cut half a reference response short."""
    low, phi = 0.0, {
        "identity": lambda u: u,
        "logarithm": np.log,
        "exponential(10)": lambda u: np.exp(10 * u),
        "exponential(-10)": lambda u: -np.exp(-10 * u),
    }[name]  # fmt: skip
    if name == "logarithm":
        low = 0.5 / num_references
    ends = phi(np.array([low, 1.0]))
    return (phi(np.maximum(ranks, low)) - ends[0]) / (ends[1] - ends[0])


def without_own(values: np.ndarray) -> np.ndarray:
    """[N, ...] minus the mean of the other N − 1."""
    return np.stack([own - np.mean(np.delete(values, n, axis=0), axis=0) for n, own in enumerate(values)])


def win_rate(policy: np.ndarray, reference: np.ndarray, procedure: str) -> np.ndarray:
    """[B] over all subsets of n of both: how often the pick of the policy's beats the pick of the reference's."""
    if procedure == "sampling":
        pick, n = max, 1
    else:
        side, _, count = procedure.partition("_of_")
        pick, n = {"best": max, "worst": min}[side], int(count)

    def one(own: np.ndarray, other: np.ndarray) -> float:
        picks, others = ([pick(subset) for subset in itertools.combinations(row, n)] for row in (own, other))
        return float(np.mean([(a > b) + 0.5 * (a == b) for a in picks for b in others]))

    return np.array([one(*rows) for rows in zip(policy, reference, strict=True)])


@dataclass
class Trainer:
    """What a policy training is between its steps."""

    params: np.ndarray
    reference: np.ndarray
    key: jax.Array
    transform: str
    procedure: str
    temperature: float
    samples: int
    beta: float
    held: bool
    budget: float
    learning_rate: float
    warmup: int
    steps: int
    max_norm: float
    clip: float | None = None
    """PPO's ε; None for CTRL, whose gradient is at the policy that sampled."""
    epochs: int = 1
    minibatches: int = 1
    step: int = 0
    updates: int = 0
    second_moment: np.ndarray = field(default_factory=lambda: np.zeros(()))
    kls: list[float] = field(default_factory=list)
    started: bool = False
    highest: float = 0.0
    waited: int = 0
    speed: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        self.params, self.base = np.asarray(self.params, np.float64), self.beta

    def draw(self, prompts: Prompts) -> Rollouts:
        key = jax.random.fold_in(self.key, self.step)
        return draw(self.params, prompts, key, samples=self.samples, temperature=self.temperature)

    def update(self, rollouts: Rollouts, raw: np.ndarray, table: np.ndarray) -> dict[str, float]:
        """Takes a step by the rollouts and their raw rewards [B, N]; returns its metrics."""
        ranks = calibrated(raw, table)
        transformed = raw if self.transform == "raw" else transform(self.transform, ranks, table.shape[1])
        metrics = self.learn(rollouts, np.asarray(transformed, np.float64)) | {
            "raw_reward": np.mean(raw),
            "calibrated_reward": np.mean(ranks),
            "transformed_reward": np.mean(transformed),
            "constant_rewards": np.mean([len(set(row)) == 1 for row in raw.tolist()]),
            "win_rate": np.mean(win_rate(raw, table, self.procedure)),
            "beta": self.beta,
        }
        self.control(metrics["kl"])
        self.step += 1
        return metrics

    def learn(self, rollouts: Rollouts, rewards: np.ndarray) -> dict[str, float]:
        """All updates by a batch: in every epoch by prompts 0, M, 2M, ..., then by 1, M + 1, ...; the mean metrics."""
        rows = []
        for first in [*range(self.minibatches)] * self.epochs:
            part, count = jax.tree.map(lambda x, first=first: x[first :: self.minibatches], rollouts), len(rewards)
            loss, gradient, metrics = self.loss(part, rewards[[*range(first, count, self.minibatches)]])
            rows.append(metrics | {"loss": loss, "gradient_norm": np.linalg.norm(gradient)})
            if self.epochs * self.minibatches == 1:
                self.brake(metrics)
            self.optimise(gradient)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | {"update_share": self.share}
        if self.epochs * self.minibatches > 1:
            self.brake(means)
        return means

    def loss(self, rollouts: Rollouts, rewards: np.ndarray) -> tuple[float, np.ndarray, dict[str, float]]:
        """(loss, gradient, metrics): Σ_t KL_t − Σ_t G_t a response, with A_t held fixed.

        G = A log π(y) in CTRL; the lesser of ρ A and clip(ρ) A in PPO-clip, for ρ = π(y) / π_sampler(y).
        """
        tokens, lengths = np.asarray(rollouts.responses.tokens), np.asarray(rollouts.responses.lengths)
        size, samples, _ = tokens.shape
        kl, log_ratio = np.zeros(tokens.shape), np.zeros(tokens.shape)
        log_probs, gaps = np.zeros(tokens.shape), []
        slopes, kl_slopes = np.zeros((*tokens.shape, 3)), np.zeros((*tokens.shape, 3))
        places = [
            (b, n, t, int(rollouts.prompts.ids[b]), tokens[b, n, :t])
            for b, n in np.ndindex(size, samples)
            for t in range(lengths[b, n])
        ]
        for b, n, t, prompt, before in places:
            law, reference = (
                log_law(table, prompt, before, self.temperature) for table in (self.params, self.reference)
            )
            token, p = tokens[b, n, t], np.exp(law)
            kl[b, n, t] = np.sum(p * (law - reference))
            log_ratio[b, n, t], log_probs[b, n, t] = law[token] - reference[token], law[token]
            # By the logits: of log π(y), and of the KL.
            slopes[b, n, t] = (np.eye(3)[token] - p) / self.temperature
            kl_slopes[b, n, t] = p * (law - reference - kl[b, n, t]) / self.temperature
            gaps.append(abs(law[token] - rollouts.log_probs[b, n, t]))
        later_kl = np.array([[[kl[b, n, t + 1 :].sum() for t in range(LENGTH)] for n in range(samples)]
                             for b in range(size)])  # fmt: skip
        advantages = np.stack([
            without_own(rewards[b])[:, None] / self.beta - without_own(later_kl[b]) for b in range(size)
        ])  # fmt: skip
        loss, gradient, clipped = 0.0, np.zeros(self.params.shape), []
        for b, n, t, prompt, before in places:
            advantage, log_prob = advantages[b, n, t], log_probs[b, n, t]
            gain, weight = advantage * log_prob, advantage
            if self.clip is not None:
                ratio = math.exp(log_prob - rollouts.log_probs[b, n, t])
                near = min(max(ratio, 1 - self.clip), 1 + self.clip)
                gain = min(ratio * advantage, near * advantage)
                weight = ratio * advantage if ratio * advantage <= near * advantage else 0.0
                clipped.append(ratio != near)
            loss += (kl[b, n, t] - gain) / (size * samples)
            gradient[place(prompt, before)] += (kl_slopes[b, n, t] - weight * slopes[b, n, t]) / (size * samples)
        by_prompt = kl.sum(-1).mean(-1)
        last_tokens = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)
        metrics = {
            "kl": kl.sum(-1).mean(),
            "kl_standard_error": by_prompt.std(ddof=1) / math.sqrt(size),
            "kl_k1": log_ratio.sum(-1).mean(),
            "kl_k2": (log_ratio**2 / 2).sum(-1).mean(),
            "kl_k3": (np.exp(-log_ratio) - 1 + log_ratio).sum(-1).mean(),
            "response_length": lengths.mean(),
            "unfinished": np.mean(last_tokens != EOS),
            "sampler_scorer_gap": np.mean(gaps),
        } | ({} if self.clip is None else {"clipped": np.mean(clipped)})
        return loss, gradient, metrics

    def optimise(self, gradient: np.ndarray) -> None:
        """The gradient, of norm `max_norm` at most, over the root of its mean square (Adam without momentum)."""
        gradient = gradient * min(1, self.max_norm / np.linalg.norm(gradient))
        self.second_moment = 0.99 * self.second_moment + 0.01 * gradient**2
        mean_square = self.second_moment / (1 - 0.99 ** (self.updates + 1))
        self.params = self.params - self.share * self.rate() * gradient / (np.sqrt(mean_square) + 1e-8)
        self.updates += 1

    def rate(self) -> float:
        """The learning rate: a straight line up, then the square of a cosine down to a tenth."""
        step = self.updates / (self.epochs * self.minibatches)
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * (0.5 * (1 + math.cos(math.pi * done))) ** 2)

    def brake(self, metrics: dict[str, float]) -> None:
        """How much of an update is made: √KL has room for three times what a whole one raised it by, less the noise."""
        distance, before = (math.sqrt(max(kl, 0)) for kl in (metrics["kl"], self.kls[-1] if self.kls else 0.0))
        noise = metrics["kl_standard_error"] / distance if distance else 0.0
        self.speed = max(0.97 * self.speed, (distance - before - noise) / self.share)
        room = max(math.sqrt(1.15 * self.budget) - distance, distance - math.sqrt(self.budget))
        if not self.held:
            self.share = min(max(room / max(3 * self.speed, 1e-30), 0.02), 1)

    def control(self, kl: float) -> None:
        """β by the mean of the last five measurements, and on the way to the budget by one that rests for ten steps."""
        self.kls.append(kl)
        average = float(np.mean(self.kls[-5:]))
        self.started = self.started or average >= self.budget
        if average > 1.05 * self.highest:
            self.highest, self.waited = average, 0
        else:
            self.waited += 1
        if not self.started and self.waited == 10:
            self.highest, self.waited = average, 0
            if not self.held:
                self.base *= max(average / self.budget, 0.25) ** 0.5
        error = float(np.clip(average / self.budget - 1, -0.5, 0.5)) if self.started and not self.held else 0.0
        self.base *= math.exp(0.03 * error)
        self.beta = self.base * math.exp(0.4 * error)
