"""Attention that begins while the write of the newest tokens still runs: follows_write, and what it rests on.

The emulator hides what the write writes until the kernel waits for it (emulator/producers.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import attention, library
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs
from qsun_kernels.testing.cuda_attention import attend, config, plan_of
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.judge import judge_paged_attention_decode

# Parts that begin and end anywhere, lengths about the edges of quarters, slices and tiles.
LENGTHS = (700, 3, 0, 129, 64, 65, 17, 192, 1)


def draw(
    lengths: tuple[int, ...] | list[int],
    device: torch.device,
    *,
    kv: inputs.KvKind | None = None,
    group: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    q_len: int = 1,
    window: int | None = None,
) -> PagedAttentionInputs:
    return inputs.paged_attention_inputs(
        inputs.generator(group + q_len),
        lengths,
        num_q_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=32,
        dtype=torch.bfloat16,
        kv=kv,
        device=device,
        q_len=q_len,
        window=window,
    )


def sharing_config() -> library.binding.PagedAttentionDecodeConfig:
    """Shares whatever there is; items and requests lie across parts."""
    return config(7, prefix_parts=5, overlaps_producer=True)


def guard_the_writes(a: PagedAttentionInputs, out: Tensor, guard: Callable[[Tensor], None]) -> None:
    """Queries, newest positions, and the outputs, which nobody may write so early either."""
    guard(out)
    for token in a.q:
        guard(token)
    for request, length in enumerate(a.seq_lens.tolist()):
        for position in range(max(length - a.q_len, 0), length):
            for row in rows_of_position(a, request, position):
                guard(row)


def rows_of_position(a: PagedAttentionInputs, request: int, position: int) -> Iterator[Tensor]:
    """All that the caches hold of one position."""
    block_size = a.k_cache.shape[2]
    block = int(a.block_table[request, position // block_size])
    caches = [a.k_cache, a.v_cache]
    if a.k_scale is not None and a.v_scale is not None and a.k_scale.dim() > 1:
        caches += [a.k_scale, a.v_scale]
    for cache in caches:
        for head in range(cache.shape[1]):
            row = cache[block, head, position % block_size]
            yield row if row.dim() else row[None]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "copies"), [("forward", "late"), ("reverse", "early"), ("3", "late")])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("group", [4, 12])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_nothing_new_is_read_too_early(
    emulated_kernels, guard, monkeypatch, kv, window, group, q_len, order, copies
) -> None:
    """Queries, newest positions and outputs are the write's until it has ended, and the bits the same."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    a = draw(LENGTHS, torch.device("cpu"), kv=kv, group=group, q_len=q_len, window=window)
    plan = plan_of(a)
    assert len(plan) == 1
    expected = attend(a, plan)
    judge_paged_attention_decode(expected, a).require()
    out = torch.full_like(expected[0], torch.nan)
    guard_the_writes(a, out, guard)
    got = attend(a, plan, out=out, follows_write=True)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize(("order", "copies"), [("forward", "late"), ("reverse", "early"), ("3", "late")])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("group", [1, 6])
