"""Rivals of CTRL on the policy's own responses: expected gradients and optima, by enumeration.

Each has a slope Ψ(y): its expected gradient is that of Σ_y π(y) (Ψ(y) / β − log π(y) / π_ref(y)), Ψ held fixed, and it
rests where Ψ / β − log π / π_ref is the same for all responses. Where there is an objective V of the law, Ψ is
∂V / ∂π(y) by automatic differentiation of V as it is defined.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.bon_rl import BonRl
from ctrl_jax.algorithms.bond import Bond
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.algorithms.functional_derivative import FunctionalDerivative
from ctrl_jax.algorithms.grpo import Grpo
from ctrl_jax.algorithms.j_bond import JBond
from ctrl_jax.algorithms.k_sample import KSample
from ctrl_jax.algorithms.vbon import Vbon
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh, replicate, shard
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import RewardSignal
from ctrl_jax.pipeline import train
from ctrl_jax.theory import ideal
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Experience, Responses
from tests import assembled, oracle
from tests.algorithms import enumerated, test_ppo_clip
from tests.algorithms.enumerated import EVERY, PROMPT, Y, law
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

POLICY, REFERENCE = (fakes.params(jax.random.key(seed), 0.5) for seed in (0, 1))
RAW = np.random.default_rng(0).permutation(Y).astype(np.float32) // 2
"""[Y] pairs of them tie."""
BINARY = (RAW > 4).astype(np.float32)
REFERENCES = np.array([0, 1, 1, 3, 4, 5, 6], np.float32)
BINARY_REFERENCES = np.array([0, 0, 0, 0, 1, 1, 1], np.float32)
BETA = 0.4


def made(kind: type[Ctrl], procedure: str = "best_of_2", beta: float = BETA, transform: str = "raw", **options) -> Ctrl:
    objective = Objective.parse(transform, procedure, 0.3)
    return kind(
        policy=fakes.policy, transformed=objective.transformed(len(REFERENCES)), procedure=objective.procedure,
        beta=beta, kl_budget=0.3, hold_beta=True, eos_ids=(fakes.EOS,), temperature=1.0, chunk_size=7, **options,
    )  # fmt: skip


def best_of(n: int, raw: np.ndarray):
    """V = E max of n, by the law of the highest."""

    def value(policy):
        levels = np.unique(raw)
        reached = jnp.stack([jnp.sum(policy * (raw <= level)) for level in levels]) ** n
        return jnp.sum(levels * jnp.diff(reached, prepend=0.0))

    return value


def chance_of_success(n: int):
    """V = 1 − p^n."""
    return lambda policy: 1 - jnp.sum(policy * (1 - BINARY)) ** n


def win_rate_of_pairs(pick):
    """V = E over pairs of the policy's and of the reference's responses, as the procedure picks from both."""
    picked = np.array([[pick(a, b) for b in RAW] for a in RAW])
    others = np.array([pick(*pair) for pair in itertools.combinations(REFERENCES, 2)])
    wins = np.mean((picked[..., None] > others) + 0.5 * (picked[..., None] == others), axis=-1)
    return lambda policy: policy @ jnp.asarray(wins, jnp.float32) @ policy


def log_rank(policy):
    """V = E log F̂ by its definition."""
    below = np.array([np.sum(r > REFERENCES) for r in RAW])
    return jnp.sum(policy * np.log((below + 1) / (len(REFERENCES) + 1)).astype(np.float32))


def tilt(value, beta: float = BETA):
    return lambda policy, reference: jax.grad(value)(policy) / beta - jnp.log(policy / reference)


def jeffreys(policy, reference):
    """Half of vBoN's, and half of the likelihood of π_2 = 2 F̂ π_ref, whose gradient is Σ π_2 ∇log π."""
    likelihood = 2 * jnp.exp(jax.grad(log_rank)(policy)) * reference / policy
    return 0.5 * tilt(log_rank, 1.0)(policy, reference) + 0.5 * likelihood


def climb(policy, reference):
    """J-BOND's: among its own responses, 2 C and r_J in halves."""
    better = np.asarray(RAW[None] > RAW[:, None]) @ policy
    ties = np.asarray(RAW[None] == RAW[:, None]) @ policy
    slope = 0.5 * 2 * (1 - better - ties / 2) - 0.5 * math.log(16) * better**2
    return slope - jnp.log(policy / reference)


