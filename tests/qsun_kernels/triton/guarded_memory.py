"""Run every operator on tensors that end, or begin, at a page which must not be touched.

A script, run by test_triton_bounds.py in a process of its own: one access out of bounds kills it. Triton's
interpreter reads and writes through real addresses, so a mask that is missing shows here even where the value
behind it is harmless; on a GPU this is the work of compute-sanitizer.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qsun_kernels import QuantSpec
from qsun_kernels.backends.triton import IMPLEMENTATIONS, wna16_linear
from qsun_kernels.backends.triton.paged_attention_decode import paged_attention_decode
from qsun_kernels.backends.triton.paged_attention_plan import choose_rows, choose_tile, make_plan
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KvKind
from qsun_kernels.testing.kv_writes import kv_write

PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
AT_END = sys.argv[1:] == ["end"]

mapped: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor with an untouchable page right behind it, or right in front of it."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return tensor
    pages = -(-nbytes // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    mapped.append(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (0, pages + 1):
        if LIBC.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - nbytes if AT_END else 0)
    flat = torch.frombuffer(region, dtype=torch.uint8, count=nbytes, offset=offset)
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def guarded_empty(*size: int | Sequence[int], **kwargs: Any) -> Tensor:
    zeros = torch.zeros(*size, **kwargs)
    return guarded(zeros.fill_(torch.nan) if zeros.is_floating_point() else zeros)


def run(operator: str, *arguments: Any) -> Any:
    return IMPLEMENTATIONS[operator].run(*arguments)


def linear(source: torch.Generator, bits: int, group_size: int | str, act_order: bool, splits: int) -> None:
    # K ends within a word, so a row's last chunk reaches into what is no longer of the weight.
    M, N, K, dtype = 3, 37, 173, torch.float16
    spec = QuantSpec(bits, group_size, symmetric=False)
    packed = inputs.packed_weight(source, N, K, spec, act_order=act_order).with_scales(dtype)
    run("dequantize", packed, dtype)
    prepared = wna16_linear.prepare(packed, dtype)
    prepared = replace(prepared, tensors=tuple(guarded(tensor) for tensor in prepared.tensors))
    x, bias, residual = (guarded(inputs.normal(source, shape, dtype)) for shape in ((M, K), (N,), (M, N)))
    if prepared.layout == "triton.rows":
        configs = [wna16_linear.RowsConfig(16, 64, 32, splits, num_warps=4, num_stages=1)]
    else:
        configs = [
            wna16_linear.TilesConfig(16, 64, 128, 1, splits, 4, 1, ahead=False, prefetch=16),
            wna16_linear.TilesConfig(8, 16, 128, 2, splits, 2, 1, ahead=True, prefetch=0),
        ]
    for config in configs:
        out = wna16_linear.wna16_linear(x, prepared, bias, residual, config=config)
        assert out.isfinite().all()


def attention(
    source: torch.Generator,
    head_dim: int,
    block_size: int,
    parts: int,
    q_len: int,
    kv: KvKind | None = None,
) -> None:
    """The block table has no column more than the lengths need, the cache no block."""
    lengths = [2 * block_size, 1, 0, 2 * block_size - 1]
    case = inputs.paged_attention_inputs(
        source,
        lengths,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.bfloat16,
        q_len=q_len,
        sinks=q_len > 1,
        spare_blocks=0,
        kv=kv,
    )
    seq_lens = guarded(case.seq_lens)
    tile = choose_tile(head_dim, torch.bfloat16, case.k_cache.dtype, choose_rows(3 * q_len))
    plan = make_plan(seq_lens, parts, tile, q_len, None)
    out, lse = paged_attention_decode(
        guarded(case.q.contiguous()),
        guarded(case.k_cache),
        guarded(case.v_cache),
        guarded(case.block_table.contiguous()),
        seq_lens,
        case.softmax_scale,
        None,
        None,
        None if case.sinks is None else guarded(case.sinks),
        None,
        (plan,),
        None if case.k_scale is None else guarded(case.k_scale),
        None if case.v_scale is None else guarded(case.v_scale),
    )
    assert out.isfinite().all() and not lse.isnan().any()


def write(source: torch.Generator, kv: KvKind, head_dim: int) -> None:
    """All steps but the rotation, for widths that no power of two is."""
    call = kv_write(
        source, 3, dtype=torch.bfloat16, kv=kv, heads=(3, 2), head_dim=head_dim, steps=("norm", "rope")
    )
    before = call.before
    caches = [
        guarded(cache.view(torch.uint8)).view(cache.dtype) for cache in (before.k_cache, before.v_cache)
    ]
    rows = [None if t is None else guarded(t.contiguous()) for t in (call.k, call.v, call.q)]
    others = (call.slot_mapping, call.positions, call.cos_sin, call.q_norm, call.k_norm)
    slots, *steps = (None if t is None else guarded(t) for t in others)
    scales = [None if t is None else guarded(t) for t in (before.k_scale, before.v_scale)]
    q = run("write_kv_cache", *rows[:2], *caches, slots, rows[2], *steps, 1e-6, False, *scales)
    assert q.isfinite().all()


def main() -> None:
    faulthandler.enable()
    source = inputs.generator(0)
    torch.empty = guarded_empty  # the launchers' outputs and scratch
    torch.empty_like = guarded
    for bits, group_size, act_order, splits in (
        (2, 32, False, 1),
        (3, 64, False, 2),
        (3, 32, True, 1),
        (4, 32, True, 1),
        (4, 128, False, 1),
        (8, "channel", False, 2),
    ):
        linear(source, bits, group_size, act_order, splits)
    for head_dim, block_size, parts, q_len in ((20, 3, 1, 1), (16, 100, 3, 1), (80, 1, 2, 2), (20, 70, 4, 7)):
        attention(source, head_dim, block_size, parts, q_len)
    for kv, head_dim in (("fp8", 20), ("fp8-tensor", 36), ("int8", 33), ("int4", 36)):
        attention(source, head_dim, 3, 2, 2, kv)
        write(source, kv, head_dim - head_dim % 2)

    x, residual = (guarded(inputs.normal(source, (3, 130), torch.bfloat16)) for _ in range(2))
    run("rms_norm", x, guarded(torch.ones(130, dtype=torch.bfloat16)), 1e-6, residual)
    run("silu_and_mul", x)
    q, k = (guarded(inputs.normal(source, (3, heads, 20), torch.float16)) for heads in (5, 3))
    positions = guarded(torch.tensor([6, 0, 3]))
    run("apply_rope", q, k, positions, guarded(torch.rand(7, 20, generator=source)))
    caches = [guarded(torch.zeros(4, 3, 2, 20, dtype=torch.float16)) for _ in range(2)]
    run("write_kv_cache", k, k, *caches, guarded(torch.tensor([7, -1, 0])))
    logits = guarded(torch.randn(3, 130, generator=source))
    settings = [guarded(torch.tensor(one)) for one in ([0.0, 1.0, 0.7], [0.0, 0.9, 1.0], [0.0, 0.1, 0.0])]
    top_k = guarded(torch.tensor([0, 7, 0], dtype=torch.int32))
    run("sample_tokens", logits, settings[0], top_k, *settings[1:], guarded(torch.arange(3)))
    print("in bounds")


if __name__ == "__main__":
    main()
