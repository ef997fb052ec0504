"""Causal attention of prompt chunks to the paged cache.

A chunk attends to its own tokens as they were read back from the cache, too: what becomes of a token does not
depend on how its prompt was cut into chunks, not even where the cache rounds to codes.

The blocks that chunks see are gathered once a layer, for all chunks together; where that would be more than
there is memory for, for some chunks after others. (Many requests may begin with the same long text: each of
their chunks sees all of it.) One head of one block is a run of memory, so a block's heads are put where each
head's tokens lie one behind the other:

    cache     (num_blocks, num_kv_heads, block_size, head_dim)
    k, v      (num_kv_heads, S, head_dim)       S: |-blocks of chunk 0-|-----of chunk 1-----|-of chunk 2-|

FlashAttention takes them as they are: sequences of their own lengths, the last query opposite the last key,
fewer key heads than query heads, a window. Nothing is masked in memory and one launch serves all chunks that
were gathered together. Where it cannot run (a CPU, float32, a head_dim that is no multiple of 8), torch's
attention takes a chunk at a time, with a mask. Places, lengths and masks are the same in every layer of one
window, so they are plans that are made once a forward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsun.core import PrefillAttention, PrefillChunk, PrefillPlan
from qsun.kv_cache.tensors import LayerKV
from qsun_kernels.backends.reference.kv_codes import dequantize_kv

__all__ = ["attend_chunks", "copy_to_device", "plan_prefill_attention"]

# Without cuDNN's, which torch prefers on some GPUs: it compiles a plan for every pair of lengths that it has
# not seen, and prompts have any length.
_MASKED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

# FlashAttention's kernels copy 16 bytes at a time, and have no tiles for longer heads.
_FLASH_ALIGNMENT, _FLASH_LONGEST_HEAD = 8, 256


def plan_prefill_attention(
    attention: PrefillAttention,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PrefillPlan, ...]:
    """What every layer with this window reads for these chunks, at least one, and who sees whom.

    Each plan is of as many chunks as may be read at once.
    dtype: of the queries.  Copies a few numbers to the device and waits for none of them.
    """
    group = num_q_heads // num_kv_heads
    flash = _runs_flash(head_dim, dtype, device)
    return tuple(
        _plan(chunks, num_kv_heads, group, block_size, window, device, flash=flash)
        for chunks in _read_at_once(attention, block_size, window)
    )


def _read_at_once(
    attention: PrefillAttention, block_size: int, window: int | None
) -> Iterator[list[PrefillChunk]]:
    """The chunks, cut where the next one's blocks would be too many."""
    together: list[PrefillChunk] = []
    num_blocks = 0
    for chunk in attention.chunks:
        _, skipped, end = _seen(chunk, block_size, window)
        num_blocks += end - skipped
        if together and attention.max_blocks is not None and num_blocks > attention.max_blocks:
            yield together
            together, num_blocks = [], end - skipped
        together.append(chunk)
    yield together


def _seen(chunk: PrefillChunk, block_size: int, window: int | None) -> tuple[int, int, int]:
    """The earliest position that a chunk's first token can see, and the chunk's blocks from it to the end."""
    first = 0 if window is None else max(0, chunk.context_len - window + 1)
    return first, first // block_size, -(-(chunk.context_len + chunk.length) // block_size)


def _plan(
    chunks: Sequence[PrefillChunk],
    num_kv_heads: int,
    group: int,
    block_size: int,
    window: int | None,
    device: torch.device,
    *,
    flash: bool,
) -> PrefillPlan:
    """Of chunks that are read at once.  group: query heads a key head.  flash: what `_runs_flash` says."""
    q_starts, k_starts, k_lengths = [0], [], []
    blocks: list[Tensor] = []
    masks: list[Tensor | None] = []
    num_slots = 0
    is_cut = False
    for chunk in chunks:
        assert chunk.start == chunks[0].start + q_starts[-1], "chunks lie side by side"
        total = chunk.context_len + chunk.length
        # Blocks before the first position are not even read.
        first, skipped, end = _seen(chunk, block_size, window)
        blocks.append(chunk.block_ids[skipped:end])
        q_starts.append(q_starts[-1] + chunk.length)
        k_starts.append(num_slots + first - skipped * block_size)
        k_lengths.append(total - first)
        num_slots += (end - skipped) * block_size
        is_cut = is_cut or (window is not None and total > window)
        if not flash:
            masks.append(_mask(chunk, first, window, group, device))
    of_block = (blocks[0] if len(blocks) == 1 else torch.cat(blocks)) * num_kv_heads
    starts = None
    if flash:
        numbers = [*q_starts, *k_starts, num_slots, *k_lengths, 0]
        starts = copy_to_device(numbers, torch.int32, device).view(3, -1)
    return PrefillPlan(
        runs=(torch.arange(num_kv_heads, device=device)[:, None] + of_block).view(-1),
        q_starts=tuple(q_starts),
        k_starts=tuple(k_starts),
        k_lengths=tuple(k_lengths),
        window=window if is_cut else None,
        starts=starts,
        masks=tuple(masks),
    )