@dataclasses.dataclass(frozen=True)
class Case:
    algorithm: Ctrl
    slope: object
    """(policy, reference) to Ψ / β − log π / π_ref, each [Y]."""
    size: int = 2
    raw: np.ndarray = dataclasses.field(default_factory=lambda: RAW)
    references: np.ndarray = dataclasses.field(default_factory=lambda: REFERENCES)


BINARIES = {"size": 3, "raw": BINARY, "references": BINARY_REFERENCES}
CASES = {
    "CTRL of raw rewards": Case(made(Ctrl, beta=3.0), tilt(lambda policy: policy @ RAW, 3.0)),
    "vBoN": Case(made(Vbon, beta=1.0), tilt(log_rank, 1.0)),
    "BOND": Case(made(Bond, beta=1.0, backward=0.5), jeffreys),
    "best of 2 of 3": Case(made(KSample, beta=3.0), tilt(best_of(2, RAW), 3.0), size=3),
    "pass@3": Case(made(KSample, "best_of_3"), tilt(best_of(3, BINARY)), **BINARIES),
    "BoN-RL": Case(made(BonRl, "best_of_3", success=0.5), tilt(chance_of_success(3)), **BINARIES),
    "win rate of best of 2": Case(made(FunctionalDerivative), tilt(win_rate_of_pairs(max)), size=3),
    "win rate of worst of 2": Case(made(FunctionalDerivative, "worst_of_2"), tilt(win_rate_of_pairs(min)), size=3),
    "J-BOND": Case(made(JBond, beta=1.0, backward=0.5), climb, size=3),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def gradient(function, params: jax.Array = POLICY) -> jax.Array:
    return jax.jit(jax.grad(function))(params)


def expected_gradient(case: Case, params: jax.Array) -> jax.Array:
    def loss(params):
        return enumerated.expected_loss(
            case.algorithm, params, REFERENCE, size=case.size, raw=case.raw, references=case.references
        )

    return gradient(loss, params)


def score(weights: jax.Array) -> jax.Array:
    """Σ_y w(y) ∇log π(y) at POLICY."""
    return gradient(lambda params: jnp.sum(weights * fakes.log_prob_of(params, PROMPT, EVERY)[0]))


@cases
def test_the_expected_gradient_is_that_of_the_objective(case):
    expected = -score(law(POLICY) * case.slope(law(POLICY), law(REFERENCE)))
    found = expected_gradient(case, POLICY)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@cases
def test_it_rests_at_the_optimum(case):
    params = enumerated.where_it_rests(lambda params: expected_gradient(case, params), REFERENCE, steps=200, rate=0.1)
    policy, reference = np.asarray(law(params)), np.asarray(law(REFERENCE))
    slope = np.asarray(case.slope(policy, reference))
    assert np.sum(policy * np.log(policy / reference)) > 0.1, "it has gone somewhere"
    assert np.sqrt(policy @ (slope - policy @ slope) ** 2) < 0.02
    if isinstance(case.algorithm, Vbon):
        below = np.array([np.sum(r > REFERENCES) for r in RAW])
        optimum = reference * (below + 1) / (len(REFERENCES) + 1)
        np.testing.assert_allclose(policy, optimum / optimum.sum(), atol=2e-3)


def of_ranks(ranks: np.ndarray, references: np.ndarray) -> np.ndarray:
    """vBoN's tilt exp(log F̂ / β) of responses with these raw rewards, for N = 4."""
    vbon = made(Vbon, beta=1 / 3)
    rewards = vbon.rewards(jnp.asarray(ranks)[None], jnp.asarray(ranks)[None], jnp.asarray(references)[None])[0]
    return np.exp(np.asarray(rewards, np.float64) / vbon.beta)


def test_vbons_optimum_is_best_of_n_without_ties_and_below_it_with_ties():
    ranks = (np.arange(4000) + 0.5) / 4000
    references = (np.arange(1000) + 0.5) / 1000
    tilted = of_ranks(ranks, references)
    density = tilted / tilted.mean()
    np.testing.assert_allclose(density, 4 * ranks**3, atol=0.02)
    assert np.mean(density * np.log(density)) == pytest.approx(math.log(4) - 3 / 4, abs=0.01)
    # Three levels, of .5, .3 and .2 of the reference: before Z, F³ where best-of-4 itself has ((F + t)⁴ − F⁴) / (4 t).
    levels = np.repeat([0.0, 1.0, 2.0], [500, 300, 200])
    found = of_ranks(np.array([1.0, 2.0]), levels)
    np.testing.assert_allclose(found, [0.5**3, 0.8**3], rtol=0.01)
    best = np.array([(0.8**4 - 0.5**4) / (4 * 0.3), (1 - 0.8**4) / (4 * 0.2)])
    assert (found < best).all()


def test_ctrl_of_raw_rewards_is_rloo_in_expectation_and_at_the_reference():
    """RLOO: REINFORCE on whole responses, whose reward is r − β log π/π_ref less the mean of the others'."""
    places, orders = enumerated.groups(2)
    case = CASES["CTRL of raw rewards"]

    def rloo(params, places):
        """[G] losses by definition, divided by β."""
        log_probs = fakes.log_prob_of(params, PROMPT, EVERY)[0]
        log_ratio = log_probs - fakes.log_prob_of(REFERENCE, PROMPT, EVERY)[0]
        rewards = jax.lax.stop_gradient(RAW / case.algorithm.beta - log_ratio)[places]
        return -jnp.mean((rewards - rewards[:, ::-1]) * log_probs[places], axis=1)

    chances = np.asarray(law(POLICY))[places].prod(axis=1) * orders
    theirs = gradient(lambda params: jnp.sum(chances * rloo(params, places)))
    np.testing.assert_allclose(expected_gradient(case, POLICY), theirs, atol=1e-5)
    batch = enumerated.experience(REFERENCE, places[7:8], RAW, REFERENCES)
    ours = gradient(lambda params: enumerated.losses(case.algorithm, params, REFERENCE, batch)[0], REFERENCE)
    same = gradient(lambda params: rloo(params, places[7:8])[0], REFERENCE)
    assert np.abs(same).max() > 0.1
    np.testing.assert_allclose(ours, same, atol=1e-5)


def test_bon_rls_gradient_is_that_of_the_papers_weights_in_draws_of_best_of_n():
    """Without a KL: Σ_y π_N(y) g(y) ∇log π(y), g = N p^(N−1) / (1 − p^N) of a success, N p / (1 − p) of a failure."""
    policy, n = np.asarray(law(POLICY), np.float64), 3
    p = policy @ (1 - BINARY)
    best = policy * np.where(BINARY == 1, (1 - p**n) / (1 - p), p ** (n - 1))
    assert best.sum() == pytest.approx(1)
    weights = best * np.where(BINARY == 1, n * p ** (n - 1) / (1 - p**n), n * p / (1 - p))
    theirs = -score(weights)
    # At half the β the reward counts once more, and the KL does not.
    once, twice = (
        expected_gradient(dataclasses.replace(case, algorithm=dataclasses.replace(case.algorithm, beta=beta)), POLICY)
        for case, beta in ((CASES["BoN-RL"], BETA), (CASES["BoN-RL"], BETA / 2))
    )
    np.testing.assert_allclose(twice - once, theirs / BETA, atol=2e-5)


def test_advantages_are_those_of_the_definition():
    """Over subsets, of groups larger than those above; with ties."""
    rng = np.random.default_rng(3)
    raw, references = rng.integers(0, 6, (4, 6)).astype(np.float32), rng.integers(0, 6, (4, 7)).astype(np.float32)
    batch = Experience(None, jnp.asarray(raw), jnp.sort(jnp.asarray(references), axis=-1))

    def found(algorithm):
        return algorithm.advantages(algorithm.targets(batch).scored.transformed)

    def each(of):
        return [[of(row, i, np.delete(row, i)) for i in range(len(row))] for row in raw]

    expected = each(
        lambda row, i, others: 3 * np.mean([max(row[i], *s) - max(s) for s in itertools.combinations(others, 2)])
    )
    np.testing.assert_allclose(found(made(KSample, "best_of_3")), expected, atol=1e-5)

    for name in ("best_of_3", "worst_of_2", "sampling"):
        whole = oracle.win_rate(raw, references, name)
        without = np.stack([oracle.win_rate(np.delete(raw, i, axis=1), references, name) for i in range(6)], axis=1)
        np.testing.assert_allclose(found(made(FunctionalDerivative, name)), 6 * (whole[:, None] - without), atol=2e-5)

    successes = (oracle.calibrated(raw, references) > 0.6).astype(float)
    expected = np.zeros_like(successes)
    for (b, i), own in np.ndenumerate(successes):
        others = np.delete(successes[b], i)
        none = np.mean([not any(pair) for pair in itertools.combinations(others, 2)])
        expected[b, i] = 3 * none * (own - others.mean())
    np.testing.assert_allclose(found(made(BonRl, "best_of_3", success=0.6)), expected, atol=1e-5)

    log16 = math.log(16)
    expected = each(
        lambda row, i, others: (
            0.3 * (2 * np.mean((row[i] > others) + 0.5 * (row[i] == others)) - 1)
            + 0.7 * (np.mean([-log16 * (row[i] < min(s)) for s in itertools.combinations(others, 2)]) + log16 / 3)
        )
    )
    np.testing.assert_allclose(found(made(JBond, backward=0.7)), expected, atol=1e-5)

    expected = [(row - row.mean()) / row.std() for row in raw]
    np.testing.assert_allclose(found(made(Grpo, clip=0.2, epochs=1, minibatches=1)), expected, atol=1e-5)


def test_a_group_of_equal_rewards_has_no_advantage():
    for value in (0.0, 0.1, 1e6):
        rewards = jnp.full((1, 3), value)
        for algorithm in (made(Grpo, clip=0.2, epochs=1, minibatches=1), made(KSample), made(JBond, backward=0.0)):
            np.testing.assert_array_equal(algorithm.advantages(rewards), 0)


GRPO = made(Grpo, clip=0.2, epochs=1, minibatches=1)


def some() -> Experience:
    """Two prompts of three responses each."""
    return jax.tree.map(lambda x: jnp.asarray(x[:2]), test_ppo_clip.experience(drift=0.3))


def grpo_by_definition(params, batch: Experience):
    """The mean loss, token by token."""
    prompts, responses = batch.rollouts.prompts, batch.rollouts.responses
    log_probs, _ = test_ppo_clip.token_laws(params, prompts, responses)
    references, _ = test_ppo_clip.token_laws(REFERENCE, prompts, responses)
    total, raw = 0.0, np.asarray(batch.raw, np.float64)
    for b, n in np.ndindex(*raw.shape):
        advantage = (raw[b, n] - raw[b].mean()) / raw[b].std()
        length = int(responses.lengths[b, n])
        for t in range(length):
            ratio = jnp.exp(log_probs[b, n, t] - batch.rollouts.log_probs[b, n, t])
            gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
            difference = references[b, n, t] - log_probs[b, n, t]
            total += (jnp.exp(difference) - difference - 1 - gain / BETA) / length
    return total / raw.size


def test_grpos_loss_and_its_gradient_are_those_of_the_definition():
    batch = some()
    found, slope = jax.value_and_grad(lambda params: loss_of(GRPO, params, batch))(POLICY)
    expected, expected_slope = jax.value_and_grad(grpo_by_definition)(POLICY, batch)
    assert found == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_allclose(slope, expected_slope, atol=2e-6)
    assert np.abs(expected_slope).max() > 0.01


def test_grpo_of_one_token_rests_where_the_reference_is_divided_and_not_tilted():
    """In pairs A is 1 for the better response and −1 for the other, so that Ā is P(worse) − P(better)."""
    tokens = jnp.array([[[0, 2, 2], [1, 2, 2], [2, 2, 2]]], jnp.int32)
    every, raw, beta = Responses(tokens, jnp.ones((1, 3), jnp.int32)), np.array([1.0, 5.0, 2.0], np.float32), 0.8
    algorithm = dataclasses.replace(GRPO, beta=beta)

    def loss(params):
        return enumerated.expected_loss(
            algorithm, params, REFERENCE, size=2, raw=raw, references=REFERENCES, every=every
        )

    params = enumerated.where_it_rests(jax.grad(loss), REFERENCE, steps=300, rate=0.1)
    policy, reference = (np.asarray(law(one, every)) for one in (params, REFERENCE))
    mean = (raw[:, None] > raw) @ policy - (raw[:, None] < raw) @ policy
    constant = mean + beta * reference / policy
    np.testing.assert_allclose(constant, constant[0], atol=1e-3)
    tilted = mean / beta - np.log(policy / reference)
    assert np.ptp(tilted) > 0.1


def loss_of(algorithm: Ctrl, params: jax.Array, batch: Experience) -> jax.Array:
    return algorithm.loss(params, REFERENCE, batch, algorithm.targets(batch), algorithm.start())[0].value


ALGORITHMS = {
    "vBoN": made(Vbon, beta=1 / 3),
    "BOND": made(Bond, beta=1 / 3, backward=0.5),
    "k-sample": made(KSample),
    "BoN-RL": made(BonRl, success=0.5),
    "functional derivative": made(FunctionalDerivative),
    "J-BOND": made(JBond, backward=0.5),
    "GRPO": GRPO,
}
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())


