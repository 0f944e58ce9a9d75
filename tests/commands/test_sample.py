"""A session over a tiny decoder whose tokens are letters, and a reward that counts them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.commands import sample_session as sample
from ctrl_jax.commands.sample_session import Asked, Comparing, Drawn, Judge, Picked, Scored, Session
from ctrl_jax.config import Decoding
from ctrl_jax.data.conversations import Turn
from ctrl_jax.devices import parameters
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import networks
from ctrl_jax.pipeline import assembly, randomness
from ctrl_jax.steps import sampling
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Responses

pytestmark = pytest.mark.usefixtures("compile_fast")

LETTERS = "abcdefghijklmn"
LENGTH, REFERENCES = 6, 12
EXPONENTIAL, RAW = (
    Objective.parse(name, "best_of_4", 0.6).transformed(REFERENCES) for name in ("exponential(10)", "raw")
)
EXPERIMENT = config.Experiment("letters", data=config.Data(prompt_length=8, response_length=LENGTH))
MODEL = config.Model(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
PARTS = networks.create(MODEL.architecture(len(LETTERS) + 2), config.Lora())


class Tokenizer:
    vocabulary_size = len(LETTERS) + 2
    pad_id, eos_ids, fingerprint = 0, (0, 1), "letters"

    def encode_prompt(self, conversation):
        return [2 + LETTERS.index(letter) for turn in conversation for letter in turn.content]

    def encode_response(self, text):
        return [*(2 + LETTERS.index(letter) for letter in text), 0]

    def decode(self, ids):
        return "".join(LETTERS[i - 2] for i in ids if i >= 2)


def score(prompts, responses):
    """The sum of a response's tokens, and of the prompt's a tenth."""
    real = np.arange(responses.tokens.shape[-1]) < np.asarray(responses.lengths)[..., None]
    asked = np.asarray(prompts.tokens).sum(-1)[:, None]
    return np.where(real, responses.tokens, 0).sum(-1) + asked / 10


@pytest.fixture(scope="module")
def mesh():
    """Two devices, which both do the same."""
    return make_mesh(2)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "streamer", functools.lru_cache(assembly.streamer))
        yield


@pytest.fixture(scope="module")
def params(mesh):
    # Large enough that responses differ, and end at different lengths.
    seeds = {"policy": 1, "reference": 2}
    made = {side: parameters.init_decoder(PARTS, mesh, jax.random.key(seed)) for side, seed in seeds.items()}
    return jax.tree.map(lambda x: 3 * x, made)


@pytest.fixture
def session(params, mesh):
    judge = Judge(score, REFERENCES, EXPONENTIAL)
    return Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, judge, Decoding())


def events(session, text="abc", num_samples=5, procedure="best_of_4"):
    return list(session.answer(sample.said(text), Asked(num_samples, procedure)))


def last(kind, of):
    return [event for event in of if isinstance(event, kind)][-1]


def test_the_responses_are_those_of_the_sampler(session, params):
    """Token by token on all devices, and at once on one."""
    found = last(Drawn, events(session)).responses
    prompts = sample.read_prompt(sample.said("abc"), Tokenizer(), EXPERIMENT.data).prompts
    sampler = jax.jit(
        lambda *given: sampling.sample(PARTS.policy, *given, num_samples=5, max_length=LENGTH, eos_ids=(0, 1))
    )
    for side in ("policy", "reference"):
        key = jax.random.fold_in(randomness.stage_key(EXPERIMENT.seed, f"sample, {side}"), 1)
        rollouts = sampler(params[side], prompts, key)
        tokens, lengths = np.asarray(rollouts.responses.tokens[0]), np.asarray(rollouts.responses.lengths[0])
        assert len(set(lengths.tolist())) > 1
        for response, row, length in zip(found[side], tokens, lengths, strict=True):
            assert response.text == Tokenizer().decode(row[:length])
            assert response.state == ("ended" if row[length - 1] < 2 else "cut")
    assert found["policy"] != found["reference"]


def test_texts_grow_a_token_at_a_time(session):
    drawn = [event.responses for event in events(session) if isinstance(event, Drawn)]
    for step, (before, after) in enumerate(itertools.pairwise(drawn), start=1):
        for side in ("policy", "reference"):
            for old, new in zip(before[side], after[side], strict=True):
                assert new.text.startswith(old.text)
                assert new == old or old.state == "growing"
                assert old.state != "growing" or len(old.text) == step
    assert all(response.state != "growing" for side in drawn[-1].values() for response in side)


def test_rewards_are_raw_calibrated_and_transformed(session):
    found = events(session)
    responses, rewards = last(Drawn, found).responses, last(Scored, found).rewards
    assert last(Comparing, found).references == REFERENCES
    ended = {side: [r.state == "ended" for r in of_side] for side, of_side in responses.items()}
    tokens = {side: [sum(Tokenizer().encode_response(r.text)) for r in of_side] for side, of_side in responses.items()}
    for side in ("policy", "reference"):
        own = rewards[side]
        # An end is token 0 or 1.
        for raw, total, has_end in zip(own.raw, tokens[side], ended[side], strict=True):
            assert raw - total - 0.9 == pytest.approx(0, abs=1e-4) or (
                has_end and raw - total - 0.9 == pytest.approx(1)
            )
        steps = REFERENCES if side == "policy" else REFERENCES - 1
        counts = 2 * steps * np.array(own.calibrated)
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
        assert all(0 <= rank <= 1 for rank in own.calibrated)
        np.testing.assert_allclose(
            own.transformed, (np.exp(10 * np.array(own.calibrated)) - 1) / (np.exp(10) - 1), rtol=1e-4
        )
    order = np.argsort(rewards["policy"].raw)
    assert (np.diff(np.array(rewards["policy"].calibrated)[order]) >= 0).all()


def test_the_reference_ranks_among_its_own_others(session):
    """With as many responses as references, the ranks are those of all others: their mean is ½."""
    own = last(Scored, events(session, num_samples=REFERENCES)).rewards["reference"]
    raw = np.array(own.raw)
    expected = [(np.sum(r > raw) + 0.5 * (np.sum(r == raw) - 1)) / (REFERENCES - 1) for r in raw]
    np.testing.assert_allclose(own.calibrated, expected, atol=1e-6)


def test_more_responses_than_references(session):
    found = events(session, num_samples=REFERENCES + 1)
    assert last(Comparing, found).references == REFERENCES + 1
    assert len(last(Scored, found).rewards["policy"].raw) == REFERENCES + 1


def test_raw_rewards_stay_as_they_are_where_nothing_transforms_them(params, mesh):
    session = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, Judge(score, REFERENCES, RAW), Decoding())
    rewards = last(Scored, events(session)).rewards["policy"]
    assert rewards.transformed == rewards.raw != rewards.calibrated


@pytest.mark.parametrize("procedure", ["sampling", "best_of_4", "worst_of_3", "soft_best_of_4(0.1)"])
def test_the_pick_is_the_procedures_among_the_first(session, procedure):
    found = events(session, procedure=procedure)
    rewards, picked = last(Scored, found).rewards, last(Picked, found)
    assert found[-1] is picked
    count = procedures.parse(procedure).num_samples
    assert (picked.procedure, picked.looks_at) == (procedure, count)
    for side, place in picked.picks.items():
        first = rewards[side].raw[:count]
        match procedure:
            case "sampling":
                assert place == 0
            case "best_of_4":
                assert place == np.argmax(first)
            case "worst_of_3":
                assert place == np.argmin(first)
            case _:
                assert 0 <= place < 4
    again = session.pick({side: of_side.raw for side, of_side in rewards.items()}, procedure)
    assert again == picked


def test_a_pick_of_what_the_page_sends_back(session):
    picked = session.pick({"policy": [1, 3.5, "-inf"], "reference": [0, 0, 0]}, " worst_of_3 ")
    assert picked.picks == {"policy": 2, "reference": 0}


def test_the_same_prompt_again_gets_new_responses_and_a_new_session_the_old_ones(session, params, mesh):
    first, second = events(session), events(session)
    assert last(Drawn, first) != last(Drawn, second)
    other = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, Judge(score, REFERENCES, RAW), Decoding())
    assert last(Drawn, events(other)) == last(Drawn, first)


def test_a_prompt_that_the_reward_cannot_score_is_answered_without_rewards(params, mesh, session, capsys):
    judge = Judge(score, REFERENCES, RAW, lambda prompts: prompts.texts[0].strip().startswith("Human: abc"))
    other = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, judge, Decoding())
    assert {type(event) for event in events(other, "bca")} == {Drawn}
    assert "No rewards: the reward reads columns of the data" in capsys.readouterr().out.replace("\n", " ")
    sample.print_responses(other, sample.said("bca"), Asked(3, "best_of_2"))
    assert "calibrated" not in capsys.readouterr().out
    assert {Scored, Picked} <= {type(event) for event in events(other, "abc")}


def test_longer_responses_than_in_training(params, mesh):
    session = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, None, Decoding(max_length=3 * LENGTH))
    responses = last(Drawn, events(session)).responses["policy"]
    assert LENGTH < max(len(response.text) for response in responses) <= 3 * LENGTH


@pytest.mark.parametrize("greedy", [Decoding(top_k=1), Decoding(top_p=1e-6), Decoding(temperature=1e-6)])
def test_decodings_whose_limit_is_the_likeliest_response(params, mesh, greedy):
    drawn = {}
    for name, decoding in (("greedy", greedy), ("training", Decoding())):
        session = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), params, None, decoding)
        drawn[name] = last(Drawn, events(session)).responses["policy"]
    assert len(set(drawn["training"])) > 1
    (likeliest,) = set(drawn["greedy"])
    prompt = sample.read_prompt(sample.said("abc"), Tokenizer(), EXPERIMENT.data).prompts
    tokens = []
    for _ in range(LENGTH):
        # Two more than there are: a decoder reads all but the last.
        response = Responses(jnp.array([[[*tokens, 0, 0]]], jnp.int32), jnp.full((1, 1), len(tokens) + 2))
        logits = PARTS.policy.unembed(params["policy"], PARTS.policy.apply(params["policy"], prompt, response))
        tokens.append(int(logits[0, 0, len(tokens)].argmax()))
        if tokens[-1] < 2:
            break
    assert likeliest.text == Tokenizer().decode(tokens)


def test_a_model_without_rewards(params, mesh):
    session = Session(EXPERIMENT, PARTS, mesh, Tokenizer(), {"model": params["policy"]}, None, Decoding())
    found = events(session, procedure="")
    assert {type(event) for event in found} == {Drawn}
    assert list(found[-1].responses) == ["model"]


@pytest.mark.parametrize(
    ("text", "num_samples", "procedure", "told"),
    [
        ("", 4, "best_of_4", "The prompt is empty"),
        (" \n", 4, "best_of_4", "The prompt is empty"),
        ("ab\ud800", 4, "best_of_4", "half of a character"),
        ("abcabcabc", 4, "best_of_4", "The prompt has 9 tokens, but the context holds 8; shorten it"),
        ("abc", 0, "best_of_4", "0 responses are asked for; ask for 1 to 256"),
        ("abc", 257, "best_of_4", "257 responses are asked for"),
        ("abc", 3, "best_of_4", "best_of_4 looks at 4 responses, but there are 3; ask for at least 4"),
        ("abc", 4, "bset_of_4", "'bset_of_4'.*Did you mean best_of_4"),
    ],
)
def test_bad_input_is_told_before_anything_is_drawn(session, text, num_samples, procedure, told):
    with pytest.raises(InputError, match=told):
        session.answer(sample.said(text), Asked(num_samples, procedure))


def test_a_temperature_of_one_request_is_its_own(session):
    cold = Asked(5, "sampling", Decoding(temperature=0.01))
    greedy = last(Drawn, session.answer(sample.said("abc"), cold)).responses
    assert all(len({response.text for response in of_side}) == 1 for of_side in greedy.values())
    narrow = Asked(5, "sampling", Decoding(top_p=1e-6))
    assert last(Drawn, session.answer(sample.said("abc"), narrow)).responses == greedy
    usual = last(Drawn, events(session)).responses
    assert len({response.text for response in usual["policy"]}) > 1, "the next request has the session's again"


def test_what_is_asked_for_by_default():
    def ask_for(num_samples=None, procedure=None, rewards=True):
        asked = sample.ask_for(config.Policy(procedure="best_of_8"), num_samples, procedure, rewards=rewards)
        return asked.num_samples, asked.procedure

    assert ask_for() == (8, "best_of_8")
    assert ask_for(procedure="best_of_2") == (4, "best_of_2")
    assert ask_for(9) == (9, "best_of_8")
    assert ask_for(1, rewards=False) == (1, "best_of_8")  # which picks nothing
    assert ask_for(rewards=False) == (4, "best_of_8")
    with pytest.raises(InputError, match="best_of_8 looks at 8 responses, but there are 7; ask for at least 8"):
        ask_for(7)
    with pytest.raises(InputError, match="'best'"):
        ask_for(procedure="best")


def test_a_long_prompt_is_cut_where_that_is_chosen():
    data = config.Data(prompt_length=8, response_length=LENGTH, long_prompts="truncate")
    found = sample.read_prompt(sample.said("abcabcabca"), Tokenizer(), data)
    assert Tokenizer().decode(found.prompts.tokens[0].tolist()) == "cabcabca"


def test_half_a_character_is_not_shown(params, mesh):
    class Halves(Tokenizer):
        """Two tokens a letter: an odd number ends in half of one."""

        def decode(self, ids):
            real = [i for i in ids if i >= 2]
            return "x" * (len(real) // 2) + "\ufffd" * (len(real) % 2)

    session = Session(EXPERIMENT, PARTS, mesh, Halves(), {"model": params["policy"]}, None, Decoding())
    for event in events(session):
        assert all("\ufffd" not in r.text for r in event.responses["model"] if r.state == "growing")


def test_the_terminal_shows_a_table_a_side(session, monkeypatch):
    tables = []
    monkeypatch.setattr(sample, "table", lambda *given: tables.append(given))
    monkeypatch.setattr(sample, "say", lambda text, style: tables.append(text))
    conversation = (Turn("user", "abc"), Turn("assistant", "d"), Turn("user", "e"))
    sample.print_responses(session, conversation, Asked(5, "best_of_4"))
    said, (policy, columns, rows), (reference, _, _) = tables
    assert (said, policy, reference) == ("e", "policy", "reference")
    assert columns == ["response (▸ best_of_4)", "raw", "calibrated", "transformed"]
    marked = [row[0].startswith("▸") for row in rows]
    assert marked.index(True) == np.argmax([row[1] for row in rows[:4]])
    assert sum(marked) == 1


def test_the_terminal_obeys_neither_a_response_nor_a_prompt(params, mesh, capsys):
    class Hostile(Tokenizer):
        def encode_prompt(self, conversation):
            return [2]

        def decode(self, ids):
            return "\x1b]0;owned\x07[bold]\u202e"

    session = Session(EXPERIMENT, PARTS, mesh, Hostile(), {"model": params["policy"]}, None, Decoding())
    sample.print_responses(session, sample.said("\x1b[2Ja[red]"), Asked(1, "sampling"))
    printed = capsys.readouterr().out
    assert r"\x1b[2Ja[red]" in printed and r"\x1b]0;owned\x07[bold]\u202e" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)


def test_white_space_of_a_plain_prompt_counts():
    assert sample.said(" abc\n")[0].content == "abc"
    assert sample.said(" abc\n", "plain")[0].content == " abc\n"
