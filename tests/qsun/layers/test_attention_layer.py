"""Attention over the paged cache against attention written out, token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention, PrefillChunk, PrefillPlan
from qsun.kv_cache.tensors import LayerKV
from qsun.layers import attention as attention_layer
from qsun.layers import linear as linear_layer
from qsun.layers import prefill_attention
from qsun.layers.attention import Attention
from qsun.layers.linear import DenseLinear, QuantLinear
from qsun.layers.norm import RMSNorm
from qsun_kernels import (
    PendingSums,
    QuantSpec,
    RopeParameters,
    paged_attention_decode,
    prepare_weight,
    quantize_rtn,
    rope_cache,
    write_kv_cache,
)

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


@pytest.mark.parametrize("bias", [None, random(32, seed=3)], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [2, 3])
def test_sums_that_the_projection_leaves_are_added_by_the_write(monkeypatch, rows, bias) -> None:
    """The library is asked about these rows and this weight; where it splits, the same comes out."""
    packed = quantize_rtn(random(32, 32, seed=1), QuantSpec(4, 32, True))
    weight = prepare_weight(packed, dtype=torch.bfloat16, backend="torch")
    qkv = QuantLinear(weight, None if bias is None else bias.bfloat16())
    layer = Attention(
        qkv, DenseLinear(random(HIDDEN, 16, seed=4).bfloat16()), num_q_heads=2, num_kv_heads=1, head_dim=D
    )
    x = random(rows, 32, seed=2).bfloat16()
    positions = torch.arange(rows)
    ctx = ForwardContext(positions, positions + 1, PrefillAttention(()))
    asked = []

    def left(x: torch.Tensor, weight) -> PendingSums:
        whole = linear_layer.wna16_linear(x, weight).float()
        half = torch.randn_like(whole).round()
        return PendingSums(torch.stack((whole - half, half)), torch.bfloat16)

    def written() -> list[torch.Tensor]:
        kv = LayerKV(*(torch.zeros(2, 1, 4, D).bfloat16() for _ in range(2)))
        return [layer.write_kv(x, ctx, kv, COS_SIN), kv.k, kv.v]

    expected = written()
    assert expected[1].any()
    monkeypatch.setattr(linear_layer, "wna16_linear_pending_sums", left)
    monkeypatch.setattr(
        linear_layer, "sums_may_pend", lambda rows, weight: asked.append((rows, weight)) or rows > 2
    )
    given = []
    write = write_kv_cache
    monkeypatch.setattr(
        attention_layer, "write_kv_cache", lambda k, *a, **named: given.append(k) or write(k, *a, **named)
    )
    for mine, theirs in zip(written(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    assert asked == ([] if bias is not None else [(rows, weight)])
    assert isinstance(given[0], PendingSums) is (rows > 2 and bias is None)


def packed_attention(
    q, k, v, q_starts, k_starts, max_q, max_k, dropout, causal, debug, *, scale, seqused_k, **window
):
    """torch's FlashAttention for packed sequences, as its documentation puts it, sequence by sequence."""
    assert (dropout, causal, debug, window["window_size_right"]) == (0.0, True, False, 0)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    out = torch.full_like(q, torch.nan)
    assert q_starts.dtype == k_starts.dtype == seqused_k.dtype == torch.int32
    assert len(q_starts) == len(k_starts) == len(seqused_k) + 1 and seqused_k.is_contiguous()
    for i, length in enumerate(seqused_k.tolist()):
        of_q = slice(int(q_starts[i]), int(q_starts[i + 1]))
        of_k = slice(int(k_starts[i]), int(k_starts[i]) + length)
        rows = of_q.stop - of_q.start
        assert rows <= max_q and length <= max_k and of_k.stop <= int(k_starts[i + 1])
        # The last query stands opposite the last key.
        distance = torch.arange(rows)[:, None] + length - rows - torch.arange(length)[None, :]
        visible = distance >= 0
        if window["window_size_left"] >= 0:
            visible &= distance <= window["window_size_left"]
        group = q.shape[1] // k.shape[1]
        keys, values = (x[of_k].repeat_interleave(group, 1).double() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[of_q].double(), keys) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[of_q] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out, None, None, None, None