def test_limits_coincide():
    """Of one sample: CTRL of ranks, or of successes. BOND of the backward divergence alone: vBoN."""
    identity = made(Ctrl, "sampling", transform="identity")
    successes = dataclasses.replace(identity, transformed=lambda raw, calibrated: (calibrated > 0.5) * 1.0)
    pairs = (
        (made(FunctionalDerivative, "sampling"), identity),
        (made(BonRl, "best_of_1", success=0.5), successes),
        (made(Bond, beta=1 / 3, backward=1.0), made(Vbon, beta=1 / 3)),
    )
    batch = some()
    for one, other in pairs:
        found, expected = (gradient(lambda params, x=x: loss_of(x, params, batch)) for x in (one, other))
        assert np.abs(expected).max() > 0.05
        np.testing.assert_allclose(found, expected, atol=1e-5)


@algorithms
def test_what_is_behind_a_response_does_not_count(algorithm):
    batch = jax.tree.map(np.asarray, some())
    other = enumerated.padded_otherwise(batch)
    real = np.arange(fakes.LENGTH) < batch.rollouts.responses.lengths[..., None]
    log_probs = np.where(real, batch.rollouts.log_probs, 1e3).astype(np.float32)
    rollouts = dataclasses.replace(other.rollouts, log_probs=log_probs)
    found = loss_of(algorithm, POLICY, dataclasses.replace(other, rollouts=rollouts))
    assert found == pytest.approx(float(loss_of(algorithm, POLICY, batch)), rel=1e-5)


