import json
import math

import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface
from tests.models.oracles import cases

FOUND = cases.read("configs")
LLAMA3 = cases.read("llama")["config"]["rope_parameters"]
WIDTH = 32  # of the recorded cases; they have 4 heads unless they say so
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@pytest.fixture
def read(tmp_path):
    def read_values(values, dtype="float32"):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return huggingface.architecture(tmp_path, dtype=dtype)

    return read_values


def found(name):
    given = FOUND[name]["given"]
    return given | {"architectures": [NAMES[given["model_type"]]]}


def config(name, **changes):
    return cases.read(name)["config"] | changes


def windows(architecture):
    return [layer.window for layer in architecture.layers]


@pytest.mark.parametrize("name", FOUND)
def test_what_a_file_leaves_out_is_as_in_transformers(read, name):
    # `read` is what transformers writes after reading `given`: every key, in the form of its version 5.
    assert FOUND[name]["given"] != FOUND[name]["read"]
    assert read(found(name)) == read(FOUND[name]["read"] | {"architectures": found(name)["architectures"]})


@pytest.mark.parametrize("name", FOUND)
def test_a_file_without_architectures_is_read_by_its_model_type(read, name):
    assert read(FOUND[name]["given"]) == read(found(name))


def test_llama(read):
    llama = read(config("llama"))
    assert (llama.vocabulary_size, llama.width, llama.mlp_width, len(llama.layers)) == (40, WIDTH, 48, 2)
    assert (llama.heads, llama.kv_heads, llama.head_dim) == (2, 2, 16)
    assert windows(llama) == [None, None]
    assert (llama.embedding_scale, llama.query_scale, llama.norm_epsilon) == (1.0, 16**-0.5, 1e-6)
    assert (llama.norm_offset, llama.post_norms, llama.query_key_norm) == (0.0, False, False)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.tied_embeddings) == (False,) * 4
    assert (llama.activation, llama.attention_softcap, llama.logits_softcap) == ("silu", None, None)
    biased = read(config("llama_biases"))
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias, biased.tied_embeddings) == (True,) * 4
    assert (biased.head_dim, biased.query_scale, biased.norm_epsilon) == (6, 6**-0.5, 1e-2)


def test_dtype_is_the_caller_s(read):
    assert read(config("llama", dtype="float16"), dtype="bfloat16").dtype == "bfloat16"


def test_rotary_frequencies_are_theta_to_the_minus_2i_over_d(read):
    (rotary,) = {layer.rotary for layer in read(config("qwen3")).layers}
    assert rotary == pytest.approx([10_000 ** (-2 * i / 10) for i in range(5)])


def test_linear_scaling_divides_all_frequencies(read):
    (rotary,) = {layer.rotary for layer in read(config("llama_biases")).layers}
    assert rotary == pytest.approx([10_000 ** (-2 * i / 6) / 2 for i in range(3)])


def test_llama3_scaling_divides_waves_longer_than_the_context_and_keeps_short_ones(read):
    (rotary,) = {layer.rotary for layer in read(config("llama")).layers}
    plain = [100 ** (-2 * i / 16) for i in range(8)]
    ratios = [frequency / unscaled for frequency, unscaled in zip(rotary, plain, strict=True)]
    waves = [32 * frequency / (2 * math.pi) for frequency in plain]  # in the context of 32
    assert waves[0] > 4 and ratios[0] == 1
    assert all(ratio == pytest.approx(1 / 8) for ratio, count in zip(ratios, waves, strict=True) if count < 1)
    between = [(count, ratio) for count, ratio in zip(waves, ratios, strict=True) if 1 < count < 4]
    assert len(between) == 2
    for count, ratio in between:
        share = (count - 1) / 3
        assert ratio == pytest.approx(share + (1 - share) / 8)


def test_windows_of_each_family(read):
    assert windows(read(config("mistral"))) == [4, 4]
    assert windows(read(config("mistral", sliding_window=None))) == [None, None]
    assert windows(read(config("qwen2"))) == [None, 4]  # from max_window_layers on
    assert windows(read(config("qwen2", use_sliding_window=False, layer_types=None))) == [None, None]
    assert windows(read(config("gemma2"))) == [4, None]
    assert windows(read(found("gemma 3 4b"))) == ([1024] * 5 + [None]) * 5 + [1024] * 4
    assert windows(read(found("gemma 3 1b"))) == [512, 512, None] * 3


