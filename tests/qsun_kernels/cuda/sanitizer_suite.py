"""Every instance of every CUDA kernel once, at awkward sizes, for compute-sanitizer.

    SUITE=tests/qsun_kernels/cuda/sanitizer_suite.py
    compute-sanitizer --tool memcheck  --error-exitcode 9 python $SUITE
    compute-sanitizer --tool racecheck --error-exitcode 9 python $SUITE
    compute-sanitizer --tool synccheck --error-exitcode 9 python $SUITE
    compute-sanitizer --tool initcheck --error-exitcode 9 python $SUITE attention coded_attention

Behind the path come the families to run; without one all run. initcheck sees reads of memory that nobody
wrote; it is for the attention, whose kernels leave parts of results for each other.

Inputs are made and results judged on the CPU, so that the tool has our kernels to watch and few others.
Without torch's caching of memory every tensor is an allocation of its own, and an access past its end is
seen. Exit status 1 when a result is wrong.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported

import torch

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.cuda.linear import Norm, launch_panels
from qsun_kernels.backends.cuda.write_kv_cache import write_sums
from qsun_kernels.backends.problems import PagedAttentionDecodeProblem, PendingNorm, PendingSums
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing import judge as judges
from qsun_kernels.testing.coded_cache import code_cache
from qsun_kernels.testing.kv_codes import KV_KINDS
from qsun_kernels.testing.kv_writes import KvWrite, Written, judge_kv_write, kv_write
from qsun_kernels.testing.tolerances import Comparison, compare_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda"
LINEAR_SIZES = ((1, 96, 32, False), (2, 101, 64, True), (3, 1124, "channel", False), (9, 1056, 128, False))


def run(operator: str, *arguments: Any) -> Any:
    """The launcher on copies of the arguments on the GPU; the result on the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    result = cuda.IMPLEMENTATIONS[operator].run(*moved)
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def linear() -> Iterator[tuple[str, Comparison]]:
    """Every bit width, dtype and tile of rows; N and K that no tile divides, and K that one does."""
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for bits in (2, 3, 4, 8):
        for dtype in DTYPES:
            for M, K, group_size, act_order in LINEAR_SIZES:
                source = inputs.generator(bits)
                spec = QuantSpec(bits, group_size, M == 1)
                packed = inputs.packed_weight(source, 21, K, spec, scale_dtype=dtype, act_order=act_order)
                x, bias = inputs.normal(source, (M, K), dtype), inputs.normal(source, (21,), dtype)
                residual = inputs.normal(source, (M, 21), dtype)
                got = run(
                    "wna16_linear", x, prepare(packed.to(DEVICE), dtype), bias.to(DEVICE), residual, None
                )
                yield (
                    f"wna16_linear {spec} {dtype} M={M} K={K}",
                    judges.judge_wna16_linear(got, x, packed, bias, residual),
                )
                dense = cuda.IMPLEMENTATIONS["dequantize"].run(packed.to(DEVICE), dtype).cpu()
                yield f"dequantize {spec} {dtype}", judges.judge_dequantize(dense, packed, dtype)


def tiles_sm80() -> Iterator[tuple[str, Comparison]]:
    """Every instance of the tiles before sm_90, which no GPU with wgmma chooses by itself."""
    for bits in (4, 8):
        for dtype in (torch.float16, torch.bfloat16):
            for token_tiles, row_groups, column_groups in ((2, 1, 8), (4, 2, 4), (6, 4, 2), (8, 2, 2)):
                M, N, K = token_tiles * 8 - 3, 77, 1096
                source = inputs.generator(bits)
                spec = QuantSpec(bits, 32 if token_tiles == 4 else 128, token_tiles < 6)
                packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype)
                weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed.to(DEVICE), dtype)
                x = inputs.normal(source, (M, K), dtype)
                config = library.binding.TilesConfig(
                    token_tiles=token_tiles,
                    row_groups=row_groups,
                    column_groups=column_groups,
                    split_k=2,
                    stages=2,
                    overlaps_producer=False,
                )
                out = torch.empty(M, N, dtype=dtype, device=DEVICE)
                launch_panels(x.to(DEVICE), weight, None, None, out, False, config)
                yield f"tiles_sm80 {spec} {dtype} {config}", judges.judge_wna16_linear(out.cpu(), x, packed)


