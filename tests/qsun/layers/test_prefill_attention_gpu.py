"""FlashAttention on gathered blocks against float64, where masks would be right too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qsun.core import PrefillAttention, PrefillChunk, PrefillPlan
from qsun.kv_cache.tensors import LayerKV
from qsun.layers.prefill_attention import attend_chunks, plan_prefill_attention
from qsun_kernels.backends.reference.kv_codes import dequantize_kv, quantize_kv

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
# (context, length) of each chunk: none, one, many before it; lengths that nothing divides; a single token.
SHAPES = {
    "one": [(0, 512)],
    "late": [(1531, 301)],
    "several": [(0, 37), (700, 129), (64, 1), (5, 200)],
    "single": [(0, 1), (17, 1), (300, 1)],
}


def case(
    shape: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> tuple[Tensor, LayerKV, Sequence[PrefillChunk]]:
    """Queries, a cache whose unused slots are not-a-number, and the chunks."""
    generator = torch.Generator("cuda").manual_seed(0)
    ends = [context + length for context, length in SHAPES[shape]]
    counts = [-(-end // BLOCK_SIZE) for end in ends]
    order = torch.randperm(2 * sum(counts), generator=generator, device="cuda")
    shape_of_cache = (len(order), heads[1], BLOCK_SIZE, head_dim)
    used = torch.zeros(len(order), BLOCK_SIZE, dtype=torch.bool, device="cuda")
    chunks, start = [], 0
    for (context, length), blocks, end in zip(
        SHAPES[shape], order[: sum(counts)].split(counts), ends, strict=True
    ):
        chunks.append(PrefillChunk(start, length, context, blocks))
        slots = torch.arange(end, device="cuda")
        used[blocks[slots // BLOCK_SIZE], slots % BLOCK_SIZE] = True
        start += length
    q = torch.randn(start, heads[0], head_dim, generator=generator, device="cuda").to(dtype)
    caches, scales = [], []
    for _ in range(2):
        values = torch.randn(shape_of_cache, generator=generator, device="cuda")
        values = values.masked_fill(~used[:, None, :, None], torch.nan)
        codes, scale = (values.to(dtype), None) if kv_dtype is None else quantize_kv(values, kv_dtype)
        caches.append(codes)
        scales.append(scale)
    return q, LayerKV(*caches, *scales), chunks


def plans_of(
    q: Tensor,
    kv: LayerKV,
    chunks: Sequence[PrefillChunk],
    window: int | None,
    max_blocks: int | None = None,
) -> tuple[PrefillPlan, ...]:
    return plan_prefill_attention(
        PrefillAttention(tuple(chunks), max_blocks),
        num_q_heads=q.shape[1],
        num_kv_heads=kv.k.shape[1],
        head_dim=q.shape[2],
        block_size=BLOCK_SIZE,
        window=window,
        dtype=q.dtype,
        device=q.device,
    )


def exact(q: Tensor, kv: LayerKV, chunks: Sequence[PrefillChunk], window: int | None) -> Tensor:
    """In float64, from what the cache holds in the dtype of q."""
    group = q.shape[1] // kv.k.shape[1]
    out = []
    for chunk in chunks:
        total = chunk.context_len + chunk.length
        k, v = (
            dequantize_kv(cache[chunk.block_ids], None if scale is None else scale[chunk.block_ids])
            .to(q.dtype)
            .double()
            .transpose(1, 2)
            .flatten(0, 1)[:total]
            .repeat_interleave(group, 1)
            for cache, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
        )
        queries = torch.arange(chunk.context_len, total, device="cuda")[:, None]
        keys = torch.arange(total, device="cuda")[None, :]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        rows = q[chunk.start : chunk.start + chunk.length].double()
        scores = torch.einsum("qhd,khd->hqk", rows, k) * q.shape[2] ** -0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def check(q: Tensor, kv: LayerKV, chunks: Sequence[PrefillChunk], window: int | None) -> None:
    """At most twice as far from float64 as attention with a mask, and the same bits again."""
    scale = q.shape[2] ** -0.5
    plans = plans_of(q, kv, chunks, window)
    (plan,) = plans
    assert plan.starts is not None and not plan.masks
    got = attend_chunks(q, kv, plans, softmax_scale=scale)
    enabled = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        masked = plans_of(q, kv, chunks, window)
    finally:
        torch.backends.cuda.enable_flash_sdp(enabled)
    assert masked[0].starts is None
    expected = exact(q, kv, chunks, window)
    theirs = (attend_chunks(q, kv, masked, softmax_scale=scale).double() - expected).norm()
    assert (got.double() - expected).norm() <= 2 * theirs
    assert torch.equal(attend_chunks(q, kv, plans, softmax_scale=scale), got)


@pytest.mark.parametrize("window", [None, 1, 100, 4096])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(32, 8), (7, 1), (4, 4)], ids=str)
def test_chunks_and_windows(heads, shape, window) -> None:
    check(*case(shape, heads, 128, torch.bfloat16, None), window)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_head_dims(head_dim, dtype) -> None:
    check(*case("several", (8, 2), head_dim, dtype, None), None)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float32], ids=str)
def test_other_caches(kv_dtype, window) -> None:
    """Codes of 8 and 4 bits, and a cache of wider values than the activations."""
    if kv_dtype == torch.float32:
        q, kv, chunks = case("several", (8, 2), 128, torch.float32, None)
        check(q.bfloat16(), kv, chunks, window)
    else:
        check(*case("several", (8, 2), 128, torch.bfloat16, kv_dtype), window)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 128), (torch.bfloat16, 36), (torch.bfloat16, 512)], ids=str
)
def test_what_flash_attention_does_not_take_is_masked(dtype, head_dim) -> None:
    q, kv, chunks = case("several", (4, 2), head_dim, dtype, None)
    plans = plans_of(q, kv, chunks, 100)
    assert plans[0].starts is None
    got = attend_chunks(q, kv, plans, softmax_scale=head_dim**-0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), exact(q, kv, chunks, 100), rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_read_one_after_another_take_the_memory_of_the_longest(window) -> None:
    """The same attention, from no more of the cache at once than the chunk that sees most of it."""
    q, kv, chunks = case("several", (32, 8), 128, torch.bfloat16, None)
    peaks, outputs = [], []
    for max_blocks in (None, 52):  # 829 positions
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plans = plans_of(q, kv, chunks, window, max_blocks)
        outputs.append(attend_chunks(q, kv, plans, softmax_scale=0.1))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert len(plans) == (1 if max_blocks is None or window is not None else 3)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)
    if window is None:
        assert peaks[1] < peaks[0]


def test_a_plan_waits_for_nothing_and_no_layer_either() -> None:
    q, kv, chunks = case("several", (32, 8), 128, torch.bfloat16, None)
    plans_of(q, kv, chunks, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_chunks(q, kv, plans_of(q, kv, chunks, None), softmax_scale=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
