"""Attention over the paged cache against attention written out, token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.tensors import LayerKV
from qsun.layers import attention as attention_layer
from qsun.layers.attention import Attention
from qsun.layers.linear import DenseLinear
from qsun.layers.norm import RMSNorm
from qsun_kernels import RopeParameters, paged_attention_decode, rope_cache, write_kv_cache

HIDDEN, D = 24, 8
COS_SIN = rope_cache(RopeParameters(100.0), D, 64)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(heads: tuple[int, int], window: int | None, norms: bool) -> Attention:
    q, kv = heads
    return Attention(
        DenseLinear(random((q + 2 * kv) * D, HIDDEN, seed=1) / 4),
        DenseLinear(random(HIDDEN, q * D, seed=2) / 4),
        num_q_heads=q,
        num_kv_heads=kv,
        head_dim=D,
        q_norm=RMSNorm(1 + random(D, seed=3) / 4, 1e-6) if norms else None,
        k_norm=RMSNorm(1 + random(D, seed=4) / 4, 1e-6) if norms else None,
        window=window,
    )


def written_out(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Every position and head by itself, in float64."""

    def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
        angles = torch.tensor([position * 100.0 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
        first, second = vector[: D // 2], vector[D // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin))

    def norm(vector: torch.Tensor, module: RMSNorm | None) -> torch.Tensor:
        if module is None:
            return vector
        return vector / (vector.square().mean() + module.eps).sqrt() * module.weight.double()

    T, group = x.shape[0], layer.num_q_heads // layer.num_kv_heads
    rows = (x.double() @ layer.qkv.weight.double().T).view(T, -1, D)
    q, k, v = rows.split([layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    out = torch.zeros(T, layer.num_q_heads, D, dtype=torch.float64)
    for t in range(T):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        for head in range(layer.num_q_heads):
            query = rotate(norm(q[t, head], layer.q_norm), t)
            keys = [rotate(norm(k[s, head // group], layer.k_norm), s) for s in range(first, t + 1)]
            scores = torch.stack([query @ key / math.sqrt(D) for key in keys])
            out[t, head] = scores.softmax(0) @ v[first : t + 1, head // group]
    return out.view(T, -1) @ layer.o.weight.double().T


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)], ids=str)
def test_chunks_and_steps_equal_attention_written_out(heads, window, norms):
    layer = make(heads, window, norms)
    x = random(21, HIDDEN, seed=5)
    block_size = 4
    blocks = torch.tensor([7, 2, 9, 0, 5, 3])
    kv = LayerKV(*(torch.full((10, heads[1], block_size, D), torch.nan) for _ in range(2)))

    def slots(positions: torch.Tensor) -> torch.Tensor:
        return blocks[positions // block_size] * block_size + positions % block_size

    got = []
    for start, end in ((0, 3), (3, 4), (4, 13)):
        positions = torch.arange(start, end)
        chunk = PrefillChunk(0, end - start, start, blocks[: -(-end // block_size)])
        got.append(
            layer(
                x[start:end],
                ForwardContext(positions, slots(positions), PrefillAttention((chunk,))),
                kv,
                COS_SIN,
            )
        )
    for position in range(13, 21):
        positions = torch.tensor([position])
        attention = DecodeAttention(blocks.int()[None], torch.tensor([position + 1], dtype=torch.int32))
        got.append(
            layer(
                x[position : position + 1],
                ForwardContext(positions, slots(positions), attention),
                kv,
                COS_SIN,
            )
        )
    torch.testing.assert_close(torch.cat(got).double(), written_out(layer, x), rtol=1e-4, atol=1e-5)


def test_a_cache_in_another_dtype_than_the_activations():
    """KV kept in 16 bits under float32 activations: read back as it was rounded, on both paths."""
    layer = make((4, 2), None, norms=False)
    x = random(9, HIDDEN, seed=6)
    blocks = torch.tensor([1, 0, 2])
    kv = LayerKV(*(torch.full((3, 2, 4, D), torch.nan, dtype=torch.bfloat16) for _ in range(2)))
    positions = torch.arange(8)
    slots = blocks[positions // 4] * 4 + positions % 4
    ctx = ForwardContext(positions, slots, PrefillAttention((PrefillChunk(0, 8, 0, blocks[:2]),)))
    got = [layer(x[:8], ctx, kv, COS_SIN)]
    attention = DecodeAttention(blocks.int()[None], torch.tensor([9], dtype=torch.int32))
    got.append(layer(x[8:], ForwardContext(torch.tensor([8]), torch.tensor([8]), attention), kv, COS_SIN))
    got = torch.cat(got).double()
    expected = written_out(layer, x)
    assert got.dtype == torch.float64 and 1e-6 < (got - expected).norm() / expected.norm() < 1e-2


def test_nothing_is_launched_between_the_write_and_the_attention_that_follows_it(monkeypatch) -> None:
    """What `follows_write` promises: the launch in front of the attention is the write of its new tokens."""
    log: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append(str(func))
            return func(*args, **(kwargs or {}))

    def write(*arguments, **options):
        result = write_kv_cache(*arguments, **options)
        log.append("written")
        return result

    def attend(*arguments, **options):
        assert options["follows_write"] is True
        log.append("attending")
        return paged_attention_decode(*arguments, **options)

    monkeypatch.setattr(attention_layer, "write_kv_cache", write)
    monkeypatch.setattr(attention_layer, "paged_attention_decode", attend)
    layer = make((4, 2), None, norms=True)
    kv = LayerKV(*(torch.zeros(3, 2, 4, D) for _ in range(2)))
    step = DecodeAttention(torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32))
    with Recorder():
        layer(
            random(1, HIDDEN, seed=7), ForwardContext(torch.tensor([5]), torch.tensor([1]), step), kv, COS_SIN
        )
    assert log.index("attending") == log.index("written") + 1
    assert "aten.mm.default" in log  # the recorder sees what is launched


def test_no_plan_is_compiled_for_a_prompts_length(monkeypatch) -> None:
    """cuDNN's attention compiles for every new length: it is not asked, and stays as it was for others."""
    asked = []
    attend = attention_layer.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(attention_layer.functional, "scaled_dot_product_attention", spy)
    layer = make((4, 2), None, norms=False)
    kv = LayerKV(*(torch.zeros(3, 2, 4, D) for _ in range(2)))
    chunk = PrefillChunk(0, 5, 0, torch.tensor([2, 0]))
    positions = torch.arange(5)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    layer(
        random(5, HIDDEN, seed=3),
        ForwardContext(positions, torch.tensor([8, 9, 10, 11, 0]), PrefillAttention((chunk,))),
        kv,
        COS_SIN,
    )
    assert asked == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
