"""Sums that a split product leaves to write_kv_cache: what the first writes, what the second adds, both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels import (
    PendingSums,
    paged_attention_decode,
    plan_paged_attention,
    prepare_weight,
    sums_may_pend,
    wna16_linear,
    wna16_linear_pending_sums,
    write_kv_cache,
)
from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.cuda.write_kv_cache import write_sums
from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KV_KINDS
from qsun_kernels.testing.kv_writes import KvWrite, kv_write

DTYPES = (torch.float16, torch.bfloat16)
SPEC = QuantSpec(4, 128, True)


def random_weight(
    source, N: int, K: int, dtype: torch.dtype, device, spec: QuantSpec = SPEC
) -> PreparedWeight:
    packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=device)
    return cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, dtype)


def tiles(split_k: int, **settings: Any) -> Any:
    defaults = {
        "token_tiles": 2,
        "row_groups": 1,
        "column_groups": 2,
        "stages": 2,
        "overlaps_producer": False,
    }
    return library.binding.TilesConfig(**{**defaults, "split_k": split_k, **settings})


def left(x: Tensor, weight: PreparedWeight, config: Any) -> PendingSums:
    """By the kernel with this configuration, padding included."""
    shape = (config.split_k, x.shape[0], -(-weight.N // 64) * 64)
    parts = torch.full(shape, torch.nan, device=x.device)
    linear.launch_panels(x, weight, None, None, None, False, config, sums=parts)
    return PendingSums(parts, weight.dtype)


def product(x: Tensor, weight: PreparedWeight, config: Any) -> Tensor:
    out = torch.full((x.shape[0], weight.N), torch.nan, dtype=x.dtype, device=x.device)
    linear.launch_panels(x, weight, None, None, out, False, config)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parts_come_to_the_product(kernels, dtype) -> None:
    """Bit for bit; rows of the weight past the last are zero. By wgmma as well where there is a GPU."""
    for N, K, M, split_k in ((77, 400, 3, 2), (200, 1024, 17, 5), (64, 512, 33, 4)):
        source = inputs.generator(N)
        weight = random_weight(source, N, K, dtype, kernels.device)
        x = inputs.normal(source, (M, K), dtype, kernels.device)
        configs = [tiles(min(split_k, K // 128))]
        if kernels.is_gpu:
            told = {"token_tile": 32, "warp_groups": 1, "stages": 2, "adds_in_cluster": False}
            configs.append(library.binding.GemmConfig(split_k=2, **told))
        for config in configs:
            sums = left(x, weight, config)
            assert torch.equal(sums.added()[:, :N], product(x, weight, config))
            assert not sums.parts[..., N:].any()


def sums_of(source, splits: int, tokens: int, head_dim: int, dtype: torch.dtype, columns: int = 0):
    """q, k and v of 5, 3 and 3 heads as a product leaves them, NaN in `columns` floats behind each token."""
    base = inputs.normal(source, (splits, tokens, 11 * head_dim + columns), torch.float32)
    base[..., 11 * head_dim :] = torch.nan
    parts = base[..., : 11 * head_dim].unflatten(2, (11, head_dim)).split((5, 3, 3), dim=2)
    return [PendingSums(part, dtype) for part in parts]


def arguments(call: KvWrite, q: Any, k: Any, v: Any, settled: bool = False) -> list[Any]:
    before = call.before
    caches = [before.k_cache.clone(), before.v_cache.clone()]
    scales = [None if one is None else one.clone() for one in (before.k_scale, before.v_scale)]
    steps = (call.positions, call.cos_sin, call.q_norm, call.k_norm, call.eps, call.rotate)
    return [k, v, *caches, call.slot_mapping, q, *steps, *scales, settled]


def moved(value: Any, device: torch.device) -> Any:
    """The same views of copies there."""
    if isinstance(value, PendingSums):
        return replace(value, parts=moved(value.parts, device))
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value.to(device) if isinstance(value, Tensor) else value
    base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return base.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def written(kernels, call: KvWrite, q: Any, k: Any, v: Any, settled: bool = False) -> list[Tensor]:
    """q and what the caches and scales hold after the call, on the CPU."""
    there = [moved(one, kernels.device) for one in arguments(call, q, k, v, settled)]
    run = partial(kernels.run, "write_kv_cache") if isinstance(k, Tensor) else write_sums
    with inputs.poisoned_outputs():
        out = run(*there)
    return [one.cpu() for one in (out, there[2], there[3], *there[12:14]) if one is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (16, 96, 100, 128))
def test_a_write_adds_what_was_left(kernels, dtype, head_dim) -> None:
    """To the bits of the rows that the parts come to: every cache, more parts than are loaded at once, heads
    by vectors and by elements, aligned rows and others.
    """
    kinds = (dtype, torch.float32, *KV_KINDS)
    for index, splits in enumerate((1, 2, 3, 4, 5, 9, 16)):
        source = inputs.generator(index)
        kv = kinds[index % len(kinds)]
        steps = ("norm", "rope", "rotate") if head_dim in (16, 128) and index % 2 else ("norm", "rope")
        call = kv_write(source, 5, dtype=dtype, kv=kv, head_dim=head_dim, heads=(5, 3), steps=steps)
        sums = sums_of(source, splits, 5, head_dim, dtype, columns=index % 3)
        got = written(kernels, call, *sums)
        expected = written(kernels, call, *(one_of.added() for one_of in sums))
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "3"])
def test_sums_are_read_when_the_product_has_ended(emulated_kernels, guard, monkeypatch, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    source, dtype = inputs.generator(0), torch.bfloat16
    call = kv_write(source, 5, dtype=dtype, kv=dtype, head_dim=64, steps=("norm", "rope"))
    sums = sums_of(source, 3, 5, 64, dtype)
    expected = written(emulated_kernels, call, *(one.added() for one in sums))
    guard(sums[0].parts._base)
    there = arguments(call, *sums, settled=True)
    out = write_sums(*there)
    for mine, theirs in zip((out, there[2], there[3]), expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_what_cannot_be_left_is_refused(kernels) -> None:
    source, dtype = inputs.generator(0), torch.bfloat16
    weight = random_weight(source, 64, 512, dtype, kernels.device)
    x = inputs.normal(source, (3, 512), dtype, kernels.device)
    parts = torch.empty(2, 3, 64, device=kernels.device)
    bias = inputs.normal(source, (64,), dtype, kernels.device)
    with pytest.raises(KernelLaunchError, match="leaves_sums is yes with one split"):
        linear.launch_panels(x, weight, None, None, None, False, tiles(1), sums=parts)
    with pytest.raises(KernelLaunchError, match="leaves_sums is yes with gate_up, bias, residual or a norm"):
        linear.launch_panels(x, weight, bias, None, None, False, tiles(2), sums=parts)
    with pytest.raises(KernelLaunchError, match="scratch_bytes is 768; expected at least 1536"):
        linear.launch_panels(x, weight, None, None, None, False, tiles(2), sums=parts[:1])
    stream = library.binding.StreamConfig(
        **{"token_tiles": 1, "row_tiles": 2, "row_blocks": 1, "warps": 2, "stages": 2},
        **{"copy_engine": False, "overlaps_producer": False},
    )
    with pytest.raises(KernelLaunchError, match="leaves_sums is yes with one split"):
        linear.launch_panels(x, weight, None, None, None, False, stream, sums=parts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_follow_the_library(device, dtype) -> None:
    """Where the library splits the product of a model's q, k and v, its sums can be left, and only there."""
    source, D, heads = inputs.generator(0), 128, (32, 8, 8)
    packed = inputs.packed_weight(source, 6144, 4096, SPEC, scale_dtype=dtype, device=device)
    weight = prepare_weight(packed, dtype=dtype, backend="cuda")
    angles = torch.randn(512, D, generator=source).to(device)
    splits = set()
    for M in (1, 8, 17, 32, 33, 64, 96, 128, 256):
        assert not sums_may_pend(0, weight)
        if not sums_may_pend(M, weight):
            continue
        x = inputs.normal(source, (M, 4096), dtype, device)
        rows = wna16_linear(x, weight)
        for given in (x, unaligned(x)):
            sums = wna16_linear_pending_sums(given, weight)
            assert torch.equal(sums.added(), rows)
        splits.add(len(sums.parts))
        positions = torch.randint(512, (M,), generator=source).to(device)
        slots = torch.randperm(1024, generator=source)[:M].to(device)
        results = []
        parts = sums.parts.unflatten(2, (48, D)).split(heads, dim=2)
        for q, k, v in (
            rows.view(M, 48, D).split(heads, dim=1),
            [PendingSums(part, dtype) for part in parts],
        ):
            caches = [torch.zeros(64, 8, 16, D, dtype=dtype, device=device) for _ in range(2)]
            q = write_kv_cache(k, v, *caches, slots, q=q, positions=positions, cos_sin=angles)
            results.append([q, *caches])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert len(splits) > 1 and min(splits) > 1