def block_ends() -> Iterator[tuple[str, Comparison]]:
    """The norm in the launch that adds parts, by a cluster of blocks a row and by one block."""
    for dtype in (torch.float16, torch.bfloat16):
        for M in (16, 70, 140):
            source = inputs.generator(M)
            packed = inputs.packed_weight(source, 1024, 2048, QuantSpec(4, 128, True), scale_dtype=dtype)
            weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed.to(DEVICE), dtype)
            x, residual = (inputs.normal(source, (M, width), dtype) for width in (2048, 1024))
            norm_weight = inputs.normal(source, (1024,), dtype)
            got, _ = run("wna16_linear_rms_norm", x, weight, residual, norm_weight, 1e-5, None, False)
            stream = run("wna16_linear", x, weight, None, residual, None)
            want = run("rms_norm", stream, norm_weight, 1e-5, None)
            yield f"wna16_linear_rms_norm {dtype} M={M}", compare_bits("norm", got, want)


def pending_norms() -> Iterator[tuple[str, Comparison]]:
    """A norm that one product leaves to the next, by blocks of one group of row tiles and of several."""
    dtype = torch.bfloat16
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for M in (1, 9, 16):
        for copy_engine in (False, True) if torch.cuda.get_device_capability()[0] >= 9 else (False,):
            source = inputs.generator(M)
            first, second = (
                inputs.packed_weight(source, N, K, QuantSpec(4, 128, True), scale_dtype=dtype)
                for N, K in ((320, 512), (77, 320))
            )
            config = library.binding.StreamConfig(
                token_tiles=2,
                row_tiles=2,
                row_blocks=3,
                warps=4,
                stages=2,
                copy_engine=copy_engine,
                overlaps_producer=False,
            )
            x, residual = (inputs.normal(source, (M, width), dtype, DEVICE) for width in (512, 320))
            norm_weight = inputs.normal(source, (320,), dtype, DEVICE)
            stream, weighted = torch.empty_like(residual), torch.empty_like(residual)
            squares = torch.empty(M, 20, dtype=torch.float32, device=DEVICE)
            norm = Norm(norm_weight, 1e-5, weighted, squares)
            launch_panels(x, prepare(first.to(DEVICE), dtype), None, residual, stream, False, config, norm)
            judged = judges.judge_wna16_linear(stream.cpu(), x.cpu(), first, residual=residual.cpu())
            yield f"a norm left M={M} {config}", judged
            out = torch.empty(M, 77, dtype=dtype, device=DEVICE)
            left = PendingNorm(weighted, squares, 1e-5)
            launch_panels(left, prepare(second.to(DEVICE), dtype), None, None, out, False, config)
            on_host = PendingNorm(weighted.cpu(), squares.cpu(), 1e-5)
            yield f"a norm taken M={M} {config}", judges.judge_wna16_linear(out.cpu(), on_host, second)


def attention() -> Iterator[tuple[str, Comparison]]:
    """Every dtype, head width and number of warps; one part and several; windows, softcaps, sinks."""
    for dtype in DTYPES:
        for head_dim in (64, 80, 96, 128, 256):
            for group, q_len in ((1, 1), (3, 1), (12, 1), (12, 5), (12, 8)):
                problem = inputs.paged_attention_inputs(
                    inputs.generator(group),
                    (270, 0, 9),
                    num_q_heads=2 * group,
                    num_kv_heads=2,
                    head_dim=head_dim,
                    block_size=16,
                    dtype=dtype,
                    window=133 if group == 3 else None,
                    q_len=q_len,
                    softcap=3.0 if group == 3 else None,
                    sinks=group == 3,
                    spare_blocks=2 if head_dim == 80 else 20,
                )
                fields = [getattr(problem, field.name) for field in dataclasses.fields(problem)]
                got = run("paged_attention_decode", *fields)
                yield (
                    f"paged_attention_decode {dtype} D={head_dim} group={group} q_len={q_len}",
                    judges.judge_paged_attention_decode(got, problem),
                )


