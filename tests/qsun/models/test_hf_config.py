"""config.json read and written: spellings, defaults, windows, and what is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.models.hf_config import hf_config_from_model, model_config_from_hf
from qsun_kernels import RopeParameters

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 500000.0,
}


def read(raw: dict, **changes):
    """Read a changed config; a value of ... takes the field away."""
    merged = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    return model_config_from_hf(merged, "config.json")


def test_a_plain_llama():
    config = read(LLAMA, dtype="bfloat16", eos_token_id=[2, 5], bos_token_id=1, rms_norm_eps=1e-5)
    assert config.architecture == "llama"
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 96, 96)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert (config.q_size, config.kv_size) == (64, 32)
    assert config.rope == RopeParameters(500000.0)
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_ids, config.rms_norm_eps) == (1, (2, 5), 1e-5)
    assert config.windows == (None, None, None)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias or config.qk_norm)


def test_defaults_where_the_file_is_silent():
    config = read(LLAMA, num_key_value_heads=..., max_position_embeddings=..., rope_theta=..., head_dim=None)
    assert (config.num_kv_heads, config.max_position_embeddings, config.head_dim) == (4, 2048, 16)
    assert config.rope == RopeParameters(10000.0)
    assert config.dtype is None and config.bos_token_id is None and config.eos_token_ids == ()
    assert read({**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_both_spellings_of_rotary_parameters(old, new):
    spelt_old = read(LLAMA, **old)
    spelt_new = read(LLAMA, rope_theta=..., rope_parameters={"rope_theta": 500000.0, **new})
    assert spelt_old == spelt_new
    assert spelt_old.rope.kind == new["rope_type"]


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("qwen2", {}, (None, None, None)),
        ("qwen2", {"sliding_window": 8}, (None, None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (None, None, 8)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 3),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
        ("mistral", {}, (4096,) * 3),
        ("mistral", {"sliding_window": None}, (None,) * 3),
        ("mistral", {"sliding_window": 16}, (16,) * 3),
        ("llama", {"sliding_window": 16}, (None,) * 3),
    ],
)
def test_windows(model_type, changes, windows):
    assert read({**LLAMA, "model_type": model_type, "architectures": ...}, **changes).windows == windows


@pytest.mark.parametrize(
    ("model_type", "changes", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("mistral", {}, (False, False, False)),
    ],
)
def test_biases(model_type, changes, biases):
    config = read({**LLAMA, "model_type": model_type, "architectures": ...}, **changes)
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == biases


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_written_config_reads_back_and_is_what_transformers_writes(tiny, kind):
    import json

    raw = json.loads((tiny(kind).path / "config.json").read_text())
    config = model_config_from_hf(raw, "config.json")
    written = hf_config_from_model(config)
    assert model_config_from_hf(written, "written") == config
    assert {key: raw[key] for key in written if key in raw and key != "rope_parameters"} == {
        key: value for key, value in written.items() if key in raw and key != "rope_parameters"
    }


def test_writing_refuses_what_the_architecture_has_no_words_for():
    config = dataclasses.replace(read(LLAMA), windows=(None, 8, None))
    with pytest.raises(
        UnsupportedModel, match=r"windows=\(None, 8, None\).*expected one that a llama config"
    ):
        hf_config_from_model(config)


UNSUPPORTED = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral', expected one of llama, qwen2, qwen3, mistral"),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification.*expected LlamaForCausalLM",
    ),
    ({"num_local_experts": 8}, "num_local_experts is 8, expected 0"),
    ({"num_experts": 64}, "num_experts is 64, expected 0"),
    ({"rope_interleaved": True}, "rope_interleaved is True, expected False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic', expected one of default, linear",
    ),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "rope_type is 'mrope'"),
    (
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e4},
                "sliding_attention": {"rope_theta": 1e5},
            }
        },
        "expected one set of parameters for all layers",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25",
    ),
    ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', expected one of float32, float16, bfloat16"),
    (
        {"model_type": "mistral", "architectures": ..., "layer_types": ["full_attention"] * 3},
        "layer_types is .*'full_attention'.*expected one kind that agrees with sliding_window 4096",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=lambda value: str(value)[:50])
def test_unsupported_models_are_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModel, match=f"config.json.*{message}"):
        read(LLAMA, **changes)


LIES = [
    ({"model_type": ...}, "model_type is missing, expected a string"),
    ({"hidden_size": ...}, "hidden_size is missing, expected an integer from 1"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected an integer from 1"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0, expected an integer from 1"),
    ({"hidden_size": True}, "hidden_size is True, expected an integer from 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer from 1 to 4096"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected an integer from 1 to 4096"),
    ({"vocab_size": -1}, "vocab_size is -1, expected an integer from 1"),
    ({"num_key_value_heads": 3}, "num_q_heads is 4, expected a multiple of 3 KV heads"),
    ({"head_dim": 15}, "head_dim is 15, expected an even number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a number between 0 and 1"),
    ({"rope_theta": 0.0}, "theta is 0.0, expected a positive finite number"),
    ({"rope_theta": "big"}, "theta is 'big', expected a number"),
    ({"rope_scaling": {"type": "linear"}}, r"lacks \['factor'\]"),
    ({"rope_theta": 10**400}, "rope_theta is 10+, expected a finite number"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10+, expected a finite number"),
    (
        {"max_position_embeddings": 2**30},
        "max_position_embeddings 1073741824, expected at most 4096 and 16777216",
    ),
    ({"rope_scaling": {"type": ["linear"]}}, r"rope_type is \['linear'\], expected a string"),
    ({"rope_scaling": ["linear", 2.0]}, "rope_scaling is .*, expected an object"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1.0}}, r"unknown keys \['alpha'\]"),
    ({"eos_token_id": 96}, "special token 96 is outside the vocabulary of 96"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected an integer from 0, or a list"),
    ({"bos_token_id": -1}, "bos_token_id is -1, expected an integer from 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    (
        {"architectures": "LlamaForCausalLM"},
        "architectures is 'LlamaForCausalLM', expected a list of strings",
    ),
    ({"layer_types": ["full_attention"] * 2}, "layer_types is .*, expected 3 times"),
    ({"layer_types": ["linear_attention"] * 3}, "layer_types is .*'linear_attention'.*expected 3 times"),
    (
        {"model_type": "qwen3", "architectures": ..., "layer_types": ["sliding_attention"] * 3},
        "layer_types is .*, expected no 'sliding_attention', because sliding_window is off",
    ),
    (
        {"model_type": "qwen2", "architectures": ..., "use_sliding_window": True, "sliding_window": 0},
        "sliding_window is 0, expected an integer from 1",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "message"), LIES, ids=lambda value: str(value)[:50])
def test_lies_are_named(changes, message):
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        read(LLAMA, **changes)