@algorithms
def test_eight_devices_take_the_step_of_the_whole_batch_and_report_what_is_declared(algorithm):
    mesh, optimizer, batch = make_mesh(8), optax.sgd(0.5), test_ppo_clip.experience()
    step = programs.training_step(mesh, optimizer, algorithm, micro_batches=lambda batch: 2)
    state = programs.init_state(POLICY, optimizer, mesh, algorithm.start())
    sharded, metrics = jax.device_get(step(state, replicate(mesh, REFERENCE), shard(mesh, batch)))
    whole = gradient(lambda params: loss_of(algorithm, params, batch))
    assert np.abs(whole).max() > 1e-2
    np.testing.assert_allclose(sharded.params, POLICY - 0.5 * whole, atol=1e-5)
    assert metrics.keys() - {"first_rows", "gradient_norms"} == {metric.name for metric in algorithm.metrics}
    assert all(np.isfinite(metrics[metric.name]) for metric in algorithm.metrics)


OPTIONS = {
    config.Vbon: Vbon, config.Bond: Bond, config.KSample: KSample, config.BonRl: BonRl,
    config.FunctionalDerivative: FunctionalDerivative, config.JBond: JBond, config.Grpo: Grpo,
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_options_make_their_algorithm_with_a_beta_for_the_budget(kind):
    options = kind(procedure="best_of_2", kl_budget=0.2)
    table = np.sort(np.random.default_rng(0).normal(size=(12, 64)), axis=-1).astype(np.float32)
    run = SimpleNamespace(
        models=assembled.models(), mesh=make_mesh(1), experiment=config.Experiment("any", policy=options),
        corpus=SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(fakes.EOS,))),
    )  # fmt: skip
    calibrated = SimpleNamespace(table=SimpleNamespace(rewards=table), signal=RewardSignal())
    algorithm = train.algorithm_of(run, options, calibrated)
    assert type(algorithm) is OPTIONS[kind] and algorithm.updates == 1
    if isinstance(options, config.Vbon):
        assert algorithm.beta == pytest.approx(1 / 3) and bool(algorithm.start().held)
        return
    assert not algorithm.start().held
    if kind is config.FunctionalDerivative:
        kl = kl_of_the_best_win_rate_of_two(algorithm.beta)
    elif kind is config.JBond:
        kl = kl_of_j_bond_at_rest(algorithm.beta, options.backward)
    else:
        batch = Experience(None, jnp.asarray(table), jnp.asarray(table))
        advantages = np.asarray(algorithm.advantages(algorithm.targets(batch).scored.transformed), np.float64)
        tilted = np.exp(advantages / algorithm.beta)
        tilted /= tilted.sum(axis=1, keepdims=True)
        kl = np.mean(np.sum(tilted * np.log(64 * tilted), axis=1))
    assert kl == pytest.approx(0.2, rel=0.02)


