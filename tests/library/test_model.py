"""Models from directories and their texts."""

import json

import jax
import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.data.conversations import Turn
from tests.pipeline.pretrained import CLASSIFIER, write_model

pytestmark = pytest.mark.usefixtures("compile_fast")

PROMPTS = ["What is 1 + 1?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]]


def test_texts_are_in_the_order_of_the_prompts(model):
    texts = cj.generate(model, PROMPTS, num_samples=3, max_length=8)
    assert [len(row) for row in texts] == [3, 3]
    assert all(isinstance(text, str) for row in texts for text in row)
    # A text depends on its prompt, its index and the seed alone.
    assert cj.generate(model, PROMPTS[::-1], num_samples=2, max_length=8) == [row[:2] for row in texts[::-1]]
    assert cj.generate(model, [PROMPTS[0], *PROMPTS], num_samples=3, max_length=8) == [texts[0], *texts]
    assert cj.generate(model, PROMPTS, num_samples=3, max_length=8, seed=1) != texts
    assert cj.generate(model, [], num_samples=3) == []


def test_batches_and_devices_change_no_text(model, folder, monkeypatch):
    prompts = [f"What is {i}?" for i in range(5)]
    texts = cj.generate(model, prompts, num_samples=2, max_length=8)
    monkeypatch.setattr("ctrl_jax.library.model.prompts_at_a_time", lambda *_: 2)
    assert cj.generate(model, prompts, num_samples=2, max_length=8) == texts
    assert cj.generate(cj.load_model(folder, devices=2), prompts, num_samples=2, max_length=8) == texts


def test_texts_follow_the_models_law(folder, tmp_path):
    """With all weights 0 but a bias towards none, each byte is as likely as any other: lengths are geometric."""
    model = cj.load_model(folder, devices=1)
    object.__setattr__(model, "load", lambda: jax.tree.map(np.zeros_like, cj.load_model(folder).params))
    texts = cj.generate(model, ["Hi"], num_samples=400, max_length=1)[0]
    # Of 264 ids 256 are bytes, of which 95 print as themselves and 1 is a space: the rest decodes to other texts.
    printable = np.mean([len(text) == 1 and "!" <= text <= "~" for text in texts])
    assert printable == pytest.approx(94 / 264, abs=4 * np.sqrt(94 / 264 * 170 / 264 / 400))


def test_greedy_texts_are_equal(model):
    (row,) = cj.generate(model, ["Hello"], num_samples=4, max_length=8, temperature=1e-3)
    assert len(set(row)) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompts": "Hello"}, r"prompts is one text, 'Hello'"),
        ({"prompts": ["Hello", ""]}, r"prompts\[1\]"),
        ({"prompts": ["Hello", 3]}, r"prompts\[1\]"),
        ({"prompts": [[{"role": "user"}]]}, r"prompts\[0\]"),
        ({"prompts": [[{"role": "assistant", "content": "Hi"}]]}, r"prompts\[0\]"),
        ({"prompts": ["x" * 200]}, "max_length is 8"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_input_of_generate(model, options, match):
    with pytest.raises(cj.InputError, match=match) as raised:
        cj.generate(model, **{"prompts": ["Hello"], "max_length": 8, **options})
    assert "--" not in str(raised.value)


def test_bad_models(tmp_path, folder):
    with pytest.raises(cj.InputError, match=r"path is '.*nowhere'"):
        cj.load_model(tmp_path / "nowhere")
    with pytest.raises(cj.InputError, match="sequence classifier"):
        cj.load_model(write_model(tmp_path / "classifier", num_hidden_layers=1, **CLASSIFIER))
    with pytest.raises(cj.InputError, match="dtype is 'float16'"):
        cj.load_model(folder, dtype="float16")  # type: ignore[arg-type]
    broken = write_model(tmp_path / "broken", num_hidden_layers=1)
    config = json.loads((broken / "config.json").read_text()) | {"hidden_size": 64}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(cj.InputError, match="64"):
        cj.load_model(broken)


def test_settings_that_change_draws_are_refused(folder):
    with jax.enable_x64(True), pytest.raises(cj.InputError, match="jax_enable_x64 is True"):
        cj.load_model(folder)


def test_a_plain_model_continues_texts_as_they_are(folder):
    """Bytes are its tokens, so that each character of a prompt is one, and nothing is around them."""
    plain = cj.load_model(folder, devices=1, format="plain")
    assert len(plain.tokenizer.encode_prompt((Turn("user", " Hello "),))) == len(" Hello ")
    texts = cj.generate(plain, ["Hello", "Hello ", "\n\nHuman: Hello"], num_samples=2, max_length=8)
    assert texts[0] != texts[1] and [len(row) for row in texts] == [2, 2, 2]
    with pytest.raises(cj.InputError, match=r"prompts\[1\]: 'prompt' is a list") as caught:
        cj.generate(plain, ["Hello", PROMPTS[1]])
    assert caught.value.field == "data.format"
    with pytest.raises(cj.InputError, match="format is 'html'"):
        cj.load_model(folder, format="html")  # type: ignore[arg-type]
