import numpy as np
import pytest

from benchmarks.bench import Outcome, chosen, others_than_ours
from benchmarks.cases import (
    CASES,
    CONTENDERS,
    MODELS,
    Case,
    Sizes,
    even_share,
    prepare,
    prompt_tokens,
    read_sizes,
    spell,
)
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, weights


@pytest.fixture
def small(monkeypatch):
    sizes = Sizes(32, 16, 12, 2, 4, 2, tied=True, rope_theta=1e5)
    monkeypatch.setitem(MODELS, "small", sizes)
    return sizes


def test_the_shapes_are_those_of_the_models_they_are_named_for():
    # huggingface.co/HuggingFaceTB/SmolLM2-135M: 134,515,008 parameters.
    assert MODELS["smollm2"].parameters == 134_515_008
    # 2 · 4096 · 256 embeddings, and 4 layers of 4 · 256² + 3 · 256 · 688, with 9 norms.
    assert MODELS["tiny"].parameters == 2 * 4096 * 256 + 4 * (4 * 256**2 + 3 * 256 * 688) + 9 * 256


def test_the_written_directory_is_one_that_this_project_reads(small, tmp_path):
    folder = prepare("small", None, tmp_path)
    architecture = huggingface.architecture(folder, dtype="float32")
    params = weights.load(folder, architecture)
    assert sum(leaf.size for leaf in _leaves(params)) == small.parameters
    assert read_sizes(folder) == small
    assert architecture.layers[0].rotary[1] == pytest.approx(small.rope_theta ** (-2 / small.head_dim))


def test_a_directory_that_is_given_keeps_its_weights_and_loses_its_token_ids(small, tmp_path):
    given = prepare("small", None, tmp_path)
    folder = prepare("smollm2", given, tmp_path)
    assert (folder / "model.safetensors").resolve() == (given / "model.safetensors").resolve()
    assert huggingface.read_config(folder)["eos_token_id"] is None


def test_the_tokenizer_spells_tokens_as_numbers_and_ends_past_the_vocabulary(small, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(prepare("small", None, tmp_path) / "tokenizer.json"))
    tokens = [0, 31, 7, 7]
    assert tokenizer.encode(spell(tokens)).ids == tokens
    assert tokenizer.decode(tokens) == spell(tokens)
    assert tokenizer.token_to_id("<eos>") == small.vocabulary_size
    assert tokenizer.token_to_id("<pad>") == small.vocabulary_size + 1


def test_other_models_are_refused(small, tmp_path):
    folder = prepare("small", None, tmp_path)
    config = (folder / "config.json").read_text().replace('"llama"', '"qwen2"')
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match="qwen2"):
        read_sizes(folder)


def test_prompts_are_the_same_for_all_and_in_the_vocabulary():
    case = Case("sampling", "tiny", 3, 2, 50, 4, repeats=1, contenders=())
    tokens = prompt_tokens(case, 16)
    assert tokens.shape == (3, 50)
    assert set(np.unique(tokens)) == set(range(16))
    np.testing.assert_array_equal(tokens, prompt_tokens(case, 16))


def test_the_reward_is_the_share_of_even_tokens():
    np.testing.assert_allclose(even_share(np.array([[2, 4, 6, 8], [1, 2, 3, 5]])), [1.0, 0.25])


def test_every_case_knows_its_contenders():
    for case in CASES:
        assert set(case.contenders) <= set(CONTENDERS[case.task])
        assert case.model in MODELS
    # None: ctrl_jax chooses by itself.
    given = [contender.options["micro_batches"] or 1 for contender in CONTENDERS["step"].values()]
    assert all(case.prompts % count == 0 for case in CASES if case.task == "step" for count in given)


def test_options_choose_cases_and_contenders():
    everything = chosen(None, (), ())
    assert [case for case, _ in everything] == list(CASES)
    (case, names), *others = chosen("step", ("smollm2-8x4",), ("ctrl_jax", "trl_rloo_micro"))
    assert (case.task, case.shape, others) == ("step", "smollm2-8x4", [])
    assert set(names) == {"ctrl_jax", "trl_rloo_micro"}


@pytest.mark.parametrize(
    ("only", "shapes", "contenders", "said"),
    [
        (None, ("tiny-1x1",), (), "tiny-1x1"),
        (None, (), ("vllm",), "vllm"),
        ("sampling", ("smollm2-8x4",), (), "No case is left"),
    ],
)
def test_names_that_there_are_not_are_refused(only, shapes, contenders, said):
    with pytest.raises(InputError, match=said):
        chosen(only, shapes, contenders)


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]


def test_only_who_runs_the_same_model_is_timed():
    told = {"ctrl_jax": -3.0, "same": -3.0004, "another": -3.2, "silent": None, "failed": None}
    outcomes = {name: Outcome(name, name, "1", log_prob=value) for name, value in told.items()}
    outcomes["failed"].failure = "not installed"
    assert others_than_ours(outcomes, 1e-3) == ["another", "silent"]
    assert others_than_ours({"another": outcomes["another"]}, 1e-3) == []
    assert others_than_ours(outcomes, 0.5) == ["silent"]
