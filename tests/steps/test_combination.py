import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.steps import combination
from ctrl_jax.steps.combination import LogSigmoids, SmallestCalibrated, WeightedSum

PROMPTS, RESPONSES, REFERENCES, REWARDS = 8, 5, 12, 3
ALL = [WeightedSum((1.0, -0.5, 2.0)), LogSigmoids(0.85), LogSigmoids(0.3), SmallestCalibrated()]


@pytest.fixture
def rewards():
    """Of unlike scales, with ties in the last."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 100.0, 3.0])

    def drawn(count):
        values = rng.normal(size=(PROMPTS, count, REWARDS)) * scales
        values[..., 2] = np.round(values[..., 2])
        return values.astype(np.float32)

    return drawn(RESPONSES), drawn(REFERENCES)


def quantile(values, level):
    """Linear between the order statistics, the first at 0 and the last at 1."""
    ascending = sorted(values)
    place = level * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


def one(how, response, references):
    """One response's reward, by the definition: of its R rewards, and the references' [K, R]."""
    columns = list(zip(response.tolist(), references.T.tolist(), strict=True))
    match how:
        case WeightedSum(weights):
            return sum(w * r for w, (r, _) in zip(weights, columns, strict=True))
        case LogSigmoids(level):
            return sum(-np.log1p(np.exp(quantile(others, level) - r)) for r, others in columns)
        case SmallestCalibrated():
            return min(np.mean([(r > z) + 0.5 * (r == z) for z in others]) for r, others in columns)
    raise AssertionError(how)


@pytest.mark.parametrize("how", ALL, ids=str)
def test_it_is_its_definition(how, rewards):
    given, references = rewards
    expected = [[one(how, response, among) for response in row] for row, among in zip(given, references, strict=True)]
    np.testing.assert_allclose(jax.jit(how)(given, references), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ALL, ids=str)
def test_its_name_reads_back(how):
    assert combination.parse(how.name, getattr(how, "weights", ())) == how


@pytest.mark.parametrize("how", ALL, ids=str)
def test_split_over_devices_it_is_the_same(how, rewards):
    split = jax.shard_map(how, mesh=make_mesh(8), in_specs=(P("data"), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(split)(*rewards), jax.jit(how)(*rewards))


@pytest.mark.parametrize("how", ALL[1:], ids=str)
def test_the_order_of_the_references_does_not_matter(how, rewards):
    given, references = rewards
    np.testing.assert_allclose(how(given, references[:, ::-1]), how(given, references), rtol=1e-6)


def test_ranks_do_not_know_the_units_of_a_reward_and_sums_do(rewards):
    given, references = rewards
    stretched = np.array([1.0, 7.0, 0.01], np.float32)
    ranked = SmallestCalibrated()
    np.testing.assert_array_equal(ranked(given * stretched, references * stretched), ranked(given, references))
    for how in ALL[:3]:
        assert not np.allclose(how(given * stretched, references * stretched), how(given, references))


def test_a_reward_that_is_low_is_not_made_up_for_by_another():
    references = np.tile(np.linspace(-1, 1, 11, dtype=np.float32)[None, :, None], (1, 1, 2))
    balanced, lopsided = np.array([[[0.5, 0.5]]], np.float32), np.array([[[10.0, -0.9]]], np.float32)
    assert WeightedSum((1.0, 1.0))(lopsided) > WeightedSum((1.0, 1.0))(balanced)
    for how in (LogSigmoids(), SmallestCalibrated()):
        assert how(lopsided, references) < how(balanced, references)


def test_the_log_sigmoids_have_their_gradient(rewards):
    given, references = rewards
    gradient = jax.grad(lambda r: LogSigmoids(0.5)(r, references).sum())(jnp.asarray(given))
    centres = np.median(references, axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, 1 / (1 + np.exp(np.minimum(given - centres, 80))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "weights", "match"),
    [
        ("smallest", (), "smallest_calibrated"),
        ("smallest_calibrated(3)", (), "takes none"),
        ("weighted_sum(2)", (1.0, 1.0), "takes none"),
        ("log_sigmoids(85)", (), r"between 0 and 1"),
        ("log_sigmoids(0.85)", (1.0, 2.0), "no weights"),
    ],
)
def test_what_is_no_combination_is_refused(text, weights, match):
    with pytest.raises(InputError, match=match):
        combination.parse(text, weights)


@pytest.mark.parametrize("how", ALL[1:], ids=str)
def test_references_that_are_missing_are_asked_for(how, rewards):
    with pytest.raises(InputError, match="reference"):
        how(rewards[0])