def attend_chunks(q: Tensor, kv: LayerKV, plans: Sequence[PrefillPlan], *, softmax_scale: float) -> Tensor:
    """Attention of all chunks' tokens q (T, num_q_heads, head_dim), of the same shape."""
    if len(plans) == 1:
        return _attend(q, kv, plans[0], softmax_scale)
    parts = q.split([plan.q_starts[-1] for plan in plans])
    return torch.cat(
        [_attend(part, kv, plan, softmax_scale) for part, plan in zip(parts, plans, strict=True)]
    )


def _attend(q: Tensor, kv: LayerKV, plan: PrefillPlan, softmax_scale: float) -> Tensor:
    k = _gathered(kv.k, kv.k_scale, plan.runs, q)
    v = _gathered(kv.v, kv.v_scale, plan.runs, q)
    if plan.starts is not None:
        return _flash(q, k, v, plan, softmax_scale)
    out = torch.empty_like(q)
    for chunk, mask in enumerate(plan.masks):
        of_q = slice(plan.q_starts[chunk], plan.q_starts[chunk + 1])
        # Slots past the last token may hold anything, not-a-number included: they are cut off, not masked.
        of_k = slice(plan.k_starts[chunk], plan.k_starts[chunk] + plan.k_lengths[chunk])
        out[of_q] = _masked(q[of_q], k[:, of_k], v[:, of_k], mask, softmax_scale)
    return out


def copy_to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on the device, without waiting for what the device has to do before."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    # From memory that may be paged out, a copy would wait for all that the stream was given so far.
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _runs_flash(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's FlashAttention takes such heads; `torch.backends.cuda.enable_flash_sdp` is obeyed."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % _FLASH_ALIGNMENT == 0
        and head_dim <= _FLASH_LONGEST_HEAD
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _gathered(cache: Tensor, scale: Tensor | None, runs: Tensor, q: Tensor) -> Tensor:
    """Keys or values of the plan's blocks, (num_kv_heads, S, head_dim) in the dtype of q."""
    _, num_kv_heads, block_size, width = cache.shape
    words = _words(cache.view(-1, block_size * width))
    tokens = words.index_select(0, runs).view(cache.dtype).view(num_kv_heads, -1, width)
    if scale is not None:
        of_runs = scale.view(-1, block_size).index_select(0, runs)
        tokens = dequantize_kv(tokens, of_runs.view(num_kv_heads, -1))
    return tokens.to(q.dtype)


def _words(rows: Tensor) -> Tensor:
    """The same memory as the widest integers that divide a row: torch moves an element a thread, any but
    float8.
    """
    size = rows.shape[1] * rows.element_size()
    return rows.view(next(dtype for dtype in _WORDS if size % dtype.itemsize == 0))


def _flash(q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, softmax_scale: float) -> Tensor:
    """All chunks by one launch.

    torch's function for packed sequences (`torch.nn.attention.varlen`) is younger than the oldest torch that
    qsun supports and has changed since; the operator below it has not.
    """
    assert plan.starts is not None
    q_starts, k_starts, k_lengths = plan.starts
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k.transpose(0, 1),
        v.transpose(0, 1),
        q_starts,
        k_starts,
        max(map(operator.sub, plan.q_starts[1:], plan.q_starts)),
        max(plan.k_lengths),
        0.0,  # no dropout
        True,  # causal
        False,  # no mask for debugging
        scale=softmax_scale,
        window_size_left=-1 if plan.window is None else plan.window - 1,
        window_size_right=0,
        # Of the slots between one start and the next, the last may be nobody's.
        seqused_k=k_lengths[:-1],
    )[0]
    return out


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float) -> Tensor:
    """One chunk: q (length, num_q_heads, head_dim) on k, v (num_kv_heads, total, head_dim)."""
    length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    group = num_q_heads // num_kv_heads
    # The query heads of a group share keys and values: as further query rows they need no copy of them.
    grouped = q.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    with sdpa_kernel(_MASKED_BACKENDS):
        out = functional.scaled_dot_product_attention(
            grouped.reshape(1, num_kv_heads, group * length, head_dim),
            k[None],
            v[None],
            attn_mask=mask,
            scale=softmax_scale,
        )
    out = out.view(num_kv_heads, group, length, head_dim).permute(2, 0, 1, 3)
    return out.reshape(length, num_q_heads, head_dim)


def _mask(
    chunk: PrefillChunk, first: int, window: int | None, group: int, device: torch.device
) -> Tensor | None:
    """Who sees whom: bool (group * length, total - first), row i being position context_len + i % length.

    None where a single token sees all there is.
    """
    if chunk.length == 1:
        return None
    total = chunk.context_len + chunk.length
    queries = torch.arange(chunk.context_len, total, device=device)[:, None]
    keys = torch.arange(first, total, device=device)[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible.repeat(group, 1)
