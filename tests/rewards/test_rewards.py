"""Rewards that are given and not trained: a function of texts, and a classifier's directory."""

import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from ctrl_jax import config
from ctrl_jax.config import Experiment
from ctrl_jax.data.conversations import Record, Turn
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, weights
from ctrl_jax.models.reward import RewardModel
from ctrl_jax.pipeline import directories, reward_model
from ctrl_jax.rewards import classifier, function
from ctrl_jax.rewards.named import named
from ctrl_jax.types import Prompts, Responses
from tests.models.oracles import chats
from tests.pipeline.pretrained import BYTES, CLASSIFIER, SPECIAL, write_model

# Compiling is what takes long here, and half of it optimises what runs once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONVERSATIONS = (
    (Turn("user", "Where do swifts sleep?"),),
    (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Name a river.")),
)
TRANSCRIPTS = (
    "\n\nHuman: Where do swifts sleep?\n\nAssistant:",
    "Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant:",
)
TEXTS = [["On the wing.", "In nests, and when they travel in the air", ""], ["Loire", "The Loire.", "é 🙂"]]
# Told apart by the ids and tokens alone, as in a run: the first token of a response is its number.
PROMPTS = Prompts(jnp.zeros((2, 4), jnp.int32), jnp.array([4, 2]), jnp.array([7, 3], jnp.uint32))
RESPONSES = Responses(jnp.arange(6, dtype=jnp.int32).reshape(2, 3, 1), jnp.ones((2, 3), jnp.int32))


@pytest.fixture(scope="module")
def run():
    """What the rewards take of a run: the texts behind prompts and responses, and a device."""
    by_id = dict(zip((7, 3), map(Record, CONVERSATIONS), strict=True))
    flat = [text for row in TEXTS for text in row]
    return SimpleNamespace(
        corpus=SimpleNamespace(
            format="chat",
            columns=(),
            values=lambda names: {},
            asked=lambda prompts: [by_id[i] for i in np.asarray(prompts.ids).tolist()],
            conversations=lambda prompts: [by_id[i].prompt for i in np.asarray(prompts.ids).tolist()],
            texts=lambda responses: [[flat[i] for i in row] for row in np.asarray(responses.tokens)[..., 0].tolist()],
        ),
        mesh=make_mesh(1),
        experiment=Experiment("rewards"),
    )


def reward_of(run, name):
    return function.reward(function.load(name), run.corpus)


def classifier_of(run, folder):
    return classifier.reward(folder, run.corpus, run.mesh, dtype="float32")


NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module into the current folder, and gives the name of a reward in it."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(body, module=None):
        module = module or f"rewards_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
        written.append(module)
        return f"{module}:reward"

    yield write
    for module in written:
        sys.modules.pop(module, None)


def test_a_function_gets_every_response_after_its_transcript(run, write):
    name = write("calls.append((prompts, responses)); return range(len(responses))\ncalls = []")
    reward = reward_of(run, name)
    scores = reward.score(PROMPTS, RESPONSES)
    np.testing.assert_array_equal(scores, [[0, 1, 2], [3, 4, 5]])
    assert scores.dtype == np.float32
    module = sys.modules[name.split(":")[0]]
    assert module.calls == [
        ([TRANSCRIPTS[0]] * 3 + [TRANSCRIPTS[1]] * 3, TEXTS[0] + TEXTS[1]),
    ]
    # In another order, by the prompts' ids.
    swapped = Prompts(PROMPTS.tokens, PROMPTS.lengths, PROMPTS.ids[::-1])
    reward.score(swapped, Responses(RESPONSES.tokens[::-1, :1], RESPONSES.lengths[:, :1]))
    assert module.calls[1] == ([TRANSCRIPTS[1], TRANSCRIPTS[0]], [TEXTS[1][0], TEXTS[0][0]])


def test_what_numpy_takes_as_numbers_is_a_reward(run, write):
    for values in ("[len(text) for text in responses]", "numpy.array([len(text) for text in responses])"):
        reward = reward_of(run, write(f"import numpy; return {values}"))
        np.testing.assert_array_equal(reward.score(PROMPTS, RESPONSES), [[len(text) for text in row] for row in TEXTS])


def test_another_source_is_another_reward(run, write):
    def stage(name):
        return reward_of(run, name).fingerprint

    name = write("return [1.0] * len(responses)")
    first = stage(name)
    assert stage(name) == first
    sys.modules.pop(name.split(":")[0])
    assert stage(name) == first, "imported again, by another process"
    write("return [1.0 + len(text) for text in responses]", module=name.split(":")[0])
    sys.modules.pop(name.split(":")[0])
    assert stage(name) != first
    assert stage(write("return [1.0] * len(responses)")) != first, "another name"


