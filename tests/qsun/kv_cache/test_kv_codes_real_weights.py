"""What 4-bit keys and values cost the attention of a real model, SmolLM2-135M-Instruct, with and without a
rotation."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.layers.attention import Attention
from qsun.modules.decode import load_decode_module
from qsun_kernels import paged_attention_decode, write_kv_cache
from qsun_kernels.testing.kv_codes import KV_KINDS, kv_dtype_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_weights,
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
]

TEXT = (
    "The lighthouse keeper counted forty-one ships on Monday and thirty-seven on Tuesday, although the fog "
    "came in at noon. How many ships passed in two days? Explain each step, then write the sum in French. "
    "def add(a, b): return a + b  # and test it with 41 + 37 == 78\n"
)
BLOCK_SIZE = 16
LAST = 8


@pytest.fixture
def layers(smollm2_gguf, paged, monkeypatch):
    """(q, k, v) (T, heads, D) of every layer as the projections give them, positions and angles."""
    decode = load_decode_module(smollm2_gguf, dtype=torch.float32, device="cpu")
    tokens = load_tokenizer(smollm2_gguf)(TEXT)["input_ids"]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    heads_of = Attention._heads

    def recorded(self: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(heads_of(self, qkv))
        return seen[-1]

    monkeypatch.setattr(Attention, "_heads", recorded)
    paged(decode, length=len(tokens), block_size=BLOCK_SIZE).prefill(tokens)
    assert len(seen) == decode.config.num_layers
    return seen, torch.arange(len(tokens)), decode.stack.cos_sin


def attended(layers, dtype: torch.dtype, one_scale: bool, rotate: bool) -> list[Tensor]:
    """What the last tokens of every layer see through a cache of this dtype, float32 (LAST, heads, D)."""
    seen, positions, cos_sin = layers
    tokens = len(positions)
    blocks = -(-tokens // BLOCK_SIZE)
    out = []
    for q, k, v in seen:
        shape = (blocks, k.shape[1], BLOCK_SIZE)
        width = k.shape[2] // 2 if dtype == torch.uint8 else k.shape[2]
        k_cache, v_cache = (torch.zeros(*shape, width).to(dtype) for _ in range(2))
        k_scale = v_scale = None
        if one_scale:
            k_scale, v_scale = torch.tensor([0.25]), torch.tensor([0.125])
        elif not dtype.is_floating_point or dtype.itemsize == 1:
            k_scale, v_scale = torch.zeros(shape), torch.zeros(shape)
        q = write_kv_cache(
            *(k, v, k_cache, v_cache, positions),
            q=q,
            positions=positions,
            cos_sin=cos_sin,
            rotate=rotate,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        table = torch.arange(blocks, dtype=torch.int32)[None]
        lengths = torch.tensor([tokens], dtype=torch.int32)
        out.append(
            paged_attention_decode(
                *(q[-LAST:], k_cache, v_cache, table, lengths),
                softmax_scale=q.shape[2] ** -0.5,
                k_scale=k_scale,
                v_scale=v_scale,
            )
        )
    return out


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The root mean square error of a layer over that of its values, averaged over the layers."""
    ratios = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    return sum(ratios) / len(ratios)


def test_more_bits_and_rotated_keys_lose_less(layers) -> None:
    exact = attended(layers, torch.float32, False, rotate=False)
    assert error(attended(layers, torch.float32, False, rotate=True), exact) < 1e-5
    errors = {
        kind: error(attended(layers, kv_dtype_of(kind), kind == "fp8-tensor", rotate=False), exact)
        for kind in KV_KINDS
    }
    rotated = error(attended(layers, torch.uint8, False, rotate=True), exact)
    print(errors | {"int4 rotated": rotated})
    assert errors["int8"] < errors["fp8"] < errors["fp8-tensor"] < rotated < 0.8 * errors["int4"]
    # The steps of int8 are 127 / 7 = 18 times finer.
    assert 10 * errors["int8"] < errors["int4"]