def test_gemma(read):
    gemma = read(config("gemma2"))
    assert (gemma.embedding_scale, gemma.query_scale) == (WIDTH**0.5, 10**-0.5)
    assert (gemma.norm_offset, gemma.post_norms, gemma.query_key_norm) == (1.0, True, False)
    assert (gemma.attention_softcap, gemma.logits_softcap) == (3.0, 5.0)
    assert (gemma.activation, gemma.tied_embeddings) == ("gelu_tanh", True)
    gemma = read(found("gemma 3 4b"))
    assert (gemma.heads, gemma.kv_heads, gemma.head_dim, gemma.vocabulary_size) == (8, 4, 256, 262_208)
    assert (gemma.query_key_norm, gemma.attention_softcap, gemma.logits_softcap) == (True, None, None)
    local, general = gemma.layers[0].rotary, gemma.layers[5].rotary
    assert local == pytest.approx([10_000 ** (-2 * i / 256) for i in range(128)])
    assert general == pytest.approx([1_000_000 ** (-2 * i / 256) / 8 for i in range(128)])


def test_a_classifier_with_one_label_is_a_trunk_without_a_projection(read, tmp_path):
    trunk = read(config("llama_classifier"))
    assert trunk.tied_embeddings
    assert huggingface.is_classifier(tmp_path)
    read(config("llama"))
    assert not huggingface.is_classifier(tmp_path)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, 2),
        ({"id2label": None, "num_labels": 3}, 3),
    ],
)
def test_a_classifier_with_more_labels_is_refused(read, labels, count):
    with pytest.raises(InputError, match=rf"classifier with {count} labels.*num_labels=1"):
        read(config("llama_classifier", **labels))


