"""Every instance of every CUDA kernel once, at awkward sizes, for compute-sanitizer.

    compute-sanitizer --tool memcheck  --error-exitcode 9 python tests/qsun_kernels/cuda/sanitizer_suite.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/qsun_kernels/cuda/sanitizer_suite.py

Inputs are made and results judged on the CPU, so that the tool has our kernels to watch and few others.
Without torch's caching of memory every tensor is an allocation of its own, and an access past its end is
seen. Exit status 1 when a result is wrong.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported

import torch

from qsun_kernels.backends import cuda, reference
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing import judge as judges
from qsun_kernels.testing.coded_cache import code_cache
from qsun_kernels.testing.kv_codes import KV_KINDS
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


def codes() -> Iterator[tuple[str, Comparison]]:
    """Keys and values as codes: aligned vectors and single elements, heads of many lanes and few."""
    write = reference.IMPLEMENTATIONS["write_kv_cache"].run
    kinds = ((torch.float8_e4m3fn, 1), (torch.float8_e4m3fn, 3), (torch.int8, 3), (torch.uint8, 3))
    for dtype in DTYPES:
        for head_dim in (12, 80, 256):
            for kv_dtype, dimensions in kinds:
                source = inputs.generator(head_dim)
                q, k, v = inputs.qkv_views(source, 7, 5, 3, head_dim, dtype)
                shape = (4, 3, 8, head_dim // 2 if kv_dtype == torch.uint8 else head_dim)
                caches = [torch.zeros(shape, dtype=torch.uint8).view(kv_dtype) for _ in range(2)]
                caches += [torch.full(shape[:3] if dimensions == 3 else (1,), 0.01) for _ in range(2)]
                slots = inputs.slot_mapping(source, 7, 32, skip=0.3)
                norms = [torch.ones(head_dim, dtype=dtype) for _ in range(2)]
                steps = (q, torch.arange(7), torch.rand(7, head_dim), *norms, 1e-6, head_dim == 256)
                on_device = [c.to(DEVICE) for c in caches]
                run("write_kv_cache", k, v, *on_device[:2], slots, *steps, *on_device[2:])
                write(k, v, *caches[:2], slots, *steps, *caches[2:])
                got, want = (c.cpu().view(torch.uint8) for c in (on_device[1], caches[1]))
                yield f"write_kv_cache {dtype} D={head_dim} {kv_dtype}", compare_bits("v", got, want)


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
        for vocabulary in (33, 9001):
            arguments = inputs.sampling_inputs(inputs.generator(vocabulary), 16, vocabulary, dtype)
            got = run("sample_tokens", *arguments)
            yield f"sample_tokens {dtype} {vocabulary}", judges.judge_sample_tokens(got, *arguments)
        for head_dim in (6, 64):
            q, k, _ = inputs.qkv_views(inputs.generator(1), 5, 3, 1, head_dim, dtype)
            positions, cos_sin = torch.tensor([9, 0, 3, 3, 1]), torch.rand(10, head_dim)
            got = run("apply_rope", q, k, positions, cos_sin)
            yield f"apply_rope {dtype} D={head_dim}", judges.judge_apply_rope(got, q, k, positions, cos_sin)


def main() -> int:
    """Run all; print what is wrong and a count."""
    reason = cuda.unavailable()
    if reason is not None:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(4)
    start, count, wrong = time.perf_counter(), 0, 0
    for family in (linear, attention, coded_attention, cache, codes, fused):
        for name, comparison in family():
            count += 1
            if not comparison.ok:
                wrong += 1
                print(f"WRONG {name}: {comparison.report}")
    torch.cuda.synchronize()
    print(f"{count} results, {wrong} wrong, {time.perf_counter() - start:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
