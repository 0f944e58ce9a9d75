"""Whole trainings of the three-token language end at the ideal policy, which is known: the reference's law, tilted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.theory import optimal, procedures, transforms
from ctrl_jax.types import Prompts, Responses
from tests import assembled, oracle
from tests.steps import fakes

PROMPTS, REFERENCES, BUDGET, TEMPERATURE, SEED = 64, 512, 0.5, 0.8, 3
REFERENCE = np.asarray(fakes.params(jax.random.key(2), scale=0.5))
EVERY = jax.tree.map(lambda x: np.asarray(x)[0], fakes.every_response())
ORDER = np.random.default_rng(4).permuted(np.tile(np.arange(len(EVERY.lengths)), (2, 1)), axis=1)
"""[2, Y] the rank of each response's reward, for prompts of either table: no two of a prompt tie."""


pytestmark = pytest.mark.usefixtures("compile_fast")


def prompts() -> Prompts:
    ids = np.arange(PROMPTS, dtype=np.uint32)
    return Prompts(np.zeros((PROMPTS, 2), np.int32), np.ones(PROMPTS, np.int32), ids)


def reward(prompts: Prompts, responses: Responses) -> np.ndarray:
    """Raw rewards [B, N], of a place and a scale of their own for each prompt."""
    index = np.argmax((np.asarray(responses.tokens)[:, :, None] == EVERY.tokens).all(-1), axis=-1)
    ids = np.asarray(prompts.ids, np.int64)[:, None]
    return (np.exp(0.3 * ORDER[ids % 2, index]) * (1 + ids % 5) - ids).astype(np.float32)


def law(table: np.ndarray, prompt: int) -> np.ndarray:
    """[Y] probability of every response."""
    return np.exp([
        sum(oracle.log_law(table, prompt, tokens[:t], TEMPERATURE)[tokens[t]] for t in range(length))
        for tokens, length in zip(EVERY.tokens, EVERY.lengths, strict=True)
    ])  # fmt: skip


def kl(policy: np.ndarray, reference: np.ndarray) -> float:
    said = policy > 0
    return float(np.sum(policy[said] * np.log(policy[said] / reference[said])))


def win_rate(policy: np.ndarray, reference: np.ndarray, order: np.ndarray, procedure: str) -> float:
    """Of laws [Y] over responses of ranks `order`: how often the pick of the policy's beats the reference's."""

    def picked(law: np.ndarray) -> np.ndarray:
        """[Y] the law of the pick, by ascending reward: that of the largest of n has the n-th power of the CDF."""
        cumulative = np.concatenate([[0], np.cumsum(law[np.argsort(order)])])
        side, _, n = procedure.partition("_of_")
        if side == "worst":
            return np.diff(1 - (1 - cumulative) ** int(n))
        return np.diff(cumulative ** int(n or 1))

    mine, other = picked(policy), picked(reference)
    return float(np.sum(mine * (np.cumsum(other) - other / 2)))


def transformed(name: str, procedure: str, ranks: np.ndarray) -> np.ndarray:
    if name != "optimal":
        return oracle.transform(name, ranks, REFERENCES)
    phi = transforms.normalized(optimal.optimal_transform(procedures.parse(procedure), kl=BUDGET))
    return np.asarray(phi(jnp.asarray(ranks, jnp.float32)), np.float64)


def ideal(references: list[np.ndarray], rewards: list[np.ndarray], budget: float) -> list[np.ndarray]:
    """The laws ∝ π_ref exp(R / β) at the one β with a mean KL of `budget`, by bisection."""

    def tilted(beta: float) -> list[np.ndarray]:
        weights = [law * np.exp((own - own.max()) / beta) for law, own in zip(references, rewards, strict=True)]
        return [weight / weight.sum() for weight in weights]

    low, high = 1e-4, 1e4
    for _ in range(100):
        middle = np.sqrt(low * high)
        too_far = np.mean([kl(*pair) for pair in zip(tilted(middle), references, strict=True)]) > budget
        low, high = (middle, high) if too_far else (low, middle)
    return tilted(high)


OBJECTIVES = [
    ("identity", "sampling"),
    ("exponential(10)", "best_of_4"),
    ("exponential(-10)", "worst_of_4"),
    ("optimal", "best_of_2"),
]


def reference_laws() -> list[np.ndarray]:
    return [law(REFERENCE, prompt) for prompt in (0, 1)]


def ideal_laws(transform: str, procedure: str, table: np.ndarray) -> list[np.ndarray]:
    """Of either table of logits, beside the raw rewards [B, K] of the reference's sample.

    A table of logits serves all prompts of its kind, whose samples differ: what it maximises is their mean.
    """
    every = Responses(*(np.broadcast_to(x, (PROMPTS, *x.shape)) for x in (EVERY.tokens, EVERY.lengths)))
    rewards = transformed(transform, procedure, oracle.calibrated(reward(prompts(), every), table))
    return ideal(reference_laws(), [rewards[prompt::2].mean(axis=0) for prompt in (0, 1)], BUDGET)


def distance(policies: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The mean total variation between laws: 0 to 1."""
    return float(np.mean([np.abs(one - other).sum() / 2 for one, other in zip(policies, others, strict=True)]))


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    """[B, K] raw rewards of the reference's responses."""
    return assembled.reference_rewards(
        make_mesh(1), reference=REFERENCE, score=reward, prompts=prompts(), samples=REFERENCES,
        temperature=TEMPERATURE, seed=SEED,
    )  # fmt: skip


@pytest.mark.parametrize(("transform", "procedure"), OBJECTIVES)
def test_a_whole_training_ends_at_the_ideal_policy(transform, procedure, raw, tmp_path):
    params = assembled.train_policy(
        make_mesh(1), tmp_path, reference=REFERENCE, score=reward, prompts=prompts(),
        table=assembled.table_of(raw, None), seed=SEED, transform=transform, procedure=procedure, kl_budget=BUDGET,
        temperature=TEMPERATURE, steps=260, prompts_per_step=PROMPTS, samples_per_prompt=16, learning_rate=0.15,
        micro_batches=1,
    )  # fmt: skip
    policies, references = [law(params, prompt) for prompt in (0, 1)], reference_laws()
    best = ideal_laws(transform, procedure, raw)
    assert np.mean([kl(*pair) for pair in zip(policies, references, strict=True)]) == pytest.approx(BUDGET, rel=0.02)
    for measured in ("sampling", procedure):
        found, expected = (
            np.mean([win_rate(*three, measured) for three in zip(laws, references, ORDER, strict=True)])
            for laws in (policies, best)
        )
        assert found == pytest.approx(expected, rel=0.02)
    assert distance(policies, best) < 0.03


def test_the_ideal_policies_of_the_objectives_are_far_apart(raw):
    """Else a training that ignores its transform would pass the test above."""
    ideals = [ideal_laws(*objective, raw) for objective in OBJECTIVES]
    apart = [distance(one, other) for place, one in enumerate(ideals) for other in ideals[:place]]
    assert min(apart) > 3 * 0.03
    assert min(distance(one, reference_laws()) for one in ideals) > 0.2