def kl_of_the_best_win_rate_of_two(beta: float, cells: int = 2000) -> float:
    """Of the density p ∝ exp(Φ / β) with Φ(u) = 4 ∫₀ᵘ s F(s) ds of its own CDF, on a grid of ranks."""
    ranks, density = (np.arange(cells) + 0.5) / cells, np.ones(cells)
    for _ in range(200):
        slope = 4 * np.cumsum(ranks * np.cumsum(density) / cells) / cells
        tilted = np.exp(slope / beta)
        density = np.sqrt(density * tilted / tilted.mean())
        density /= density.mean()
    return float(np.mean(density * np.log(density)))


def test_the_first_beta_of_best_of_two_is_that_of_its_slope_at_the_reference():
    """V = E max(u, u') of ranks has the slope u² at the uniform law."""
    algorithm = made(KSample, transform="identity")
    objective = Objective.parse("identity", "best_of_2", 0.3)
    table = np.tile(np.arange(400, dtype=np.float32), (3, 1))
    found = algorithm.first_beta(objective, 400, table)
    assert found == pytest.approx(ideal.at_kl(lambda u: u**2, 0.3).beta, rel=0.02)


@pytest.mark.parametrize("backward", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.1, 0.6, 2.0])
def test_j_bond_begins_at_the_beta_at_which_it_comes_to_rest(backward, budget):
    algorithm, objective = made(JBond, backward=backward), Objective.parse("raw", "best_of_4", budget)
    beta = algorithm.first_beta(objective, 128, np.arange(128.0)[None])
    assert kl_of_j_bond_at_rest(beta, backward) == pytest.approx(budget, rel=2e-3)


def test_j_bond_refuses_a_budget_that_ties_leave_out_of_reach():
    """Of rewards of 0 and 1, where three in four are 1, no policy is farther than log 4/3 nats."""
    table = np.repeat([[0.0, 1.0]], 8, axis=0).repeat([32, 96], axis=1)
    with pytest.raises(InputError, match=r"96 share the highest reward, which gives β only up to 0\.288"):
        made(JBond, backward=0.5).first_beta(Objective.parse("raw", "best_of_4", 0.3), 128, table)


def kl_of_j_bond_at_rest(beta: float, backward: float, cells: int = 4000) -> float:
    """Of the law that stays where it is: towards exp(Ψ / β) of its own ranks, a tenth of the way at a time."""
    law = np.full(cells, 1 / cells)
    for _ in range(3000):
        rank = np.cumsum(law) - law / 2
        aim = np.exp(((1 - backward) * 2 * rank - backward * np.log(16) * (1 - rank) ** 2) / beta)
        law = law**0.9 * (aim / aim.sum()) ** 0.1
        law /= law.sum()
    return float(law @ np.log(law * cells))