def test_num_labels_alone_is_enough(read):
    assert read(config("llama_classifier", id2label=None, num_labels=1))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"architectures": ["PhiForCausalLM"]}, r"\['PhiForCausalLM'\].*LlamaForCausalLM, MistralForCausalLM"),
        ("llama", {"architectures": ["LlamaModel"]}, "'LlamaModel'"),
        ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ("gemma3", {"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3TextForSequenceClassification"),
        ("llama", {"architectures": None, "model_type": "gpt2"}, "model_type is 'gpt2'.*llama, mistral"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}.*unquantized"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope type is 'yarn'.*default, linear and llama3"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope type is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, r"rope_parameters\.factor is '2'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4 and high_freq_factor 4",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "one for each of full_attention, sliding_attention"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope_parameters is"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'.*silu"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("llama", {"vocab_size": 40.0}, r"vocab_size is 40\.0"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        ("mistral", {"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3"),
        ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1}, "32, which does not divide by.* = 3"),
        ("llama", {"head_dim": 7}, "head_dim is 7"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is .*num_hidden_layers is 2"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, r"layer_types\[1\] is 'linear_attention'"),
        ("qwen2", {"use_sliding_window": False}, r"layer_types\[1\] is 'sliding_attention'.*use_sliding_window"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1"),
        ("gemma2", {"sliding_window": None}, r"layer_types\[0\] is 'sliding_attention', but there is no"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
        ("llama", {"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ("llama", {"hidden_act": ""}, "hidden_act is ''"),
        ("llama", {"architectures": None, "model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ("llama_classifier", {"id2label": ["good"]}, r"id2label is \['good'\], not an object"),
        ("llama_classifier", {"id2label": None, "num_labels": "1"}, "num_labels is '1', not a whole number"),
        # Out of range: nothing is made of that size, and no number makes all scores or positions alike.
        ("llama", {"vocab_size": 2**31}, "vocab_size is 2147483648, not a whole number of at most 16,777,216"),
        ("llama", {"hidden_size": 2**31}, "hidden_size is 2147483648, not a whole number of at most"),
        ("llama", {"intermediate_size": 2**31}, "intermediate_size is 2147483648"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a whole number of at most 1,000"),
        ("llama", {"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
        ("llama", {"num_key_value_heads": 10**9}, "num_key_value_heads is 1000000000"),
        ("llama", {"head_dim": 2**40}, "head_dim is 1099511627776"),
        ("llama", {"hidden_size": 10**400}, r"hidden_size is 10*\.\.\.0*, not a whole number of at most"),
        ("gemma3", {"sliding_window_pattern": 10**9}, "sliding_window_pattern is 1000000000"),
        ("mistral", {"sliding_window": 2**40}, "sliding_window is 1099511627776"),
        ("qwen2", {"max_window_layers": 2**40}, "max_window_layers is 1099511627776"),
        ("llama", {"rms_norm_eps": 1e-300}, r"rms_norm_eps is 1e-300, not a number from 1e-12 to 1"),
        ("llama", {"rms_norm_eps": 1e300}, r"rms_norm_eps is 1e\+300"),
        (
            "mistral",
            {"rope_theta": 1e300, "rope_parameters": None},
            r"rope_theta is 1e\+300, not a number from 1 to 1e\+15",
        ),
        ("mistral", {"rope_theta": 10**400, "rope_parameters": None}, r"rope_theta is 10*\.\.\.0*, not a number"),
        ("mistral", {"rope_theta": math.nan, "rope_parameters": None}, "rope_theta is nan"),
        ("llama", {"rope_parameters": {"rope_theta": 1e300}}, r"rope_parameters\.rope_theta is 1e\+300"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, "rope_parameters.factor is 1e-300"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1e300}}, r"high_freq_factor is 1e\+300"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 1e-300}}, "low_freq_factor is 1e-300"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 1e300}},
            r"original_max_position_embeddings is 1e\+300",
        ),
        ("gemma2", {"query_pre_attn_scalar": 1e300}, r"query_pre_attn_scalar is 1e\+300"),
        ("gemma2", {"attn_logit_softcapping": 1e-300}, "attn_logit_softcapping is 1e-300, not a number from 0.1"),
        ("gemma2", {"final_logit_softcapping": 1e300}, r"final_logit_softcapping is 1e\+300"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_file_and_value(read, tmp_path, name, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read(config(name, **changes))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing.*Hugging Face directory"),
        (b'{"hidden_size": ', r"config\.json cannot be read as JSON: .*line 1"),
        (b"\xff\xfe", r"config\.json cannot be read as JSON: .*utf-8"),
        (b"[1, 2]", r"config\.json holds a list"),
        (b"9" * 5000, r"config\.json cannot be read as JSON: .*4300 digits"),
        (b"[" * 100_000 + b"]" * 100_000, r"config\.json cannot be read: RecursionError"),
        (b'{"rope_theta": 1e4, "rope_theta": 1e6}', "'rope_theta' is 10000.0 and 1000000.0 in one object"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        huggingface.read_config(tmp_path)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/config\.json is missing"):
        huggingface.read_config(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/config\.json is missing"):
        huggingface.read_config(tmp_path / "file")


def test_a_name_twice_with_one_value_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"rope_theta": 1e4, "rope_theta": 1e4}')
    assert huggingface.read_config(tmp_path) == {"rope_theta": 1e4}


@pytest.mark.parametrize("value", [0, -1, 2**40, "128", 4096.5, True])
def test_a_context_that_is_no_number_of_tokens_is_refused(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": value}))
    with pytest.raises(InputError, match="max_position_embeddings is"):
        huggingface.context(tmp_path)


def test_an_adapter_in_the_place_of_a_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json is missing.*PEFT adapter: give it as `model\.adapter`"):
        huggingface.read_config(tmp_path)


def test_padding_is_what_transformers_takes_for_it(tmp_path):
    def pad(**given):
        (tmp_path / "config.json").write_text(json.dumps(given))
        return huggingface.pad_token_id(tmp_path)

    assert pad(model_type="llama") is None
    assert pad(model_type="llama", pad_token_id=2) == 2
    assert pad(model_type="llama", pad_token_id=-1) == -1
    assert pad(model_type="gemma2") == pad(architectures=["Gemma3TextForSequenceClassification"]) == 0
    assert pad(model_type="gemma2", pad_token_id=None) is None
    for wrong in ("2", 2.0, True, [2]):
        with pytest.raises(InputError, match=r"config\.json: pad_token_id is .*, not a whole number"):
            pad(model_type="llama", pad_token_id=wrong)
