"""The assembled, jitted policy step beside an independent calculation (tests/oracle.py), on one device and on eight."""

import itertools
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.types import Prompts, Responses, Rollouts
from tests import assembled, oracle
from tests.steps import fakes

PROMPTS, SAMPLES, REFERENCES, STEPS = 16, 4, 12, 4
START, REFERENCE = (np.asarray(fakes.params(jax.random.key(seed))) for seed in (1, 2))
KEY = jax.random.key(5)


@dataclass(frozen=True)
class Case:
    transform: str
    procedure: str
    temperature: float = 1.0
    micro_batches: int = 1
    quantiles: int | None = None
    max_norm: float = 1e3
    held: bool = False
    beta: float = 0.2
    tied: bool = True
    """Whether the reward has three values, so that many responses tie; else each response has its own."""
    budget: float = 0.4
    clip: float | None = None
    """PPO-clip's; None for CTRL."""
    epochs: int = 1
    minibatches: int = 1
    learning_rate: float = 0.05


CASES = {
    "identity": Case("identity", "best_of_2", budget=0.7),
    "exponential": Case("exponential(10)", "best_of_3", temperature=0.7, micro_batches=2, tied=False),
    "exponential, clipped": Case("exponential(10)", "best_of_2", max_norm=0.1, quantiles=5, tied=False),
    "negative exponential": Case("exponential(-10)", "worst_of_2", temperature=1.4, held=True),
    "logarithm": Case("logarithm", "best_of_2", micro_batches=2, tied=False, budget=5.0),
    "logarithm of quantiles": Case("logarithm", "sampling", quantiles=4),
    "raw": Case("raw", "sampling", temperature=0.7, micro_batches=2, beta=1.5),
    "several updates": Case("exponential(10)", "best_of_2", tied=False, clip=0.1, epochs=2, minibatches=2, budget=5.0),
    "an epoch in minibatches": Case(
        "identity", "best_of_2", temperature=0.7, budget=5.0, max_norm=0.1, clip=0.1, minibatches=2, learning_rate=0.3
    ),
    "epochs of the whole": Case(
        "exponential(-10)", "worst_of_2", held=True, micro_batches=2, clip=0.2, epochs=3, learning_rate=0.1
    ),
}


pytestmark = pytest.mark.usefixtures("compile_fast")


def prompts(seed: int) -> Prompts:
    """Some of both tables of the language, and not as many."""
    ids = np.random.default_rng(seed).integers(0, 2**32, PROMPTS, np.uint32)
    return Prompts(np.zeros((PROMPTS, 2), np.int32), np.ones(PROMPTS, np.int32), ids)