def test_nothing_new_is_read_too_early_around_shared_prefixes(
    emulated_kernels, guard, monkeypatch, group, q_len, order, copies
) -> None:
    """The same of both launches; what the first leaves for the second is hidden until that one waits, too."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    # The newest positions of one request lie right behind its prefix.
    lengths = (700, 3, 128 + q_len, 0, 330, 65 + q_len, 192, 1)
    a = draw(lengths, torch.device("cpu"), group=group, q_len=q_len)
    inputs.share_prefix(a, (0, 2, 4, 6), 4)
    told = sharing_config()
    plan = plan_of(a, told, shares=True)
    assert int(plan[1][3]) > 0, "nothing is shared"
    expected = attend(a, plan, told)
    judge_paged_attention_decode(expected, a).require()
    out = torch.full_like(expected[0], torch.nan)
    guard_the_writes(a, out, guard)
    empty, hidden = torch.empty, []

    def guarded_scratch(*sizes: int, **options: Any) -> Tensor:
        made = empty(*sizes, **options)
        if made.dim() == 1 and made.dtype == torch.float32:
            guard(made)
            hidden.append(made)
        return made

    monkeypatch.setattr(torch, "empty", guarded_scratch)
    got = attend(a, plan, told, out=out, follows_write=True)
    assert len(hidden) == 1 and torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("what", ["an older position", "block_table", "plan"])
def test_what_is_older_is_read_at_once(emulated_kernels, guard, what, kv) -> None:
    """The early start is there: it finds nothing where the write, despite the promise, is of more."""
    a = draw((700,), torch.device("cpu"), kv=kv)
    plan = plan_of(a)
    hidden = {
        "an older position": next(rows_of_position(a, 0, 200)),
        "block_table": a.block_table,
        "plan": plan[0],
    }
    guard(hidden[what])
    expected = attend(a, plan)
    judge_paged_attention_decode(expected, a).require()
    if what == "plan":  # bytes of 0xff: no part has work
        assert attend(a, plan, follows_write=True)[0].isnan().all()
    else:
        message = "the producer writes" if what == "an older position" else "trap"
        with pytest.raises(KernelLaunchError, match=message):
            attend(a, plan, follows_write=True)
    # The launch in front is the one that makes the plan.
    own = attend(a, follows_write=True)
    assert torch.equal(own[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a shared position", "the prefixes", "plan"])
def test_what_is_older_is_read_at_once_around_shared_prefixes(emulated_kernels, guard, what) -> None:
    """Both launches start early: each finds nothing where what it goes along is the write's after all."""
    a = draw((330, 200, 70), torch.device("cpu"))
    inputs.share_prefix(a, (0, 1), 4)
    told = sharing_config()
    plan = plan_of(a, told, shares=True)
    expected = attend(a, plan, told)
    judge_paged_attention_decode(expected, a).require()
    hidden = {"a shared position": next(rows_of_position(a, 1, 5)), "the prefixes": plan[1], "plan": plan[0]}
    guard(hidden[what])
    again = attend(a, plan, told)
    assert torch.equal(again[0], expected[0])
    if what == "a shared position":
        with pytest.raises(KernelLaunchError, match="the producer writes"):
            attend(a, plan, told, follows_write=True)
        return
    is_lost = attend(a, plan, told, follows_write=True)[0].isnan().all(dim=-1).all(dim=-1)
    # Bytes of 0xff: no part has work. Without prefixes those are lost that begin behind one.
    assert is_lost.tolist() == ([True] * 3 if what == "plan" else [True, True, False])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kv", "shares"), [(None, False), (None, True), ("fp8", False), ("int8", False), ("int4", False)]
)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_every_step_sees_its_new_token(kv, shares, batch) -> None:
    """New keys and values at the same place, step after step, right in front of the attention to them.

    shares: the launch for prefixes comes in between, whether there are any (8, 64 requests) or not.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    lengths = [1024 - 3 * request for request in range(batch)]
    a = draw(lengths, device, kv=kv, group=4, kv_heads=8, head_dim=128)
    if shares:
        inputs.share_prefix(a, range(batch), 24)
    plan = plan_of(a, shares=shares)
    assert len(plan) == (2 if shares else 1)
    assert not shares or (int(plan[1][3]) > 0) == (batch > 1)
    last = a.seq_lens.long() - 1
    blocks = a.block_table.gather(1, (last // 32)[:, None])[:, 0].long()
    slots = blocks * 32 + last % 32
    cos_sin = torch.zeros(2048, 128, device=device)
    cos_sin[:, :64] = 1.0
    write = cuda.IMPLEMENTATIONS["write_kv_cache"].run
    scales = (a.k_scale, a.v_scale)

    def step(q: Tensor, k: Tensor, v: Tensor, follows: bool) -> tuple[Tensor, Tensor]:
        q = write(k, v, a.k_cache, a.v_cache, slots, q, last, cos_sin, None, None, 0.0, False, *scales)
        return attention.paged_attention_decode(
            *(q, a.k_cache, a.v_cache, a.block_table, a.seq_lens, a.softmax_scale, None),
            *(None, None, None, plan, *scales, follows),
        )

    steps = [
        [
            torch.randn(batch, heads, 128, device=device).mul(scale).to(torch.bfloat16)
            for heads, scale in ((32, 1), (8, 4), (8, 4))
        ]
        for _ in range(100)
    ]
    expected = []
    for one in steps:
        expected.append(step(*one, False))
        torch.cuda.synchronize()
    got = [step(*one, True) for one in steps]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [step(*one, True) for one in steps]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for right, eager, replayed in zip(expected, got, captured, strict=True):
        assert torch.equal(eager[0], right[0]) and torch.equal(eager[1], right[1])
        assert torch.equal(replayed[0], right[0]) and torch.equal(replayed[1], right[1])