def test_a_module_that_it_imports_is_part_of_it(run, write, tmp_path):
    (tmp_path / "helper_of_a_reward.py").write_text("SIGN = 1")
    name = write("import helper_of_a_reward; return [float(len(text)) for text in responses]")
    first = reward_of(run, name).fingerprint
    (tmp_path / "helper_of_a_reward.py").write_text("SIGN = -1")
    with pytest.raises(InputError, match=r"has changed \(helper_of_a_reward\) since this process imported it"):
        reward_of(run, name)
    sys.modules.pop(name.split(":")[0])  # as another process
    assert reward_of(run, name).fingerprint != first


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0] * 5", r"shape \(5,\) for 6 responses; return one float for each"),
        ("return [[1.0]] * 6", r"shape \(6, 1\) for 6 responses"),
        ("return 1.0", r"shape \(\) for 6 responses"),
        ("return ['good'] * 6", r"what are not numbers \(.*good.*\); return a float each"),
        ("return (1.0 for _ in responses)", "what are not numbers"),
        ("return [[1.0], [1.0, 2.0]]", "what are not numbers"),
        ("return [0.0] * 4 + [float('nan'), 0.0]", "nan for response 4; return finite numbers"),
        ("return [0.0, float('-inf')] * 3", "-inf for response 1;"),
        ("return [1e39] * 6", r"1e\+39 for response 0;"),  # above what float32 holds
        ("return None", r"shape \(\) for 6 responses"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_no_reward_is_refused(run, write, body, message):
    name = write(body)
    reward = reward_of(run, name)
    with pytest.raises(InputError, match=message) as caught:
        reward.score(PROMPTS, RESPONSES)
    assert f"The reward {name} returned" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_rewards:reward",
            r"'no_such_rewards' cannot be imported from .* \(No module named.*Write module:name",
        ),
        ("json.nowhere:reward", r"'json\.nowhere' cannot be imported"),
        ("rewards.py:reward", "cannot be imported"),
        ("folder/rewards:reward", "no name of a module; write it as `import` would, without .py"),
        (":reward", "no name of a module"),
        ("json:reward", r"json has no function 'reward'; define reward\(prompts, responses\) there"),
        ("json:__name__", "json has no function '__name__'"),
        ("math:fsum", r"math has no Python source .*wrap it in a function of a \.py file"),
    ],
)
def test_a_name_without_a_function_is_refused(run, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    with pytest.raises(InputError, match=message) as caught:
        reward_of(run, name)
    assert f"reward_model.function is {name!r}" in str(caught.value)
    assert sys.path == path


def ids(text):
    """A text's tokens: the tokenizer has one for each byte and for each of its three control texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer.encode(text).ids


def padded(rows, size):
    """With a token that pads nothing: what is real is told by the lengths."""
    return jnp.array([[*row, *[65] * (size - len(row))] for row in rows]), jnp.array([len(row) for row in rows])


def test_a_classifier_reads_the_conversation_in_its_own_tokens(run, tmp_path):
    folder = write_model(tmp_path / "classifier", **CLASSIFIER)
    found = np.asarray(classifier_of(run, folder).score(PROMPTS, RESPONSES))

    written = [
        "<|im_start|>user\nWhere do swifts sleep?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
    ]
    # Each response beside its own copy of the prompt, at another padding.
    prompts, prompt_lengths = padded([ids(text) for text in written for _ in range(3)], 110)
    responses, lengths = padded([ids(f"{text}<|im_end|>\n") for row in TEXTS for text in row], 44)
    architecture = huggingface.architecture(folder, dtype="float32")
    params = {"trunk": weights.load(folder, architecture), "head": weights.load_reward_head(folder, architecture)}
    expected = jit(RewardModel(architecture).apply)(
        {"params": params},
        Prompts(prompts, prompt_lengths, jnp.zeros(6, jnp.uint32)),
        Responses(responses[:, None], lengths[:, None]),
    )
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=0, atol=1e-4)
    assert np.unique(found.round(3)).size == 6


def of_texts(folder):
    """Takes a directory's chat template away."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    return folder


def test_a_classifier_of_texts_reads_prompt_and_response_as_one(run, tmp_path):
    folder = of_texts(write_model(tmp_path / "classifier", **CLASSIFIER))
    asked = ["The film was", " Swifts sleep\n"]
    conversations = [(Turn("user", text),) for text in asked]
    corpus = SimpleNamespace(
        format="plain", conversations=lambda prompts: conversations, texts=lambda responses: TEXTS
    )  # fmt: skip
    found = classifier.reward(folder, corpus, run.mesh, dtype="float32").score(PROMPTS, RESPONSES)
    # The last letter stands for the response, so that an empty one has a token to be read at.
    rows = [ids(prompt + text) for prompt, of_prompt in zip(asked, TEXTS, strict=True) for text in of_prompt]
    before, before_lengths = padded([row[:-1] for row in rows], 64)
    last, lengths = padded([row[-1:] for row in rows], 4)
    architecture = huggingface.architecture(folder, dtype="float32")
    params = {"trunk": weights.load(folder, architecture), "head": weights.load_reward_head(folder, architecture)}
    expected = jit(RewardModel(architecture).apply)(
        {"params": params},
        Prompts(before, before_lengths, jnp.zeros(6, jnp.uint32)),
        Responses(last[:, None], lengths[:, None]),
    )
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", ["reward_model", "evaluation"])
def test_a_classifier_of_conversations_is_refused_for_plain_texts_before_anything_runs(option, tmp_path):
    folder = write_model(tmp_path / "classifier", num_hidden_layers=1, **CLASSIFIER)
    field, section = {
        "reward_model": ("reward_model.path", config.RewardModel(path=str(folder))),
        "evaluation": ("evaluation.judge", config.Evaluation(judge=str(folder))),
    }[option]
    rows = config.Data(source="files", path="rows.jsonl", format="plain")
    experiment = Experiment("plain", data=rows, **{option: section})
    with pytest.raises(InputError, match="chat template") as caught:
        directories.check_models(experiment)
    assert (caught.value.field, caught.value.value) == (field, str(folder))
    assert "`data.format=chat`" in caught.value.remedy
    directories.check_models(replace(experiment, data=replace(rows, format="chat")))
    of_texts(folder)
    directories.check_models(experiment)


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_a_classifier_scores_as_transformers_does(name, run, tmp_path):
    recorded = chats.read()[name]
    folder = chats.write(tmp_path / "classifier", name, recorded["tensors"])
    cases = [
        (tuple(Turn(*turn) for turn in prompt), replies, found["scores"])
        for prompt, replies, found in zip(chats.PROMPTS, chats.REPLIES, recorded["chats"], strict=True)
        if found
    ]
    conversations, texts, expected = zip(*cases, strict=True)
    corpus = SimpleNamespace(format="chat", conversations=lambda prompts: conversations, texts=lambda responses: texts)
    reward = classifier.reward(folder, corpus, run.mesh, dtype="float32")
    np.testing.assert_allclose(reward.score(PROMPTS, RESPONSES), expected, rtol=0, atol=2e-5)
    assert np.ptp(expected, axis=1).min() > 0.01, "the replies are told apart"


def test_the_score_is_read_before_padding_wherever_the_padding_is():
    """As transformers has it, also where the token that pads is the one that ends a turn, or stands within."""
    assert classifier._without_padding([5, 9, 6, 9, 9], 9) == [5, 9, 6]
    assert classifier._without_padding([5, 9, 6], 9) == [5, 9, 6]
    assert classifier._without_padding([5, 9, 6, 9], None) == [5, 9, 6, 9]
    assert classifier._without_padding([9, 9], 9) == [9]


@pytest.mark.parametrize(
    "rows",
    [
        [[[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6]], [[7, 8], [7, 9], [7, 8, 9]]],
        [[[1, 2, 3]], [[4, 5]]],
        [[[1, 2, 3], [1, 2, 3]], [[4, 5], [4, 5]]],
        [[[1, 2, 3], [1, 2]], [[4] * 40, [4] * 70]],
    ],
)
def test_sequences_are_divided_where_a_rows_part(rows):
    prompts, responses = classifier._divided(rows, PROMPTS.ids)
    for i, row in enumerate(rows):
        start = prompts.tokens[i][: prompts.lengths[i]].tolist()
        ends = [
            tokens[:length].tolist() for tokens, length in zip(responses.tokens[i], responses.lengths[i], strict=True)
        ]
        assert [start + end for end in ends] == row
        assert all(ends), "the last token, at which the score is read, is the response's"
        assert start and (min(map(len, ends)) == 1 or len({end[0] for end in ends}) > 1), "what is shared is read once"


def test_a_conversation_beyond_a_classifiers_context_is_refused(run, tmp_path):
    folder = write_model(tmp_path / "classifier", **CLASSIFIER, max_position_embeddings=80)
    with pytest.raises(InputError, match=r"has \d\d tokens of the classifier .*for 80 \(max_position_emb.*data\.resp"):
        classifier_of(run, folder).score(PROMPTS, RESPONSES)


def test_a_classifier_is_keyed_by_its_content(run, tmp_path):
    one = classifier_of(run, write_model(tmp_path / "one", **CLASSIFIER)).fingerprint
    assert classifier_of(run, write_model(tmp_path / "moved", **CLASSIFIER)).fingerprint == one
    other = write_model(tmp_path / "other", **CLASSIFIER, rms_norm_eps=1e-6)
    assert classifier_of(run, other).fingerprint != one
    template = tmp_path / "moved" / "tokenizer_config.json"
    template.write_text(template.read_text().replace("assistant", "model"))
    assert classifier_of(run, tmp_path / "moved").fingerprint != one, "it reads other tokens"


def test_a_language_model_is_no_classifier(run, tmp_path):
    folder = write_model(tmp_path / "given")
    with pytest.raises(InputError, match=r"config\.json is not a sequence classifier's; give one with a single label"):
        classifier_of(run, folder)


def test_two_labels_are_no_reward(run, tmp_path):
    folder = write_model(tmp_path / "given", **CLASSIFIER)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "BAD", "1": "GOOD"}}))
    with pytest.raises(InputError, match=r"given/config\.json: it is a classifier with 2 labels"):
        classifier_of(run, folder)


