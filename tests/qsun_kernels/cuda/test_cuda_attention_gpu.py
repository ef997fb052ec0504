"""paged_attention_decode: the CUDA kernels, on a GPU and through the emulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_paged_attention_decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend(kernels, problem):
    with inputs.poisoned_outputs():  # the scratch of the parts, too
        return kernels.run(
            "paged_attention_decode",
            problem.q,
            problem.k_cache,
            problem.v_cache,
            problem.block_table,
            problem.seq_lens,
            problem.softmax_scale,
            problem.window,
            problem.softcap,
            problem.sinks,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (8, 40, 64, 80, 96, 128, 256))
def test_every_head_width_and_group(kernels, dtype, head_dim) -> None:
    """Groups of 1 to 16 query heads; unused slots and blocks hold NaN."""
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
        lengths = kernels.pick((1, 300, 0, 17, 64, 1023), (33, 0, 16))
        problem = inputs.paged_attention_inputs(
            inputs.generator(group),
            lengths,
            num_q_heads=2 * group,
            num_kv_heads=2,
            head_dim=head_dim,
            block_size=16,
            dtype=dtype,
            device=kernels.device,
        )
        result = judge_paged_attention_decode(attend(kernels, problem), problem)
        assert result.ok, f"group {group}: {result.report}"


@pytest.mark.parametrize("part", range(8))
def test_random_problems(kernels, part) -> None:
    for seed in range(kernels.pick(40, 12)):
        source = inputs.generator(1000 * part + seed)

        def draw(*choices, source=source):
            return choices[int(torch.randint(len(choices), (1,), generator=source))]

        longest = kernels.pick(3000, 250)
        lengths = [
            draw(0, 1, int(torch.randint(1, longest, (1,), generator=source)))
            for _ in range(draw(1, 2, 3, kernels.pick(33, 4)))
        ]
        num_kv_heads = draw(1, 2, 3, 8)
        problem = inputs.paged_attention_inputs(
            source,
            lengths,
            num_q_heads=num_kv_heads * draw(1, 3, 4, 7, 8, 16),
            num_kv_heads=num_kv_heads,
            head_dim=draw(64, 80, 96, 128, 256),
            block_size=draw(8, 16, 32, 64, 128, 256),
            dtype=draw(*DTYPES),
            device=kernels.device,
            window=draw(None, None, 1, 50, 10_000),
            q_len=draw(1, 1, 2, 5, 8),
            softcap=draw(None, None, 3.0),
            sinks=draw(False, True),
            spare_blocks=draw(1, 2, 40),
            std=draw(1.0, 4.0),
        )
        result = judge_paged_attention_decode(attend(kernels, problem), problem)
        assert result.ok, f"seed {1000 * part + seed}, lengths {lengths}: {result.report}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", (1, 2, 5, 8))
def test_lengths_at_the_edges_of_tiles(kernels, dtype, q_len) -> None:
    """A query token may come before position 0, alone see a tile, or share 128 query rows."""
    for group, head_dim in ((1, 64), (6, 96), (16, 128)):
        problem = inputs.paged_attention_inputs(
            inputs.generator(q_len),
            (1, 15, 16, 17, 63, 64, 65, 127, 128, 129),
            num_q_heads=group,
            num_kv_heads=1,
            head_dim=head_dim,
            block_size=16,
            dtype=dtype,
            device=kernels.device,
            q_len=q_len,
        )
        judge_paged_attention_decode(attend(kernels, problem), problem).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (16, 2.0), (63, None), (64, 5.0), (65, None)])
def test_windows_softcaps_and_sinks(kernels, dtype, window, softcap) -> None:
    """Positions before a window are NaN; tiles begin at multiples of their size, windows anywhere."""
    for q_len, group, head_dim in ((1, 4, 128), (3, 8, 64)):
        problem = inputs.paged_attention_inputs(
            inputs.generator(window),
            kernels.pick((1000, 3, 64, 127, 200), (300, 3, 64, 127)),
            num_q_heads=2 * group,
            num_kv_heads=2,
            head_dim=head_dim,
            block_size=32,
            dtype=dtype,
            device=kernels.device,
            window=window,
            q_len=q_len,
            softcap=softcap,
            sinks=True,
            std=2.0,
        )
        judge_paged_attention_decode(attend(kernels, problem), problem).require()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_requests_without_tokens_have_their_sinks(kernels, dtype) -> None:
    problem = inputs.paged_attention_inputs(
        inputs.generator(3),
        (0, 2, 0),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype,
        device=kernels.device,
        q_len=3,
        sinks=True,
    )
    out, lse = attend(kernels, problem)
    judge_paged_attention_decode((out, lse), problem).require()
    nothing = [0, 1, 2, 3, 6, 7, 8]  # token 0 of the second request comes before its position 0
    assert (out[nothing] == 0).all()
    torch.testing.assert_close(lse[nothing], problem.sinks.expand(7, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_requests", (0, 1, 3))
def test_requests_without_tokens(kernels, num_requests) -> None:
    problem = inputs.paged_attention_inputs(
        inputs.generator(1),
        [0] * num_requests,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float16,
        device=kernels.device,
    )
    out, lse = attend(kernels, problem)
    assert out.shape == (num_requests, 4, 64) and (out == 0).all()
    assert lse.shape == (num_requests, 4) and (lse == -torch.inf).all()


@pytest.mark.parametrize("max_blocks", (4, 60, 400))
def test_any_number_of_parts(kernels, max_blocks) -> None:
    """A longer block table cuts the same lengths into more parts; empty parts leave no trace."""
    problem = inputs.paged_attention_inputs(
        inputs.generator(2),
        (64, 3, 50, 0),
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        device=kernels.device,
        spare_blocks=max_blocks - 4,
    )
    assert problem.block_table.shape[1] == max_blocks
    judge_paged_attention_decode(attend(kernels, problem), problem).require()


def test_a_nan_stays_in_its_request(kernels) -> None:
    problem = inputs.paged_attention_inputs(
        inputs.generator(4),
        (40, 40, 40),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=8,
        dtype=torch.bfloat16,
        device=kernels.device,
    )
    clean, clean_lse = attend(kernels, problem)
    block = int(problem.block_table[1, 2])
    problem.k_cache[block, 1, 3, 5] = torch.nan
    spoiled, spoiled_lse = attend(kernels, problem)
    assert spoiled[1, 2:].isnan().all() and spoiled_lse[1, 2:].isnan().all()
    for request in (0, 2):
        assert torch.equal(spoiled[request], clean[request])
    assert torch.equal(spoiled[1, :2], clean[1, :2]) and torch.equal(spoiled_lse[1, :2], clean_lse[1, :2])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("group", "q_len"), [(4, 1), (8, 3), (16, 5)])
def test_results_repeat_bit_for_bit(kernels, dtype, group, q_len) -> None:
    problem = inputs.paged_attention_inputs(
        inputs.generator(8),
        kernels.pick((9000, 1, 700, 0, 4000, 64), (500, 1, 0, 64)),
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=128,
        block_size=16,
        dtype=dtype,
        device=kernels.device,
        q_len=q_len,
    )
    first = attend(kernels, problem)
    for _ in range(kernels.pick(20, 2)):
        again = attend(kernels, problem)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_views_at_odd_places(kernels) -> None:
    """q with an odd stride and an odd beginning, out in the middle of other memory."""
    problem = inputs.paged_attention_inputs(
        inputs.generator(5),
        (70, 0, 20),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float16,
        device=kernels.device,
    )
    expected, _ = attend(kernels, problem)
    space = torch.full((1 + 3 * 257,), torch.nan, dtype=torch.float16, device=kernels.device)
    q = space[1:].as_strided((3, 4, 64), (257, 64, 1))
    q.copy_(problem.q)
    memory = torch.full((2 + expected.numel(),), 7.0, dtype=torch.float16, device=kernels.device)
    out = memory[1:-1].view(3, 4, 64)
    caches = (problem.k_cache, problem.v_cache, problem.block_table, problem.seq_lens)
    got, _ = kernels.run("paged_attention_decode", q, *caches, problem.softmax_scale, None, None, None, out)
    assert got is out and torch.equal(out, expected)
    assert memory[0] == 7 and memory[-1] == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_small_weights_count_where_the_large_one_meets_zero(kernels, dtype, head_dim) -> None:
    """One position has nearly all the weight and zeros in half of its elements: there the others decide.

    Each of them weighs less than half of the smallest float16, all together not.
    """
    a = inputs.paged_attention_inputs(
        inputs.generator(3),
        (40, 300),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=16,
        dtype=dtype,
        device=kernels.device,
    )
    for request in range(2):
        block, slot = int(a.block_table[request, 1]), 5
        a.k_cache[a.block_table[request]] = 0
        a.k_cache[block, 0, slot] = 1
        a.v_cache[block, 0, slot, ::2] = 0
    a.q.fill_(1)
    a.v_cache.abs_()
    a = replace(a, softmax_scale=17.5 / head_dim)
    out, lse = attend(kernels, a)
    for request, length in enumerate((40, 300)):
        positions = torch.arange(length, device=kernels.device)
        rows = a.v_cache[a.block_table[request, positions // 16].long(), 0, positions % 16]
        weight = math.exp(-17.5) / (1 + (length - 1) * math.exp(-17.5))
        expected = weight * rows[:, ::2].double().sum(0)
        torch.testing.assert_close(
            out[request, :, ::2].double(), expected.expand(2, -1), rtol=1e-2, atol=2.0**-25
        )
    judge_paged_attention_decode((out, lse), a).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_that_float32_holds_in_whole_numbers(kernels, dtype) -> None:
    """1.28e8 beside zeros: all of the weight, and no more."""
    a = inputs.paged_attention_inputs(
        inputs.generator(4),
        (40,),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=128,
        block_size=16,
        dtype=dtype,
        device=kernels.device,
    )
    block, slot = int(a.block_table[0, 1]), 5
    a.k_cache[a.block_table[0]] = 0
    a.k_cache[block, 0, slot] = 1000
    a.q.fill_(1000)
    out, lse = attend(kernels, replace(a, softmax_scale=1.0))
    assert torch.equal(out, a.v_cache[block, 0, slot].expand_as(out))
    assert torch.allclose(lse, torch.full_like(lse, 128 * 1000.0**2))


@pytest.mark.parametrize("std", (30.0, 1000.0, 1e4))
def test_extreme_scores(kernels, std) -> None:
    """Scores in the thousands: one token takes all the weight, and nothing overflows."""
    problem = inputs.paged_attention_inputs(
        inputs.generator(6),
        (200, 7),
        num_q_heads=3,
        num_kv_heads=3,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        device=kernels.device,
        std=std,
    )
    judge_paged_attention_decode(attend(kernels, problem), problem).require()


@pytest.mark.slow
@pytest.mark.damaged
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"seq_lens": 49},  # the block table has room for 48
        {"seq_lens": 2**31 - 1},
        {"block_table": -1},
        {"block_table": 1000},
    ],
    ids=str,
)
def test_indices_outside_their_tensors_trap(emulated_kernels, change, dtype) -> None:
    """On a GPU: test_cuda_traps_gpu.py."""
    problem = inputs.paged_attention_inputs(
        inputs.generator(0),
        (20,),
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=64,
        block_size=16,
        dtype=dtype,
        spare_blocks=1,
    )
    for name, value in change.items():
        getattr(problem, name).fill_(value)
    with pytest.raises(KernelLaunchError, match=r"paged_attention.*trap"):
        attend(emulated_kernels, problem)


@pytest.mark.gpu
def test_long_contexts(device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        problem = inputs.paged_attention_inputs(
            inputs.generator(9),
            (33_000, 1, 8192, 20_001),
            num_q_heads=32,
            num_kv_heads=8,
            head_dim=128,
            block_size=16,
            dtype=dtype,
            device=device,
        )
        with inputs.poisoned_outputs():
            got = cuda.IMPLEMENTATIONS["paged_attention_decode"].run(
                problem.q,
                problem.k_cache,
                problem.v_cache,
                problem.block_table,
                problem.seq_lens,
                problem.softmax_scale,
                None,
            )
        judge_paged_attention_decode(got, problem).require()


@pytest.mark.gpu
def test_a_cache_of_more_elements_than_32_bits_count(device) -> None:
    """Blocks at the end of a cache of 2.3 billion elements are written and attended to."""
    dtype, heads, head_dim, block_size = torch.float16, 8, 128, 16
    small = inputs.paged_attention_inputs(
        inputs.generator(3),
        (100, 37),
        num_q_heads=32,
        num_kv_heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
    num_blocks, own = 140_000, small.k_cache.shape[0]
    caches = [
        torch.full((num_blocks, heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
        for _ in range(2)
    ]
    assert caches[0].numel() > 2**31
    for large, cache in zip(caches, (small.k_cache, small.v_cache), strict=True):
        large[-own:] = cache
    source = inputs.generator(4)
    _, k, v = inputs.qkv_views(source, 1, 1, heads, head_dim, dtype, device)
    last = num_blocks * block_size - 1
    cuda.IMPLEMENTATIONS["write_kv_cache"].run(k, v, *caches, torch.tensor([last], device=device))
    assert torch.equal(caches[0][-1, :, -1], k[0]) and torch.equal(caches[1][-1, :, -1], v[0])
    for large, cache in zip(caches, (small.k_cache, small.v_cache), strict=True):
        cache[-1, :, -1] = large[-1, :, -1]
    got = cuda.IMPLEMENTATIONS["paged_attention_decode"].run(
        small.q,
        *caches,
        small.block_table + (num_blocks - own),
        small.seq_lens,
        small.softmax_scale,
        None,
    )
    judge_paged_attention_decode(got, small).require()