@pytest.mark.parametrize("max_blocks", [None, 5, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["a-chunk-at-a-time", "packed"])
@pytest.mark.parametrize("window", [None, 1, 5, 9, 40])
@pytest.mark.parametrize("heads", [(4, 2), (5, 1)], ids=str)
def test_chunks_of_several_sequences_in_one_pass(monkeypatch, heads, window, packed, max_blocks) -> None:
    """Chunks with and without a context, of lengths that no block divides, beside not-a-number."""
    gathered: list[int] = []
    gather = prefill_attention._gathered
    monkeypatch.setattr(
        prefill_attention,
        "_gathered",
        lambda cache, scale, runs, q: gathered.append(len(runs) // heads[1]) or gather(cache, scale, runs, q),
    )
    calls = []
    if packed:
        monkeypatch.setattr(prefill_attention, "_runs_flash", lambda *_: True)
        monkeypatch.setattr(
            torch.ops.aten,
            "_flash_attention_forward",
            lambda *a, **k: calls.append(a[0].shape[0]) or packed_attention(*a, **k),
        )
    layer = make(heads, window, norms=False)
    kv = LayerKV(*(torch.full((20, heads[1], 4, D), torch.nan) for _ in range(2)))
    tables = [torch.tensor([7, 2, 9, 0]), torch.tensor([4, 1, 11, 3]), torch.tensor([19, 5, 8, 6])]
    lengths, done = [11, 14, 3], [0, 0, 0]
    xs = [random(length, HIDDEN, seed=10 + i) for i, length in enumerate(lengths)]
    got: list[list[torch.Tensor]] = [[], [], []]
    for step in ([(0, 5), (1, 9)], [(0, 1), (1, 1), (2, 3)], [(0, 5), (1, 4)]):
        chunks, positions, slots, start = [], [], [], 0
        for sequence, length in step:
            first = done[sequence]
            where = torch.arange(first, first + length)
            table = tables[sequence]
            chunks.append(PrefillChunk(start, length, first, table[: -(-(first + length) // 4)]))
            positions.append(where)
            slots.append(table[where // 4] * 4 + where % 4)
            start += length
            done[sequence] += length
        x = torch.cat([xs[s][done[s] - length : done[s]] for s, length in step])
        attention = PrefillAttention(tuple(chunks), max_blocks)
        ctx = ForwardContext(torch.cat(positions), torch.cat(slots), attention)
        out = layer(x, ctx, kv, COS_SIN).split([length for _, length in step])
        for (sequence, _), rows in zip(step, out, strict=True):
            got[sequence].append(rows)
    assert done == lengths and sum(calls) == (28 if packed else 0)
    if max_blocks is None:
        assert calls in ([], [14, 5, 9]) and len(gathered) == 6
    else:
        assert max(gathered) <= max_blocks
    for rows, x in zip(got, xs, strict=True):
        torch.testing.assert_close(torch.cat(rows).double(), written_out(layer, x), rtol=1e-4, atol=1e-5)


def test_a_window_that_hides_nothing_costs_nothing() -> None:
    def plan(context: int) -> PrefillPlan:
        chunk = PrefillChunk(0, 5, context, torch.tensor([2, 0, 1, 3]))
        (plan,) = prefill_attention.plan_prefill_attention(
            PrefillAttention((chunk,)),
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=D,
            block_size=4,
            window=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return plan

    assert (plan(3).window, plan(4).window) == (None, 8)
    assert plan(3).k_lengths == (8,) and plan(10).k_lengths == (12,)
    # Positions 4 to 15: the first block is not even read.
    assert plan(11).runs.tolist() == [0, 2, 6, 1, 3, 7] and plan(11).k_starts == (0,)


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
    attend = prefill_attention.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(prefill_attention.functional, "scaled_dot_product_attention", spy)
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
