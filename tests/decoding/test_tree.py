"""Search by segments on the enumerable language: the law of what is returned, by enumeration of all draws."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.decoding import names, order, tree
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.devices.mesh import make_mesh, shard
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly
from ctrl_jax.theory.procedures import BestOfN
from ctrl_jax.types import Prompts, Responses
from tests import assembled
from tests.decoding.test_order import PARAMS, PROMPTS, place
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

EVERY = fakes.every_response()
Prefix = tuple[int, ...]


def score(prompts: Prompts, responses: Responses) -> jax.Array:
    """A reward that no two responses and beginnings of them share."""
    number = responses.tokens @ jnp.array([9, 3, 1]) + 5 * responses.lengths
    return jnp.sin(1.0 + 1.7 * number.astype(jnp.float32))


def reward(prefix: Prefix) -> float:
    number = np.array([*prefix, *[fakes.EOS] * (fakes.LENGTH - len(prefix))]) @ [9, 3, 1] + 5 * len(prefix)
    return float(np.sin(np.float32(1.0 + 1.7 * number)))


def longer(prefix: Prefix) -> dict[Prefix, float]:
    """What one token more makes of it, with the chance of each."""
    if fakes.EOS in prefix or len(prefix) == fakes.LENGTH:
        return {prefix: 1.0}
    logits = np.asarray(fakes.logits(np.asarray(PARAMS), 0, prefix), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum()
    return {(*prefix, token): chance for token, chance in enumerate(chances)}


def grown(prefix: Prefix, tokens: int) -> dict[Prefix, float]:
    found = {prefix: 1.0}
    for _ in range(tokens):
        after = collections.Counter()
        for one, chance in found.items():
            for more, next_chance in longer(one).items():
                after[more] += chance * next_chance
        found = dict(after)
    return found


def law(of: Tree) -> tuple[dict[Prefix, float], float]:
    """(the chance of each response to be returned, the tokens that are drawn for it in the mean)"""
    states, tokens = {((),) * of.width: 1.0}, 0.0
    ends = [*range(of.segment, fakes.LENGTH, of.segment), fakes.LENGTH]
    for begin, end in itertools.pairwise([0, *ends]):
        after = collections.Counter()
        for prefixes, chance in states.items():
            options = [grown(prefix, end - begin) for prefix in prefixes]
            for drawn in itertools.product(*options):
                joint = chance * np.prod([option[one] for option, one in zip(options, drawn, strict=True)])
                tokens += joint * sum(len(one) - len(prefix) for one, prefix in zip(drawn, prefixes, strict=True))
                ordered = sorted(drawn, key=reward, reverse=True)
                kept = ordered[: 1 if end == fakes.LENGTH else of.kept]
                copies = 1 if end == fakes.LENGTH else of.width // of.kept
                after[tuple(itertools.chain.from_iterable([one] * copies for one in kept))] += joint
        states = dict(after)
    return {prefixes[0]: chance for prefixes, chance in states.items()}, tokens


def decode(of: Tree, prompts: Prompts, key: int = 0):
    decoder = tree.decoder(of, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    return jax.jit(lambda prompts: decoder(fakes.policy, PARAMS, score, prompts, jax.random.key(key)))(prompts)


@pytest.mark.parametrize("of", [Tree(2, 1, 1), Tree(3, 1, 2), Tree(4, 2, 1)], ids=str)
def test_what_is_returned_has_the_law_and_the_cost_of_the_search(of):
    expected_law, tokens = law(of)
    assert sum(expected_law.values()) == pytest.approx(1)
    padded = {(*one, *[fakes.EOS] * (fakes.LENGTH - len(one))): chance for one, chance in expected_law.items()}
    expected = np.array([padded.get(tuple(row), 0.0) for row in np.asarray(EVERY.tokens[0]).tolist()])
    assert expected.sum() == pytest.approx(1)
    found = decode(of, fakes.prompts(*range(0, 2 * PROMPTS, 2)))
    counts = np.bincount(place(found.responses)[:, 0], minlength=len(expected))
    spread = np.sqrt(PROMPTS * expected * (1 - expected))
    assert np.all(np.abs(counts - PROMPTS * expected) < 4.5 * spread + 1e-6)
    error = float(found.sampled.std()) / PROMPTS**0.5
    assert float(found.sampled.mean()) == pytest.approx(tokens, abs=4.5 * error)


def test_a_prompt_gets_the_same_response_in_any_batch_and_what_is_behind_its_length_does_not_count():
    of, ids = Tree(4, 2, 1), range(40)
    together = decode(of, fakes.prompts(*ids))
    alone = decode(of, fakes.prompts(*list(ids)[17:23]))
    np.testing.assert_array_equal(together.responses.tokens[17:23], alone.responses.tokens)
    np.testing.assert_array_equal(together.sampled[17:23], alone.sampled)
    prompts = fakes.prompts(*ids)
    other = decode(of, Prompts(prompts.tokens.at[:, 1:].set(1), prompts.lengths, prompts.ids))
    np.testing.assert_array_equal(together.responses.tokens, other.responses.tokens)


def test_it_counts_the_tokens_of_all_that_grew():
    """Of two segments, where nothing ends: K L and then K more of the rest."""
    never = PARAMS.at[..., fakes.EOS].set(-1e9)
    decoder = tree.decoder(Tree(4, 2, 2), max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    found = decoder(fakes.policy, never, score, fakes.prompts(0, 1, 2), jax.random.key(0))
    assert found.sampled.tolist() == [4 * fakes.LENGTH] * 3 and found.scored == 8
    at_once = PARAMS.at[..., fakes.EOS].set(1e9)
    found = decoder(fakes.policy, at_once, score, fakes.prompts(0, 1, 2), jax.random.key(0))
    assert found.sampled.tolist() == [4] * 3


@pytest.mark.parametrize("of", [Tree(4, 2, 1), BestOfN(3)], ids=str)
@pytest.mark.parametrize("devices", [1, 8])
def test_the_assembled_search_is_the_decoder_on_any_devices(of, devices):
    mesh, prompts = make_mesh(devices), fakes.prompts(*range(16))
    decode = assembly.decoder(
        assembled.models(), mesh, of, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,), temperature=1.0
    )
    found = decode(PARAMS, shard(mesh, prompts), jax.random.key(3), lambda *given: np.asarray(score(*given)))
    pure = (tree if isinstance(of, Tree) else order).decoder(of, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    expected = pure(fakes.policy, PARAMS, score, prompts, jax.random.key(3))
    np.testing.assert_array_equal(found.responses.tokens, expected.responses.tokens)
    np.testing.assert_array_equal(found.sampled, expected.sampled)
    assert found.scored == expected.scored


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blockwise_best_of_8(4)", Tree(8, 1, 4)),
        ("Blockwise-Best-of-8 (4)", None),
        ("tree_of_8(2,4)", Tree(8, 2, 4)),
        ("tree_of_8( 2, 4 )", Tree(8, 2, 4)),
        ("best_of_4", BestOfN(4)),
    ],
)
def test_a_name_is_read_back(text, expected):
    found = names.parse(text.replace(" ", "") if expected is None else text)
    assert found == (expected or Tree(8, 1, 4))
    assert names.parse(found.name) == found


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tree_of_8(3,4)", "keeps 3 of 8.*must divide the width"),
        ("tree_of_8(8,4)", "keeps 8 of 8"),
        ("tree_of_1(1,4)", "width .* is 1.*between 2 and"),
        ("tree_of_5000(1,4)", "between 2 and 1024"),
        ("blockwise_best_of_8(0)", "have 0 tokens.*at least 1"),
        ("tree_of_8", r"There is no decoder 'tree_of_8'.*tree_of_8\(2,4\)"),
        ("beam(4)", r"There is no decoder 'beam\(4\)'"),
    ],
)
def test_what_is_no_decoder_is_refused(text, match):
    with pytest.raises(InputError, match=match):
        names.parse(text)


def test_a_segment_as_long_as_a_response_is_refused():
    with pytest.raises(InputError, match=r"segments of 3 tokens, and responses have at most 3.*best_of_4"):
        tree.decoder(Tree(4, 1, 3), max_length=3, eos_ids=(fakes.EOS,))