def unaligned(x: Tensor) -> Tensor:
    """The same rows one element further in memory."""
    space = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return space[1:].view(x.shape).copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("M", (17, 32, 64, 128))
def test_a_chain_in_a_graph_repeats(device, M) -> None:
    """Product, write and attention that overlap one another, many times, with the bits of calls that wait."""
    source, D, dtype, heads = inputs.generator(M), 128, torch.bfloat16, (32, 8, 8)
    packed = [
        inputs.packed_weight(source, 6144, 4096, SPEC, scale_dtype=dtype, device=device) for _ in range(2)
    ]
    weights = [prepare_weight(one, dtype=dtype, backend="cuda") for one in packed]
    assert sums_may_pend(M, weights[0])
    start = inputs.normal(source, (M, 4096), dtype, device)
    angles = torch.randn(512, D, generator=source).to(device)
    table = torch.randperm(M * 10, generator=source).int().view(M, 10).to(device)
    lengths = torch.randint(1, 160, (M,), generator=source).int().to(device)
    positions = lengths.long() - 1
    slots = table.gather(1, positions[:, None] // 16).squeeze(1).long() * 16 + positions % 16
    old = [inputs.normal(source, (M * 10, 8, 16, D), dtype, device) for _ in range(2)]
    caches = [one.clone() for one in old]
    sizes = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": D, "block_size": 16}
    plan = plan_paged_attention(lengths, **sizes, dtype=dtype, kv_dtype=dtype, backend="cuda")

    def chain(wait: bool) -> list[Tensor]:
        x, results = start, []
        for step in range(6):
            sums = wna16_linear_pending_sums(x, weights[step % 2])
            if wait:
                torch.cuda.synchronize()
            parts = sums.parts.unflatten(2, (48, D)).split(heads, dim=2)
            q, k, v = (PendingSums(part, dtype) for part in parts)
            q = write_kv_cache(
                *(k, v, *caches, slots), q=q, positions=positions, cos_sin=angles, settled=step > 0
            )
            if wait:
                torch.cuda.synchronize()
            out = paged_attention_decode(
                *(q, *caches, table, lengths), softmax_scale=0.01, plan=plan, follows_write=True
            )
            if wait:
                torch.cuda.synchronize()
            x = out.view(M, 4096)
            results += [q, x]
        return results

    expected = [*(one.clone() for one in chain(True)), *(one.clone() for one in caches)]
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(20):
        for cache, before in zip(caches, old, strict=True):
            cache.copy_(before)
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip([*got, *caches], expected, strict=True))
