"""paged_attention_decode on caches of codes: fp8, int8 and int4, on a GPU and through the emulator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends.cuda import attention, library
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs
from qsun_kernels.testing.coded_cache import CodedCache, code_cache
from qsun_kernels.testing.cuda_attention import attend, config, plan_of
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.judge import judge_paged_attention_decode
from qsun_kernels.testing.kv_codes import KV_KINDS, dequantised, quantised_rows

HALVES = (torch.float16, torch.bfloat16)
# One instance serves both dtypes of q, so the emulator runs one of them, and fewer of the other choices.
ONE_EMULATED = (pytest.param(torch.float16, marks=pytest.mark.exhaustive), torch.bfloat16)


def fewer_emulated(values: tuple[Any, ...], kept: tuple[Any, ...]) -> list[Any]:
    """Parameters of which `make test-slow` emulates only the `kept`."""
    return [v if v in kept else pytest.param(v, marks=pytest.mark.exhaustive) for v in values]


@dataclass(frozen=True, slots=True)
class Problem:
    """A call on codes, and the same call on the values that they stand for, by which it is judged."""

    judged: PagedAttentionInputs
    k: CodedCache
    v: CodedCache

    @property
    def called(self) -> PagedAttentionInputs:
        a = self.judged
        k_cache, v_cache, k_scale, v_scale = (
            part.to(a.q.device) for part in (self.k.cache, self.v.cache, self.k.scale, self.v.scale)
        )
        return replace(a, k_cache=k_cache, v_cache=v_cache, k_scale=k_scale, v_scale=v_scale)

    def run(self, plan: Any = None, told: Any = None) -> tuple[Tensor, Tensor]:
        return attend(self.called, plan, told)

    def plan(self, told: Any = None) -> tuple[Tensor, ...]:
        return plan_of(self.called, told)

    def judge(self, got: tuple[Tensor, Tensor]) -> Any:
        return judge_paged_attention_decode(got, self.judged)


def problem_of(
    source: torch.Generator, lengths, *, kind: str, dtype: torch.dtype, device, spread: int = 0, **sizes: Any
) -> Problem:
    a = inputs.paged_attention_inputs(source, lengths, dtype=dtype, kv_dtype=torch.float32, **sizes)
    k = code_cache(source, a.k_cache, kind)
    v = code_cache(source, a.v_cache, kind, spread=spread)
    sinks = None if a.sinks is None else a.sinks.to(device)
    heads, head_dim = a.q.shape[1:]
    # q stays a strided view: its rows are a head further apart than they are long.
    q = torch.full((a.q.shape[0], heads + 1, head_dim), torch.nan, dtype=dtype, device=device)[:, :heads]
    q.copy_(a.q)
    judged = PagedAttentionInputs(
        *(q, k.values.to(device), v.values.to(device), a.block_table.to(device), a.seq_lens.to(device)),
        *(a.softmax_scale, a.window, a.softcap, sinks),
    )
    return Problem(judged, k, v)


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dtype", ONE_EMULATED, ids=str)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_every_head_width_and_group(kernels, dtype, head_dim, kind) -> None:
    """Groups of 1 to 16 query heads; unused slots and blocks hold any codes and scales of NaN."""
    for group in kernels.pick((1, 2, 3, 4, 5, 6, 7, 8, 9, 16), (1, 3, 8, 9, 16)):
        problem = problem_of(
            inputs.generator(group),
            kernels.pick((1, 300, 0, 17, 64, 1023), (33, 0, 16, 130)),
            kind=kind,
            dtype=dtype,
            device=kernels.device,
            num_q_heads=2 * group,
            num_kv_heads=2,
            head_dim=head_dim,
            block_size=16,
        )
        result = problem.judge(problem.run())
        assert result.ok, f"group {group}: {result.report}"


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("part", fewer_emulated((0, 1, 2, 3), (0,)))
def test_random_problems(kernels, part, kind) -> None:
    for seed in range(kernels.pick(40, 8)):
        source = inputs.generator(1000 * part + seed)

        def draw(*choices, source=source):
            return choices[int(torch.randint(len(choices), (1,), generator=source))]

        longest = kernels.pick(3000, 250)
        lengths = [
            draw(0, 1, int(torch.randint(1, longest, (1,), generator=source)))
            for _ in range(draw(1, 2, 3, kernels.pick(33, 4)))
        ]
        num_kv_heads = draw(1, 2, 3, 8)
        head_dim = draw(64, 128, 128, 256)
        problem = problem_of(
            source,
            lengths,
            kind=kind,
            dtype=draw(*HALVES),
            device=kernels.device,
            spread=draw(0, 0, 6),
            num_q_heads=num_kv_heads * draw(1, 3, 4, 7, 8),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=draw(16, 32, 64, 128),
            window=draw(None, None, 1, 50, 10_000),
            q_len=draw(1, 1, 2, 5, 8),
            softcap=draw(None, None, 3.0),
            sinks=draw(False, True),
            spare_blocks=draw(1, 2, 40),
            std=draw(1.0, 4.0),
        )
        result = problem.judge(problem.run())
        assert result.ok, f"seed {1000 * part + seed}, lengths {lengths}: {result.report}"


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("q_len", fewer_emulated((1, 2, 5, 8), (1, 5)))
def test_lengths_at_the_edges_of_slices(kernels, kind, q_len) -> None:
    """A query token may come before position 0, alone see a slice, or share 128 query rows."""
    lengths = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129)
    for group, head_dim in ((1, 64), (6, 128), (16, 128)):
        problem = problem_of(
            inputs.generator(q_len),
            lengths,
            kind=kind,
            dtype=torch.bfloat16,
            device=kernels.device,
            num_q_heads=group,
            num_kv_heads=1,
            head_dim=head_dim,
            block_size=16,
            q_len=q_len,
        )
        problem.judge(problem.run()).require()


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("window", fewer_emulated((1, 16, 31, 63, 64, 65), (31, 65)))
def test_windows_softcaps_and_sinks(kernels, kind, window) -> None:
    """Before a window scales are NaN, also where four of them are copied at once."""
    for q_len, group, softcap in ((1, 4, None), (3, 8, 2.0)):
        problem = problem_of(
            inputs.generator(window),
            kernels.pick((1000, 3, 64, 127, 200), (300, 3, 64, 127)),
            kind=kind,
            dtype=torch.float16,
            device=kernels.device,
            num_q_heads=2 * group,
            num_kv_heads=2,
            head_dim=64,
            block_size=32,
            window=window,
            q_len=q_len,
            softcap=softcap,
            sinks=True,
            std=2.0,
        )
        problem.judge(problem.run()).require()


def of_one_token(kind: str, dtype: torch.dtype, head_dim: int, device) -> Problem:
    """Requests of a token each whose values are all codes of a kind, each in every place of a word."""
    codes = 16 if kind == "int4" else 256
    lengths = [1] * codes
    problem = problem_of(
        *(inputs.generator(1), lengths),
        **{"kind": kind, "dtype": dtype, "device": device, "num_q_heads": 4, "num_kv_heads": 1},
        **{"head_dim": head_dim, "block_size": 16},
    )
    a, v = problem.judged, problem.v
    blocks = a.block_table[:, 0].cpu().long()
    every = (torch.arange(head_dim) + torch.arange(codes)[:, None]).remainder(codes).to(torch.uint8)
    if kind == "int4":
        every = every[:, 0::2] | every[:, 1::2] << 4
    v.cache.view(torch.uint8)[blocks, 0, 0] = every
    if kind == "fp8-tensor":
        v.scale.fill_(0.37)
    else:
        v.scale[blocks, 0, 0] = 0.37
    v = CodedCache(v.cache, v.scale, dequantised(v.cache, v.scale))
    return Problem(replace(a, v_cache=v.values.to(device)), problem.k, v)


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dtype", ONE_EMULATED, ids=str)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_every_code_in_every_place(kernels, kind, dtype, head_dim) -> None:
    """A request of one token has its values for result; NaN is NaN in its own place alone."""
    problem = of_one_token(kind, dtype, head_dim, kernels.device)
    out, _ = problem.run()
    blocks = problem.judged.block_table[:, 0].long()
    expected = problem.judged.v_cache[blocks, 0, 0].to(dtype).float()[:, None].expand(-1, 4, -1)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected.isnan().any() == kind.startswith("fp8")
    torch.testing.assert_close(out.float().nan_to_num(), expected.nan_to_num(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_every_element_of_a_key_meets_its_own_of_q(kernels, kind, head_dim) -> None:
    """q is one element, keys are noise: the lse is that element of the key."""
    problem = problem_of(
        *(inputs.generator(1), [1] * head_dim),
        **{"kind": kind, "dtype": torch.bfloat16, "device": kernels.device, "num_q_heads": 2},
        **{"num_kv_heads": 2, "head_dim": head_dim, "block_size": 16},
    )
    a = problem.judged
    a.q.copy_(torch.eye(head_dim, device=kernels.device)[:, None])
    _, lse = problem.run()
    own = a.block_table[:, 0].long()
    keys = a.k_cache[own, :, 0]  # (D, Hkv, D)
    expected = keys.diagonal(dim1=0, dim2=2).T * a.softmax_scale
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ("fp8", "int8", "int4"))
@pytest.mark.parametrize("of", ("k", "v"))
def test_a_scale_of_nan_stays_in_its_request_and_head(kernels, kind, of) -> None:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    problem = problem_of(
        inputs.generator(4), (40, 70, 40), kind=kind, dtype=torch.bfloat16, device=kernels.device, **sizes
    )
    clean, clean_lse = problem.run()
    block = int(problem.judged.block_table[1, 2])
    getattr(problem, of).scale[block, 1, 3] = torch.nan
    spoiled, spoiled_lse = problem.run()
    assert spoiled[1, 2:].isnan().all()
    assert spoiled_lse[1, 2:].isnan().all() == (of == "k")
    for request in (0, 2):
        assert torch.equal(spoiled[request], clean[request])
    assert torch.equal(spoiled[1, :2], clean[1, :2]) and torch.equal(spoiled_lse[1, :2], clean_lse[1, :2])


@pytest.mark.parametrize("kind", ("fp8", "int8", "int4"))
@pytest.mark.parametrize("dtype", ONE_EMULATED, ids=str)
def test_scales_of_any_size(kernels, kind, dtype) -> None:
    """Scales of values from 2^-14 to 2^14 in one request: no weight overflows, none that counts is lost."""
    problem = problem_of(
        inputs.generator(7),
        (300, 64, 5),
        kind=kind,
        dtype=dtype,
        device=kernels.device,
        spread=14,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        std=0.1,
    )
    problem.judge(problem.run()).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_values_of_zero_do_not_move_the_sum(kernels, kind) -> None:
    """Scales of 0 beside others, and a request of nothing else: results 0, and the lse of the scores."""
    sizes = {"num_q_heads": 4, "num_kv_heads": 1, "head_dim": 128, "block_size": 16, "std": 3.0}
    problem = problem_of(
        inputs.generator(8), (50, 100), kind=kind, dtype=torch.bfloat16, device=kernels.device, **sizes
    )
    a, v = problem.judged, problem.v
    used = a.block_table.cpu().long()
    if kind == "fp8-tensor":
        v.scale.zero_()
    else:
        v.scale[used[0, :4]] = 0.0
        v.scale[used[1, :2]] = 0.0
    v = CodedCache(v.cache, v.scale, dequantised(v.cache, v.scale))
    problem = Problem(replace(a, v_cache=v.values.to(kernels.device)), problem.k, v)
    out, lse = problem.run()
    assert (out[0] == 0).all()
    problem.judge((out, lse)).require()


@pytest.mark.parametrize("kind", ("fp8", "int8", "int4"))
def test_small_weights_count_where_the_large_one_meets_zero(kernels, kind) -> None:
    """One position has nearly all the weight and zeros in half of its elements: there the others decide."""
    sizes = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64, "block_size": 16}
    problem = problem_of(
        inputs.generator(3), (40,), kind=kind, dtype=torch.bfloat16, device=kernels.device, **sizes
    )
    a, v = problem.judged, problem.v
    block, slot = int(a.block_table[0, 1]), 5
    zero = quantised_rows(torch.zeros(64), kind)[0].view(torch.uint8)
    codes = v.cache.view(torch.uint8)
    codes[block, 0, slot, ::2] = zero[::2].to(codes.device)
    v = CodedCache(v.cache, v.scale, dequantised(v.cache, v.scale))
    # Other weights are about exp(-0.25 * 64) of that one's.
    a.q.copy_(a.k_cache[block, 0, slot].expand_as(a.q))
    a = replace(a, v_cache=v.values.to(kernels.device), softmax_scale=0.25)
    problem = Problem(a, problem.k, v)
    out, lse = problem.run()
    assert 0 < out.abs().min() < 1e-4
    problem.judge((out, lse)).require()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1e-4), (torch.float16, 1e3), *((torch.bfloat16, s) for s in (1e-30, 1e-4, 1e3, 1e20))],
    ids=str,
)
def test_queries_of_any_size(kernels, dtype, size) -> None:
    """bfloat16 queries beyond the range of float16, which the products are made in."""
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 16}
    problem = problem_of(
        inputs.generator(9), (100, 33), kind="int8", dtype=dtype, device=kernels.device, **sizes
    )
    problem.judged.q.mul_(size)
    problem = Problem(replace(problem.judged, softmax_scale=0.1 / size), problem.k, problem.v)
    problem.judge(problem.run()).require()


def test_a_query_that_is_not_finite_stays_in_its_row(kernels) -> None:
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 16}
    problem = problem_of(
        inputs.generator(9), (100, 33), kind="int4", dtype=torch.bfloat16, device=kernels.device, **sizes
    )
    clean, _ = problem.run()
    problem.judged.q[1, 2, 5] = torch.inf
    problem.judged.q[0, 6, 1] = torch.nan
    spoiled, _ = problem.run()
    assert spoiled[1, 2].isnan().all() and spoiled[0, 6].isnan().all()
    same = torch.ones(2, 8, dtype=torch.bool)
    same[1, 2] = same[0, 6] = False
    assert torch.equal(spoiled[same], clean[same])


@pytest.mark.parametrize("kind", fewer_emulated(KV_KINDS, ("int8", "int4")))
@pytest.mark.parametrize(
    ("group", "q_len", "head_dim"),
    [(4, 1, 64), (8, 1, 128), (7, 1, 256), (4, 3, 128), (8, 8, 256), (16, 8, 64)],
)
def test_any_cut_and_one_plan_for_two_calls(kernels, monkeypatch, kind, group, q_len, head_dim) -> None:
    """Parts of all sizes, rings of all depths; results repeat bit for bit, whichever block comes last."""
    problem = problem_of(
        inputs.generator(group),
        kernels.pick((7000, 3, 0, 129, 64), (700, 3, 0, 129, 64)),
        kind=kind,
        dtype=torch.bfloat16,
        device=kernels.device,
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=32,
        q_len=q_len,
        sinks=True,
    )
    chosen = chosen_for(problem)
    cuts = ((1, 2, 1), (2, 3, 1), (3, 2, 1), (8, 3, 2), (17, 4, 3), (500, 2, 1))
    for parts, stages, minimum in kernels.pick(cuts, cuts[2:5]):
        told = config(parts, warps=chosen.warps, stages=min(stages, chosen.stages), min_part_units=minimum)
        plan = problem.plan(told)
        first = problem.run(plan, told)
        problem.judge(first).require()
        # Whichever block comes last. On a GPU they come as they please.
        for order in ("reverse", "1"):
            monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
            again = problem.run(plan, told)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        monkeypatch.delenv("QSUN_EMULATOR_ORDER")


def chosen_for(problem: Problem):
    a = problem.judged
    return library.binding.choose_paged_attention_decode(
        *(a.seq_lens.shape[0], a.q_len, a.q.shape[1], a.k_cache.shape[1], a.q.shape[2], a.k_cache.shape[2]),
        *(a.block_table.shape[1], -1, *attention._kind_of(a.q, problem.k.cache, problem.k.scale)),
        library.device_props(a.q.get_device()),
    )


def test_requests_without_tokens_have_their_sinks(kernels) -> None:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "sinks": True}
    problem = problem_of(
        inputs.generator(3), (0, 2, 0), kind="int4", dtype=torch.float16, device=kernels.device, **sizes
    )
    out, lse = problem.run()
    problem.judge((out, lse)).require()
    assert (out[[0, 2]] == 0).all()
    torch.testing.assert_close(lse[[0, 2]], problem.judged.sinks.expand(2, 4), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.damaged
@pytest.mark.parametrize("change", [{"seq_lens": 49}, {"block_table": -1}, {"block_table": 1000}], ids=str)
def test_indices_outside_their_tensors_trap(emulated_kernels, change) -> None:
    sizes = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 64, "block_size": 16, "spare_blocks": 1}
    problem = problem_of(
        inputs.generator(0), (20,), kind="int8", dtype=torch.float16, device=emulated_kernels.device, **sizes
    )
    for name, value in change.items():
        getattr(problem.judged, name).fill_(value)
    with pytest.raises(KernelLaunchError, match=r"paged_attention.*trap"):
        problem.run()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KV_KINDS)
def test_long_contexts(device, kind) -> None:
    sizes = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16}
    for dtype in HALVES:
        problem = problem_of(
            inputs.generator(9), (33_000, 1, 8192, 20_001), kind=kind, dtype=dtype, device=device, **sizes
        )
        problem.judge(problem.run()).require()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KV_KINDS)
def test_a_captured_graph_follows_the_lengths(device, kind) -> None:
    sizes = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16}
    problem = problem_of(
        inputs.generator(5), (900, 300, 40), kind=kind, dtype=torch.bfloat16, device=device, **sizes
    )
    a = problem.judged
    moved = Problem(
        a,
        replace(problem.k, cache=problem.k.cache.to(device), scale=problem.k.scale.to(device)),
        replace(problem.v, cache=problem.v.cache.to(device), scale=problem.v.scale.to(device)),
    )
    moved.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moved.run()
    for lengths in ((900, 300, 40), (17, 0, 33), (512, 299, 1)):
        a.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        problem.judge(captured).require()