def test_a_classifier_without_its_head_or_tokenizer_is_refused(run, tmp_path):
    headless = write_model(tmp_path / "headless")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | CLASSIFIER))
    with pytest.raises(InputError, match=r"no tensor score\.weight, the head of a reward model"):
        classifier_of(run, headless)
    (headless / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        classifier_of(run, headless)
    with pytest.raises(InputError, match=r"nowhere.*config\.json|config\.json.*nowhere"):
        classifier_of(run, tmp_path / "nowhere")


def test_the_experiment_says_which_reward(tmp_path, run, write):
    def stage(**given):
        chosen = replace(run.experiment, reward_model=replace(run.experiment.reward_model, **given))
        given = SimpleNamespace(corpus=run.corpus, mesh=run.mesh, experiment=chosen, functions={})
        return reward_model.run(given, None).reward.fingerprint

    name = write("return [float(len(text)) for text in responses]")
    assert stage(function=name) == reward_of(run, name).fingerprint
    folder = write_model(tmp_path / "classifier", **CLASSIFIER)
    found = stage(path=str(folder))
    assert found == classifier_of(run, folder).fingerprint
    assert found.startswith("classifier-")


def test_a_text_names_a_directory_or_a_function(tmp_path, run, write):
    name, folder = write("return [1.0] * len(responses)"), write_model(tmp_path / "classifier", **CLASSIFIER)
    for text, expected in ((name, reward_of(run, name)), (str(folder), classifier_of(run, folder))):
        found = named(text, run.corpus, run.mesh, dtype="float32", field="evaluation.judge")
        assert (found.fingerprint, found.name) == (expected.fingerprint, text)
    with pytest.raises(InputError, match=r"evaluation\.judge is 'nowhere', which is neither a directory here"):
        named("nowhere", run.corpus, run.mesh, dtype="float32", field="evaluation.judge")


def test_a_function_at_hand_is_known_by_its_source(run):
    """As one of a notebook, which no module has."""

    def brevity(prompts, responses):
        return [-float(len(response)) for response in responses]

    def other(prompts, responses):
        return [float(len(response)) for response in responses]

    mine = function.given(brevity)
    assert mine.name == f"{__name__}:brevity" and mine.call is brevity
    reward = function.reward(mine, run.corpus)
    np.testing.assert_array_equal(reward.score(PROMPTS, RESPONSES), [[-len(text) for text in row] for row in TEXTS])

    def fingerprint(call, name=None):
        return function.reward(function.given(call, name), run.corpus).fingerprint

    assert fingerprint(brevity) == reward.fingerprint
    assert fingerprint(other, "brevity") != fingerprint(brevity, "brevity"), "another source of the same name"
    assert fingerprint(brevity, "brevity") != fingerprint(brevity, "brevity_2")
    assert function.given(brevity, "brevity").name == "__main__:brevity"


def test_a_callable_without_a_source_needs_a_name(run):
    without = eval("lambda prompts, responses: [0.0] * len(responses)")
    with pytest.raises(InputError, match="has no Python source to recognise it by; give it a name"):
        function.given(without)
    named_one = function.reward(function.given(without, "nothing"), run.corpus)
    assert named_one.fingerprint != function.reward(function.given(without, "nothing-2"), run.corpus).fingerprint
    with pytest.raises(InputError, match="which cannot be called"):
        function.given("brevity")
