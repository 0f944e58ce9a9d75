"""The trained policy in other tools' files: what is in them, and what is refused before anything is trained."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jinja2 import Environment
from safetensors.numpy import load_file, save_file

from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.data import pretrained_tokenizers, scored_responses
from ctrl_jax.data.conversations import messages
from ctrl_jax.devices import parameters
from ctrl_jax.models import huggingface, peft, weights
from ctrl_jax.pipeline import data, export_reward, reward_model, sft
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards import classifier
from ctrl_jax.runtime import platform
from ctrl_jax.steps import sampling
from tests.pipeline.pretrained import CONFIG, TEMPLATE
from tests.pipeline.test_train import contents
from tests.trained import ROOT, Pretrained

RANK, ALPHA = 2, 16.0  # the experiment's


def trained_factors(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The last checkpoint's adapter: layers_0.q_proj.a, ..."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((pretrained.work_dir / "checkpoints").absolute()) as manager:
        restored = manager.restore(3, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    prefix = "params.lora."
    return {name.removeprefix(prefix): np.asarray(x) for name, x in restored.items() if name.startswith(prefix)}


def export(pretrained: Pretrained, folder, *options):
    before = contents(pretrained.work_dir)
    # By the run's folder: config.json has the options of the experiment.
    by_address = replace(pretrained.command_line, experiment=str(pretrained.work_dir))
    code, printed, errors = by_address.run("export", "--output", str(folder), *options)
    assert code == 0, errors
    assert contents(pretrained.work_dir) == before
    assert str(folder) in printed
    return folder


@pytest.fixture(scope="module")
def merged(pretrained, tmp_path_factory):
    return export(pretrained, tmp_path_factory.mktemp("exports") / "merged")


@pytest.fixture(scope="module")
def adapter(pretrained, tmp_path_factory):
    return export(pretrained, tmp_path_factory.mktemp("exports") / "adapter", "--format", "adapter")


def test_merged_weights_are_those_of_the_base_and_the_checkpoint(pretrained, merged):
    """W + (alpha / rank) (A B)^T where there is an adapter, in the files' own [out, in], and W elsewhere."""
    factors = trained_factors(pretrained)
    stored, found = load_file(pretrained.base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert found.keys() == stored.keys()
    changed = set()
    for name, weight in stored.items():
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if f"layers_0.{projection}.a" in factors:
            product = factors[f"layers_0.{projection}.a"] @ factors[f"layers_0.{projection}.b"]
            np.testing.assert_allclose(found[name], weight + ALPHA / RANK * product.T, rtol=0, atol=1e-6)
            assert np.abs(found[name] - weight).max() > 1e-3
            changed.add(projection)
        else:
            np.testing.assert_array_equal(found[name], weight)
    assert changed == {"q_proj", "down_proj"}


def test_merged_is_a_whole_directory(pretrained, merged):
    assert {path.name for path in merged.iterdir()} == {path.name for path in pretrained.base.iterdir()}
    assert json.loads((merged / "config.json").read_text()) == json.loads((pretrained.base / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (pretrained.base / name).read_bytes()
    architecture = huggingface.architecture(merged, dtype="float32")
    weights.load(merged, architecture)
    assert weights.fingerprint(merged) != weights.fingerprint(pretrained.base)
    one, other = (
        pretrained_tokenizers.load(folder, embedding_rows=CONFIG["vocab_size"]) for folder in (merged, pretrained.base)
    )
    assert one.fingerprint == other.fingerprint


def test_the_adapter_is_that_of_the_checkpoint(pretrained, adapter):
    architecture = huggingface.architecture(pretrained.base, dtype="float32")
    _, found, settings, *_ = peft.load(adapter, architecture, base=pretrained.base)
    assert (settings.rank, settings.alpha, settings.targets) == (RANK, ALPHA, ("q_proj", "down_proj"))
    factors = trained_factors(pretrained)
    assert len(factors) == 4
    for name, expected in factors.items():
        layer, projection, key = name.split(".")
        np.testing.assert_array_equal(found[layer][projection][key], expected)
        assert np.abs(expected).max() > 0
    assert json.loads((adapter / peft.CONFIG).read_text())["base_model_name_or_path"] == str(pretrained.base)


def test_an_exported_adapter_is_where_the_next_run_starts(pretrained, merged, adapter, tmp_path, mesh):
    """--model.adapter gives the policy that was exported merged, on every device, and is another reference."""
    experiment = load_experiment(pretrained.command_line.experiment).experiment()
    further = replace(experiment, model=replace(experiment.model, adapter=str(adapter)))
    plain, adapted = (
        sft.run(prepare(Workspace(each, tmp_path / "run", tmp_path / "stages", mesh))) for each in (experiment, further)
    )
    expected = weights.load(merged, huggingface.architecture(merged, dtype="float32"))
    leaves = jax.tree.leaves(adapted.params["params"])
    for found, leaf in zip(leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-6)
        assert found.sharding.is_fully_replicated and len(found.sharding.device_set) == mesh.size
    assert jax.tree.structure(adapted.params["params"]) == jax.tree.structure(expected)
    assert adapted.stage != plain.stage


def test_an_adapter_with_a_head_of_its_own_starts_an_untied_model(pretrained, adapter, tmp_path, mesh):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    head = np.random.RandomState(0).standard_normal((CONFIG["vocab_size"], 32)).astype(np.float32)
    tensors = load_file(folder / peft.WEIGHTS) | {"base_model.model.lm_head.weight": head}
    save_file(tensors, folder / peft.WEIGHTS, {"format": "pt"})
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    experiment = load_experiment(pretrained.command_line.experiment).experiment()
    adapted = replace(experiment, model=replace(experiment.model, adapter=str(folder)))
    run = prepare(Workspace(adapted, tmp_path / "run", tmp_path / "stages", mesh))
    params = sft.run(run).params
    wanted = jax.eval_shape(lambda: parameters.init_decoder(run.models, mesh, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    np.testing.assert_array_equal(params["params"]["head"]["kernel"], head.T)
    embedding = load_file(pretrained.base / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["params"]["embedding"]["embedding"], embedding)


def test_peft_and_transformers_serve_one_policy(pretrained, merged, adapter):
    library = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversation = [{"role": "user", "content": "What is 70 + 141?"}]
    text = AutoTokenizer.from_pretrained(merged).apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    tokens = AutoTokenizer.from_pretrained(merged)(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert len(tokens[0]) == len("xuser\nWhat is 70 + 141?x\nxassistant\n"), "a token a byte, and one a control text"

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits.numpy()

    base = AutoModelForCausalLM.from_pretrained(pretrained.base, dtype="float32")
    before = logits(base)
    adapted = logits(library.PeftModel.from_pretrained(base, adapter))
    np.testing.assert_allclose(
        logits(AutoModelForCausalLM.from_pretrained(merged, dtype="float32")), adapted, rtol=0, atol=2e-4
    )
    assert np.abs(adapted - before).max() > 0.01


@pytest.fixture(scope="module")
def reward(pretrained, tmp_path_factory):
    return export(pretrained, tmp_path_factory.mktemp("exports") / "reward", "--format", "reward")


@pytest.fixture(scope="module")
def rewarded(pretrained, tmp_path_factory, mesh):
    """(the run, its reward, prompts [8], responses [8, 2] of held-out pairs, and which of these are finished)"""
    experiment = load_experiment(pretrained.command_line.experiment).experiment()
    work_dir = tmp_path_factory.mktemp("rewarded") / "run"
    run = prepare(Workspace(experiment, work_dir, pretrained.stages_dir, mesh))
    pairs = data.pairs(run.corpus, "test").examples
    prompts, responses = jax.tree.map(lambda x: np.asarray(x)[:8], (pairs.prompts, pairs.responses))
    ended = np.asarray(sampling.ended(jax.tree.map(jnp.asarray, responses), run.corpus.tokenizer.eos_ids))
    assert ended.sum() > 8
    return run, reward_model.run(run, sft.run(run)).reward, prompts, responses, ended


def test_the_reward_model_is_a_classifier_with_its_scores(rewarded, reward):
    """Read as any classifier is: the texts in its own template and tokens, of which it says which are padding."""
    run, own, prompts, responses, ended = rewarded
    expected = np.asarray(own.score(prompts, responses))
    found = classifier.reward(reward, run.corpus, run.mesh, dtype="float32").score(prompts, responses)
    # A template ends a response that was cut off.
    np.testing.assert_allclose(np.asarray(found)[ended], expected[ended], rtol=0, atol=2e-4)
    assert np.ptp(expected, axis=1).min() > 2e-3, "the responses are told apart"
    assert huggingface.pad_token_id(reward) not in run.corpus.tokenizer.eos_ids


def variant(pretrained, folder, **settings):
    """The base with other settings of its tokenizer."""
    base = shutil.copytree(pretrained.base, folder)
    known = json.loads((base / "tokenizer_config.json").read_text())
    changed = {name: value for name, value in {**known, **settings}.items() if value is not None}
    (base / "tokenizer_config.json").write_text(json.dumps(changed))
    return base


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_token_that_ends_replies_is_no_padding_there(pretrained, rewarded, reward, tmp_path, pad):
    """SmolLM2 pads with the token that ends a turn, and its classifier's scores would be read before it. Llama has no
    pad token."""
    base = variant(pretrained, tmp_path / "base", pad_token=pad)
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": pad or "<|im_end|>"}}))
    expected = ("<|im_start|>", 256)
    assert pretrained_tokenizers.padding_token(base, embedding_rows=264, ends=[257]) == expected
    assert pretrained_tokenizers.padding_token(base, embedding_rows=264, ends=[256, 257, 258]) is None
    run, own, prompts, responses, ended = rewarded
    files, padding = export_reward._beside(run, base)
    assert padding == 256
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads(files[name])["pad_token"] == "<|im_start|>"
    # The weights as they were exported, with these files.
    folder = shutil.copytree(reward, tmp_path / "reward")
    for name, written in files.items():
        (folder / name).write_bytes(written)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": padding}))
    found = classifier.reward(folder, run.corpus, run.mesh, dtype="float32").score(prompts, responses)
    np.testing.assert_allclose(np.asarray(found)[ended], own.score(prompts, responses)[ended], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEMPLATE + "\n",
        "\n" + TEMPLATE,
        "  {% if true %}\n" + TEMPLATE + "{% endif %}\n\n",
        "{{ bos_token }}" + TEMPLATE + "  ",
        "{%- for m in messages -%}{{ m.role + ' ' + m.content + '<|im_end|>' }}\n{%- endfor %}",
    ],
)
def test_the_template_is_the_policys_but_for_space_behind_the_last_turn(pretrained, rewarded, tmp_path, template):
    base = variant(pretrained, tmp_path / "base", chat_template=template)
    run, *_ = rewarded
    files, _ = export_reward._beside(run, base)
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    before, after = (environment.from_string(one) for one in (template, files["chat_template.jinja"].decode()))
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}]
    given = {"bos_token": "<s>"}
    assert after.render(messages=turns, **given) == before.render(messages=turns, **given).rstrip()
    asked = {"messages": turns[:1], "add_generation_prompt": True, **given}
    assert after.render(**asked) == before.render(**asked)


@pytest.mark.parametrize(("template", "said"), [(TEMPLATE, False), (TEMPLATE + "<|pad|>", True)])
def test_a_template_that_ends_elsewhere_is_said(pretrained, rewarded, tmp_path, capsys, template, said):
    run, *_ = rewarded
    base = variant(pretrained, tmp_path / "base", chat_template=template)
    for name, written in export_reward._beside(run, base)[0].items():
        (base / name).write_bytes(written)
    export_reward._say_where_it_ends(run, base)
    assert ("does not end where a reply ends" in " ".join(capsys.readouterr().out.split())) == said


def test_the_references_rewards_are_beside_it(pretrained, rewarded, reward):
    run, *_ = rewarded
    found = scored_responses.read(reward / "calibration.jsonl", ["rewards"], texts=False)
    (stage,) = pretrained.stages_dir.glob("calibration-*")
    np.testing.assert_array_equal(found.values["rewards"], np.sort(np.load(stage / "rewards.npy"), axis=1))
    prompts = run.corpus.prompts("train", 8).prompts
    assert [record.prompt for record in found.records] == run.corpus.conversations(prompts)


def test_transformers_gives_the_same_scores(rewarded, reward):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, own, prompts, responses, ended = rewarded
    expected = np.asarray(own.score(prompts, responses))
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward)
    chats = [
        [*messages(asked), {"role": "assistant", "content": text}]
        for asked, texts in zip(run.corpus.conversations(prompts), run.corpus.texts(responses), strict=True)
        for text in texts
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert (np.asarray(batch.attention_mask) == 0).any(), "rows are of several lengths"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    with torch.no_grad():
        found = model.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].numpy()
    np.testing.assert_allclose(found.reshape(expected.shape)[ended], expected[ended], rtol=0, atol=2e-4)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls `export` with bad input, and returns what it says."""
    monkeypatch.chdir(ROOT)
    # It would serve the tests that come after, too.
    monkeypatch.setattr(platform, "setup_compilation_cache", lambda directory: directory)

    def call(experiment, *options):
        runs = tmp_path / "runs"
        code = command_line.main(["export", str(experiment), *options, "--runs-dir", str(runs), "--devices", "1"])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert "Traceback" not in printed.err
        assert not runs.exists(), "nothing was claimed, read or trained"
        return printed.err

    return call


def test_a_model_from_scratch_is_refused(refused):
    assert "only the policy of an experiment with a --model.path can be exported" in refused("smoke")


def test_a_reward_that_is_no_classifier_is_refused(refused, pretrained, tmp_path):
    file, form = pretrained.command_line.experiment, ("--format", "reward")
    assert "only the reward model of an experiment with a --model.path" in refused("smoke", *form)
    assert "--reward-model.linear reads the mean" in refused(file, *form, "--reward-model.linear")
    told = refused(file, *form, "--reward-model.members", "2")
    assert "--reward-model.members is 2" in told and "train one." in told
    told = refused(file, *form, "--reward-model.function", "experiments.rewards.brevity:words")
    assert "is --reward-model.function, which was not trained here" in told
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(file, *form, "--output", str(tmp_path / "full"))


def test_a_folder_with_files_is_refused(refused, pretrained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    file = pretrained.command_line.experiment
    for form in ("merged", "adapter"):
        told = refused(file, "--output", str(tmp_path / "full"), "--format", form)
        assert f"{tmp_path / 'full'} exists and is not empty. Delete it, or save to another place." in told
    assert "not empty" in refused(file, "--output", str(tmp_path / "full" / "notes.txt"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_an_adapter_that_is_not_the_whole_difference_is_refused(refused, pretrained, adapter):
    file, form = pretrained.command_line.experiment, ("--format", "adapter")
    assert "--model.lora.rank is 0: all weights were trained. Export merged" in refused(
        file, *form, "--model.lora.rank", "0"
    )
    assert "(--sft.steps)" in refused(file, *form, "--sft.steps", "50")
    told = refused(file, *form, "--model.adapter", str(adapter))
    assert "an adapter of its own (--model.adapter), merged. Export merged." in told