def reward(case: Case, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Raw rewards [B, N], of a scale and a place of their own for each prompt: functions of the real tokens alone."""
    tokens, lengths = np.asarray(responses.tokens), np.asarray(responses.lengths)
    real = np.where(np.arange(tokens.shape[-1]) < lengths[..., None], tokens + 1, 0)
    number = real @ np.array([1, 4, 16])
    if case.tied:
        number = number % 3
    by_prompt = (np.asarray(prompts.ids) % 7).astype(np.float64)[:, None]
    return ((1 + by_prompt) * np.sin(1.0 + number) - by_prompt).astype(np.float32)


def reference_rewards(case: Case, batch: Prompts) -> np.ndarray:
    """[B, K] of the reference's own responses."""
    drawn = oracle.draw(REFERENCE, batch, jax.random.key(9), samples=REFERENCES, temperature=case.temperature)
    return reward(case, batch, drawn.responses)


def trainings(case: Case, devices: int, **changes) -> tuple[assembled.PolicyTraining, oracle.Trainer]:
    common = {
        "transform": case.transform, "procedure": case.procedure, "temperature": case.temperature, "steps": 8,
        "learning_rate": case.learning_rate,
    } | changes  # fmt: skip
    if case.clip is not None:
        common |= {"clip": case.clip, "epochs": case.epochs, "minibatches": case.minibatches}
    product = assembled.policy_training(
        make_mesh(devices), start=START, reference=REFERENCE, key=KEY, beta=case.beta, held=case.held,
        score=lambda prompts, responses: reward(case, prompts, responses),
        num_references=case.quantiles or REFERENCES, kl_budget=case.budget, prompts_per_step=PROMPTS,
        kind=config.Policy if case.clip is None else config.PpoClip,
        samples_per_prompt=SAMPLES, micro_batches=case.micro_batches, max_gradient_norm=case.max_norm, warmup_steps=2,
        **common,
    )  # fmt: skip
    trainer = oracle.Trainer(
        START, REFERENCE, KEY, beta=case.beta, held=case.held, budget=case.budget, samples=SAMPLES,
        max_norm=case.max_norm, warmup=2, **common,
    )  # fmt: skip
    return product, trainer


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_assembled_step_is_the_oracles(case, devices):
    product, trainer = trainings(case, devices)
    for step in range(STEPS):
        batch = prompts(step)
        table = reference_rewards(case, batch)
        rollouts, expected = product.draw(batch), trainer.draw(batch)
        np.testing.assert_array_equal(rollouts.responses.tokens, expected.responses.tokens)
        np.testing.assert_array_equal(rollouts.responses.lengths, expected.responses.lengths)
        np.testing.assert_allclose(rollouts.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
        metrics = product.train(batch, assembled.table_of(table, case.quantiles))
        raw = reward(case, batch, expected.responses)
        values = trainer.update(expected, raw, oracle.quantiles(table, case.quantiles))
        for name, value in values.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, step {step}")
        np.testing.assert_allclose(product.second_moment, trainer.second_moment, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(product.params, trainer.params, rtol=1e-5, atol=1e-5)
        assert product.beta == pytest.approx(trainer.beta, rel=1e-5)


def test_the_cases_have_what_makes_a_step_hard():
    """Else the test above would prove less than it seems to: ties, unequal lengths, clipping, a controller at work."""
    seen = {}
    for name, case in CASES.items():
        _, trainer = trainings(case, 1)
        batch = prompts(0)
        table = oracle.quantiles(reference_rewards(case, batch), case.quantiles)
        rollouts = trainer.draw(batch)
        raw = reward(case, batch, rollouts.responses)
        before = trainer.beta
        seen[name] = trainer.update(rollouts, raw, table) | {
            "ties": np.mean(raw[:, :, None] == table[:, None, :]), "moved": trainer.beta != before,
        }  # fmt: skip
        assert len(np.unique(rollouts.responses.lengths)) == 3
        assert 0.1 < seen[name]["calibrated_reward"] < 0.9
        assert 0 < seen[name]["unfinished"] < 1
    assert all(values["ties"] > 0.05 for values in seen.values())
    assert seen["exponential, clipped"]["gradient_norm"] > 2 * CASES["exponential, clipped"].max_norm
    assert seen["identity"]["moved"] and not seen["negative exponential"]["moved"]
    assert 1.05 < seen["identity"]["kl"] / CASES["identity"].budget < 1.4  # where the controller's error is not clipped
    assert abs(seen["identity"]["kl"] - seen["identity"]["kl_k1"]) > 0.01
    assert not seen["logarithm"]["moved"]  # its KL has not reached the budget yet


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.clip is not None])
def test_the_cases_of_ppo_clip_tokens_and_depend_on_the_order_of_their_minibatches(name):
    """From the second step on, where the learning rate is not 0."""
    case, metrics = CASES[name], {}
    _, trainer = trainings(case, 1)
    _, other = trainings(case, 1)
    for step in range(2):
        batch = prompts(step)
        table = oracle.quantiles(reference_rewards(case, batch), None)
        rollouts = trainer.draw(batch)
        raw = reward(case, batch, rollouts.responses)
        # The other learns from the prompts in another order; all else that it is given is the same.
        back = np.arange(PROMPTS)[::-1]
        metrics = trainer.update(rollouts, raw, table)
        other.update(jax.tree.map(lambda x, back=back: x[back], rollouts), raw[back], table[back])
    assert 0.02 < metrics["clipped"] < 0.9
    assert trainer.updates == 2 * case.epochs * case.minibatches
    apart = np.abs(trainer.params - other.params).max()
    assert apart > 1e-3 if case.minibatches > 1 else apart < 1e-9


@pytest.mark.parametrize("name", ["identity", "exponential", "negative exponential"])
def test_ppo_with_one_update_a_batch_takes_ctrls_step(name):
    """ρ = 1 for every token then, and nothing is clipped."""
    case = CASES[name]
    product, _ = trainings(replace(case, clip=0.2), 1)
    _, trainer = trainings(case, 1)
    for step in range(STEPS):
        batch = prompts(step)
        table = reference_rewards(case, batch)
        metrics = product.train(batch, assembled.table_of(table, case.quantiles))
        rollouts = trainer.draw(batch)
        expected = trainer.update(rollouts, reward(case, batch, rollouts.responses), oracle.quantiles(table, None))
        assert metrics["clipped"] == 0
        for value in ("gradient_norm", "kl", "beta", "transformed_reward"):
            assert metrics[value] == pytest.approx(expected[value], rel=1e-5, abs=1e-5), (value, step)
        np.testing.assert_allclose(product.params, trainer.params, rtol=1e-5, atol=1e-5)


def objective(case: Case, params: np.ndarray, prompt: int, responses: Responses, rewards: np.ndarray) -> float:
    """J = Σ_y π(y) (R(y) / β − log π(y) / π_ref(y)) over every response."""
    total = 0.0
    for tokens, length, one in zip(responses.tokens[0], responses.lengths[0], rewards, strict=True):
        laws = [
            [oracle.log_law(table, prompt, tokens[:t], case.temperature)[tokens[t]] for t in range(length)]
            for table in (params, REFERENCE)
        ]
        log_prob, reference = map(sum, laws)
        total += np.exp(log_prob) * (one / case.beta - log_prob + reference)
    return total


@pytest.mark.parametrize("name", ["identity", "exponential", "negative exponential", "logarithm", "raw"])
def test_over_every_pair_of_responses_the_step_climbs_the_objective(name):
    """A uniform policy says a response of length l with probability 3^-l: each pair as often as it is likely, and the
    batch's gradient is the expectation itself. That is −∇J, by differences of J: nothing of the loss enters it."""
    case = CASES[name]
    every = jax.tree.map(np.asarray, fakes.every_response())
    often = 3 ** (oracle.LENGTH - every.lengths[0])
    each = np.repeat(np.arange(len(often)), often)
    pairs = np.array(list(itertools.product(each, each)))
    uniform = np.zeros_like(START)
    ids = np.zeros(len(pairs), np.uint32)
    batch = Prompts(np.zeros((len(pairs), 2), np.int32), np.ones(len(pairs), np.int32), ids)
    responses = Responses(every.tokens[0][pairs], every.lengths[0][pairs])
    rollouts = Rollouts(batch, responses, np.zeros(responses.tokens.shape, np.float32))
    one = jax.tree.map(lambda x: x[:1], batch)
    raw, table = reward(case, one, every), reference_rewards(case, one)

    product = assembled.policy_training(
        make_mesh(1), start=uniform, reference=REFERENCE, key=KEY, beta=case.beta, held=True, score=None,
        num_references=REFERENCES, transform=case.transform, procedure="sampling", temperature=case.temperature,
        samples_per_prompt=2, max_gradient_norm=1e3, micro_batches=1, warmup_steps=0,
    )  # fmt: skip
    references = np.broadcast_to(assembled.table_of(table, None), (len(pairs), REFERENCES))
    product.update(rollouts, raw[0][pairs], references)
    found = np.sqrt(product.second_moment / (1 - 0.99))

    ranks = oracle.calibrated(raw, table)
    rewards = raw if case.transform == "raw" else oracle.transform(case.transform, ranks, REFERENCES)
    gradient = np.zeros(uniform.shape)
    for place in np.ndindex(*uniform.shape):
        at = [uniform.astype(np.float64) for _ in range(2)]
        at[0][place], at[1][place] = 1e-5, -1e-5
        up, down = (objective(case, params, 0, every, np.asarray(rewards[0], np.float64)) for params in at)
        gradient[place] = (up - down) / 2e-5
    assert np.abs(gradient).max() > 0.05
    np.testing.assert_allclose(found, np.abs(gradient), rtol=1e-4, atol=1e-5)
    # Uphill: the optimiser goes against the gradient of the loss, that is along that of J.
    moved, real = product.params - uniform, np.abs(gradient) > 1e-4
    np.testing.assert_array_equal(np.sign(moved[real]), np.sign(gradient[real]))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_of_responses_is_that_of_their_laws_and_averages_to_the_policys(devices, temperature):
    """The evaluation's. Summed over all responses by their probability it is Σ_y π(y) log π(y) / π_ref(y)."""
    every = jax.tree.map(np.asarray, fakes.every_response())
    ids = np.arange(8, dtype=np.uint32) % 3  # of both tables of the language
    both = Prompts(np.zeros((8, 2), np.int32), np.ones(8, np.int32), ids)
    responses = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), every)
    found = assembled.kl_of_responses(make_mesh(devices), START, REFERENCE, both, responses, temperature=temperature)
    for b, prompt in enumerate(ids):
        total = 0.0
        for n, (tokens, length) in enumerate(zip(every.tokens[0], every.lengths[0], strict=True)):
            laws, references = (
                [oracle.log_law(table, prompt, tokens[:t], temperature) for t in range(length)]
                for table in (START, REFERENCE)
            )
            by_token = [np.sum(np.exp(law) * (law - other)) for law, other in zip(laws, references, strict=True)]
            assert found[b, n] == pytest.approx(sum(by_token), rel=1e-5, abs=1e-6)
            log_prob, reference = (
                sum(law[token] for law, token in zip(table, tokens, strict=False)) for table in (laws, references)
            )
            total += np.exp(log_prob) * (log_prob - reference)
        weights = [np.exp(sum(oracle.log_law(START, prompt, y[:t], temperature)[y[t]] for t in range(length)))
                   for y, length in zip(every.tokens[0], every.lengths[0], strict=True)]  # fmt: skip
        assert np.sum(weights) == pytest.approx(1)
        assert weights @ found[b] == pytest.approx(total, rel=1e-5)
        assert total > 0.3
