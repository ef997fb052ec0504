"""ModelConfig from GGUF metadata."""

from __future__ import annotations

import math

import pytest
import torch

from qsun.errors import CheckpointError, UnsupportedModel
from qsun.models.gguf_config import model_config_from_gguf
from qsun_kernels import RopeParameters

METADATA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 128,
    "llama.feed_forward_length": 96,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": 50,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 7,
}


def read(tensors=("output.weight",), factors=None, **changes):
    """Read changed metadata; underscores of keywords stand for dots, ... takes an entry away."""
    merged = dict(METADATA)
    for key, value in changes.items():
        merged[key.replace("__", ".")] = value
    merged = {key: value for key, value in merged.items() if value is not ...}
    return model_config_from_gguf(merged, tensors, factors, "x.gguf")


def llama3_factors(factor: float, head_dim: int, theta: float) -> torch.Tensor:
    """The divisors as llama.cpp's converter computes them for Llama 3.x, one frequency at a time."""
    low, high, context = 1.0, 4.0, 8192
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(out)


def test_a_plain_llama():
    config = read()
    assert (config.architecture, config.hidden_size, config.num_layers, config.head_dim) == (
        "llama",
        64,
        2,
        16,
    )
    assert (config.num_q_heads, config.num_kv_heads, config.vocab_size) == (4, 2, 50)
    assert config.rope == RopeParameters(500000.0)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert not config.tie_word_embeddings and config.dtype is None
    assert read(tensors=()).tie_word_embeddings


def test_biases_and_norms_are_told_by_the_tensors():
    config = read(tensors=("blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"))
    assert config.attention_bias and config.qk_norm
    assert not (config.attention_output_bias or config.mlp_bias)


def test_vocabulary_size_from_the_tokens():
    config = read(llama__vocab_size=..., tokenizer__ggml__tokens=["a"] * 40)
    assert config.vocab_size == 40


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequency_factors_of_llama_3_are_recognised(factor):
    config = read(factors=llama3_factors(factor, 16, 500000.0))
    assert config.rope == RopeParameters(
        500000.0,
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def test_frequency_factors_of_one_are_no_scaling():
    assert read(factors=torch.ones(8)).rope == RopeParameters(500000.0)


def test_scaling_entries():
    linear = read(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert linear.rope == RopeParameters(500000.0, kind="linear", factor=2.0)
    yarn = read(
        **{
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
        }
    )
    assert yarn.rope == RopeParameters(500000.0, kind="yarn", factor=4.0, original_max_position_embeddings=32)


UNSUPPORTED = [
    (
        {"general.architecture": "gemma2"},
        None,
        "general.architecture is 'gemma2', expected one of llama, qwen2, qwen3",
    ),
    ({"llama.expert_count": 8}, None, "llama.expert_count is 8, expected 0"),
    ({"llama.attention.sliding_window": 4096}, None, "llama.attention.sliding_window is 4096, expected 0"),
    ({"llama.rope.dimension_count": 8}, None, "rope.dimension_count is 8, expected the head size 16"),
    ({"llama.attention.value_length": 32}, None, "attention.value_length is 32, expected the head size 16"),
    (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
        None,
        "rope_type is 'longrope'",
    ),
    (
        {"llama.rope.scaling.attn_factor": 1.5},
        None,
        "llama.rope.scaling.attn_factor is 1.5, expected its absence",
    ),
    ({}, torch.linspace(1, 3, 8), "rope_freqs.weight .* reaches 3, expected ones or the divisors of Llama 3"),
    ({}, llama3_factors(8.0, 32, 500000.0), "rope_freqs.weight .16,. reaches 8"),
    (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        torch.ones(8),
        "rope_freqs.weight stands beside llama.rope.scaling.type 'linear', expected one of them",
    ),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "factors", "message"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_unsupported_files_are_refused_by_name(changes, factors, message):
    with pytest.raises(UnsupportedModel, match=f"x.gguf.*{message}"):
        read(factors=factors, **changes)


LIES = [
    ({"llama.block_count": ...}, "llama.block_count is missing, expected an integer"),
    ({"llama.block_count": 2**40}, "llama.block_count is 1099511627776, expected an integer from 1 to 4096"),
    ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\], expected an integer"),
    ({"llama.attention.head_count_kv": 3}, "num_q_heads is 4, expected a multiple of 3 KV heads"),
    (
        {"llama.attention.layer_norm_rms_epsilon": math.inf},
        "layer_norm_rms_epsilon is inf, expected a finite number",
    ),
    ({"tokenizer.ggml.eos_token_id": 50}, "special token 50 is outside the vocabulary of 50"),
    ({"tokenizer.ggml.tokens": 50}, "tokenizer.ggml.tokens is 50, expected a list of tokens"),
    ({"llama.vocab_size": ...}, "llama.vocab_size is None, expected an integer"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("changes", "message"), LIES, ids=lambda value: str(value)[:40])
def test_lies_are_named(changes, message):
    with pytest.raises(CheckpointError, match=f"x.gguf.*{message}"):
        read(**changes)
