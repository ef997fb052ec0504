"""rope_cache and RopeParameters: bit for bit the angles of transformers, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qsun_kernels import RopeParameters, rope_cache
from qsun_kernels.ops.rope_cache import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
CONFIGURATIONS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048},
    YARN,
    YARN | {"attention_factor": 1.25},
    YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    YARN | {"factor": 1.0},
]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_angles_are_those_of_transformers_bit_for_bit(configuration: dict[str, Any], head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=16384,
        rope_parameters=dict(configuration),
    )
    params = RopeParameters.from_mapping(configuration)
    inverse, attention_factor = inverse_frequencies(params, head_dim)
    if params.kind != "default":
        expected, factor = ROPE_INIT_FUNCTIONS[params.kind](config, torch.device("cpu"))
        assert torch.equal(inverse, expected)
        assert attention_factor == factor
    positions = torch.cat((torch.arange(2000), torch.arange(16000, 16384)))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    table = rope_cache(params, head_dim, 16384)
    assert table.shape == (16384, head_dim)
    assert table.dtype == torch.float32
    half = head_dim // 2
    assert torch.equal(table[positions, :half], cos[0, :, :half])
    assert torch.equal(table[positions, half:], sin[0, :, half:])


def test_default_by_hand() -> None:
    table = rope_cache(RopeParameters(100.0), 4, 3)
    assert table[2].tolist() == pytest.approx(
        [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)], abs=1e-6
    )


def test_no_positions() -> None:
    assert rope_cache(RopeParameters(100.0), 4, 0).shape == (0, 4)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    plain, _ = inverse_frequencies(RopeParameters(500000.0), 128)
    scaled, _ = inverse_frequencies(RopeParameters.from_mapping(LLAMA3), 128)
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.equal(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_old_spellings_are_read() -> None:
    assert RopeParameters.from_mapping(None, theta=10000.0) == RopeParameters(10000.0)
    assert RopeParameters.from_mapping({}, theta=7.0) == RopeParameters(7.0)
    old = {"type": "linear", "factor": 2.0}
    assert RopeParameters.from_mapping(old, theta=10000.0) == RopeParameters(10000.0, "linear", 2.0)
    both = {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 5.0}
    assert RopeParameters.from_mapping(both, theta=10000.0) == RopeParameters(5.0, "linear", 2.0)


def test_yarn_takes_its_context_from_the_model() -> None:
    given = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    read = RopeParameters.from_mapping(given, theta=1e6, max_position_embeddings=16384)
    assert read.factor == 4.0
    assert read.original_max_position_embeddings == 4096


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("mapping", "fragments"),
    [
        ({"rope_type": "longrope"}, ["rope_type is 'longrope'", "expected one of", "'llama3'"]),
        ({"rope_type": "linear"}, ["linear lacks ['factor']"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["llama3 lacks", "low_freq_factor", "high_freq_factor"]),
        ({"rope_type": "linear", "factor": 0.0}, ["factor is 0.0", "positive finite"]),
        ({"rope_type": "linear", "factor": math.nan}, ["factor is nan", "positive finite"]),
        ({"rope_type": "linear", "factor": "4"}, ["factor is '4'", "expected a number"]),
        ({"rope_theta": 1.0}, ["theta is 1.0", "more than 1"]),
        ({"rope_theta": -5.0}, ["theta is -5.0", "positive finite"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "expected 1.0"]),
        ({"short_factor": [1.0]}, ["unknown keys ['short_factor']"]),
        (LLAMA3 | {"low_freq_factor": 4.0}, ["low_freq_factor is 4.0", "less than high_freq_factor 4.0"]),
        (LLAMA3 | {"original_max_position_embeddings": 8192.5}, ["8192.5", "whole number"]),
        (YARN | {"truncate": "yes"}, ["truncate is 'yes'", "True or False"]),
    ],
    ids=str,
)
def test_damaged_parameters_are_named(mapping: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        RopeParameters.from_mapping({"rope_theta": 10000.0} | mapping)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.damaged
def test_a_missing_theta_is_named() -> None:
    with pytest.raises(ValueError, match="rope_theta is missing"):
        RopeParameters.from_mapping({"rope_type": "default"})


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"theta": 10.0, "kind": "ntk"}, "kind is 'ntk', expected one of"),
        ({"theta": "10000"}, "theta is '10000', expected a number"),
        ({"theta": True}, "theta is True, expected a number"),
        ({"theta": None}, "theta is None, expected a number"),
        ({"theta": 10.0, "kind": "linear"}, "factor is None, expected a number for linear"),
    ],
    ids=str,
)
def test_damaged_fields_are_named(kwargs: dict[str, Any], fragment: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        RopeParameters(**kwargs)
    assert fragment in str(caught.value)


@pytest.mark.damaged
@pytest.mark.parametrize(("head_dim", "positions"), [(0, 4), (-2, 4), (5, 4), (4, -1)])
def test_damaged_sizes_are_named(head_dim: int, positions: int) -> None:
    with pytest.raises(ValueError, match=rf"(head_dim is {head_dim}|max_positions is {positions}), expected"):
        rope_cache(RopeParameters(100.0), head_dim, positions)