def shared_attention() -> Iterator[tuple[str, Comparison]]:
    """Every instance of the kernel for prefixes that requests share, and those that find them."""
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (64, 96, 128, 256):
            for group, q_len in ((1, 1), (5, 3)):
                problem = inputs.paged_attention_inputs(
                    inputs.generator(group),
                    [270, 0, 900, *([330] * 100)],
                    num_q_heads=2 * group,
                    num_kv_heads=2,
                    head_dim=head_dim,
                    block_size=16,
                    dtype=dtype,
                    q_len=q_len,
                    sinks=group == 5,
                )
                inputs.share_prefix(problem, range(3, 103), 20)
                values = [getattr(problem, field.name) for field in dataclasses.fields(problem)]
                moved = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]
                table, lengths = moved[3:5]
                sizes = PagedAttentionDecodeProblem(
                    *(2 * group, 2, head_dim, 16, None, dtype, dtype, lengths.device)
                )
                plan = cuda.attention.plan_paged_attention(sizes, lengths, q_len, None, table)
                assert int(plan[1][3]) > 0, "nothing is shared"
                got = cuda.attention.paged_attention_decode(*moved[:9], None, plan)
                yield (
                    f"paged_attention_decode shared {dtype} D={head_dim} group={group} q_len={q_len}",
                    judges.judge_paged_attention_decode((got[0].cpu(), got[1].cpu()), problem),
                )


def coded_attention() -> Iterator[tuple[str, Comparison]]:
    """Every kind of codes, head width and number of warps; scales that nobody may look at are NaN."""
    for kind in KV_KINDS:
        for head_dim in (64, 128, 256):
            for group, q_len in ((3, 1), (8, 2), (8, 8)):
                source = inputs.generator(group)
                problem = inputs.paged_attention_inputs(
                    source,
                    (270, 0, 9),
                    num_q_heads=2 * group,
                    num_kv_heads=2,
                    head_dim=head_dim,
                    block_size=16,
                    dtype=torch.bfloat16,
                    kv_dtype=torch.float32,
                    window=133 if group == 3 else None,
                    q_len=q_len,
                    spare_blocks=20,
                )
                k, v = code_cache(source, problem.k_cache, kind), code_cache(source, problem.v_cache, kind)
                got = run(
                    *("paged_attention_decode", problem.q, k.cache, v.cache, problem.block_table),
                    *(problem.seq_lens, problem.softmax_scale, problem.window, None, None, None, None),
                    *(k.scale, v.scale),
                )
                judged = dataclasses.replace(problem, k_cache=k.values, v_cache=v.values)
                yield (
                    f"paged_attention_decode {kind} D={head_dim} group={group} q_len={q_len}",
                    judges.judge_paged_attention_decode(got, judged),
                )


def cache() -> Iterator[tuple[str, Comparison]]:
    """Wide copies and single elements."""
    for dtype in DTYPES:
        for head_dim in (5, 64):
            source = inputs.generator(head_dim)
            _, k, v = inputs.qkv_views(source, 7, 1, 3, head_dim, dtype)
            caches = tuple(inputs.normal(source, (4, 3, 8, head_dim), dtype) for _ in range(2))
            slots = inputs.slot_mapping(source, 7, 32, skip=0.3)
            on_device = [c.to(DEVICE) for c in caches]
            cuda.IMPLEMENTATIONS["write_kv_cache"].run(
                k.to(DEVICE), v.to(DEVICE), *on_device, slots.to(DEVICE)
            )
            got = (on_device[0].cpu(), on_device[1].cpu())
            yield (
                f"write_kv_cache {dtype} D={head_dim}",
                judges.judge_write_kv_cache(got, caches, k, v, slots),
            )


def fused_write() -> Iterator[tuple[str, Comparison]]:
    """Steps before the write, into values and codes: vectors and single elements, heads of many lanes."""
    for dtype in DTYPES:
        for head_dim, steps in ((12, ("norm", "rope")), (80, ("rope",)), (256, ("norm", "rope", "rotate"))):
            for kv in (dtype, *KV_KINDS):
                source = inputs.generator(head_dim)
                call = kv_write(source, 7, dtype=dtype, kv=kv, heads=(5, 3), head_dim=head_dim, steps=steps)
                got = written(call)
                yield (
                    f"write_kv_cache {dtype} D={head_dim} {'+'.join(steps)} {kv}",
                    judge_kv_write(got, call),
                )


def added_write() -> Iterator[tuple[str, Comparison]]:
    """Sums of a product that the write adds: few and many parts, by vectors and by elements."""
    for dtype in DTYPES[1:]:
        for head_dim, splits in ((12, 3), (128, 2), (128, 9)):
            source = inputs.generator(head_dim)
            call = kv_write(
                source, 7, dtype=dtype, kv=dtype, heads=(5, 3), head_dim=head_dim, steps=("rope",)
            )
            parts = inputs.normal(source, (splits, 7, 11, head_dim), torch.float32)
            sums = [PendingSums(part, dtype) for part in parts.split((5, 3, 3), dim=2)]
            q, k, v = (one.added() for one in sums)
            # Views of one product on the device, as it leaves them
            there = [PendingSums(part, dtype) for part in parts.to(DEVICE).split((5, 3, 3), dim=2)]
            caches = [one.to(DEVICE) for one in (call.before.k_cache, call.before.v_cache)]
            indices = [one.to(DEVICE) for one in (call.slot_mapping, call.positions, call.cos_sin)]
            out = write_sums(
                *(there[1], there[2], *caches, indices[0], there[0], *indices[1:], None, None),
                *(1e-6, False, None, None, False),
            )
            got = Written(out.cpu(), *(one.cpu() for one in caches), None, None)
            whole = dataclasses.replace(call, q=q, k=k, v=v)
            yield f"write_kv_cache of {splits} parts {dtype} D={head_dim}", judge_kv_write(got, whole)


def written(call: KvWrite) -> Written:
    """The call on copies of its tensors on the GPU; what it left, on the CPU."""
    before = call.before
    caches = [None if t is None else t.to(DEVICE) for t in (before.k_cache, before.v_cache)]
    scales = [None if t is None else t.to(DEVICE) for t in (before.k_scale, before.v_scale)]
    steps = (call.positions, call.cos_sin, call.q_norm, call.k_norm, call.eps, call.rotate)
    q = run("write_kv_cache", call.k, call.v, *caches, call.slot_mapping, call.q, *steps, *scales)
    return Written(q, *(None if t is None else t.cpu() for t in (*caches, *scales)))


def fused() -> Iterator[tuple[str, Comparison]]:
    """Wide loads and single elements, one warp and many."""
    for dtype in DTYPES:
        for width in (33, 1024):
            source = inputs.generator(width)
            x, residual = (inputs.normal(source, (3, width), dtype) for _ in range(2))
            weight = inputs.normal(source, (width,), dtype)
            yield (
                f"rms_norm {dtype} {width}",
                judges.judge_rms_norm(
                    run("rms_norm", x, weight, 1e-5, residual), x, weight, 1e-5, residual
                ),
            )  # fmt: skip
            pair = inputs.normal(source, (3, 2 * width), dtype)
            yield f"silu_and_mul {dtype} {width}", judges.judge_silu_and_mul(run("silu_and_mul", pair), pair)
        for head_dim in (6, 64):
            q, k, _ = inputs.qkv_views(inputs.generator(1), 5, 3, 1, head_dim, dtype)
            positions, cos_sin = torch.tensor([9, 0, 3, 3, 1]), torch.rand(10, head_dim)
            got = run("apply_rope", q, k, positions, cos_sin)
            yield f"apply_rope {dtype} D={head_dim}", judges.judge_apply_rope(got, q, k, positions, cos_sin)


def sampling() -> Iterator[tuple[str, Comparison]]:
    """Every dtype; rows that one block reads at once and rows that it reads in turns."""
    for dtype in DTYPES:
        for vocabulary in (33, 9001):
            arguments = inputs.sampling_inputs(inputs.generator(vocabulary), 16, vocabulary, dtype)
            got = run("sample_tokens", *arguments)
            yield f"sample_tokens {dtype} {vocabulary}", judges.judge_sample_tokens(got, *arguments)


FAMILIES = (
    *(linear, tiles_sm80, block_ends, pending_norms, attention, shared_attention, coded_attention),
    *(cache, fused_write, added_write, fused, sampling),
)


def main(names: Sequence[str]) -> int:
    """Run all families, or those named; print what is wrong and a count."""
    known = {family.__name__: family for family in FAMILIES}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"got {', '.join(unknown)}, expected some of {', '.join(known)}", file=sys.stderr)
        return 2
    reason = cuda.unavailable()
    if reason is not None:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(4)
    start, count, wrong = time.perf_counter(), 0, 0
    for family in FAMILIES if not names else [known[name] for name in names]:
        for name, comparison in family():
            count += 1
            if not comparison.ok:
                wrong += 1
                print(f"WRONG {name}: {comparison.report}")
    torch.cuda.synchronize()
    print(f"{count} results, {wrong} wrong, {time.perf_counter() - start:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
