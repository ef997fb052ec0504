"""The plan of paged_attention_decode: what it holds and that calls obey it; on a GPU and emulated."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels.backends.cuda import attention, library
from qsun_kernels.backends.problems import PagedAttentionDecodeProblem
from qsun_kernels.testing import inputs
from qsun_kernels.testing.cuda_attention import attend, config, plan_of
from qsun_kernels.testing.judge import judge_paged_attention_decode

TILE = 64


def units_of(length: int, reach: int) -> int:
    """One for the request, one for every tile that holds a position attended to."""
    first, length = max(length - reach, 0), max(length, 0)
    return 1 + len({position // TILE for position in range(first, length)})


@pytest.mark.parametrize("parts", (1, 2, 7, 264, 3000))
@pytest.mark.parametrize("batch", (1, 3, 32, 33, 1500))
def test_a_plan_cuts_the_line_of_units(kernels, batch, parts) -> None:
    source = inputs.generator(batch + parts)
    for num_kv_heads, window, q_len, minimum in ((1, None, 1, 1), (3, 100, 4, 2), (8, 1, 8, 5)):
        lengths = torch.randint(0, kernels.pick(5000, 400), (batch,), generator=source, dtype=torch.int32)
        lengths[torch.rand(batch, generator=source) < 0.2] = 0
        lengths[0] = (-3, 64, 65)[parts % 3]
        problem = PagedAttentionDecodeProblem(
            *(4 * num_kv_heads, num_kv_heads, 128, 16, window),
            *(torch.bfloat16, torch.bfloat16, kernels.device),
        )
        with inputs.poisoned_outputs():
            (plan,) = attention.plan_paged_attention(
                *(problem, lengths.to(kernels.device), q_len, window),
                config=config(parts, min_part_units=minimum),
            )
        words = plan.tolist()
        reach = 2**31 if window is None else window + q_len - 1
        owner, start = [], {}  # of every unit, of every request
        for head in range(num_kv_heads):
            for request, length in enumerate(lengths.tolist()):
                start[request, head] = len(owner)
                owner += [(request, head)] * units_of(length, reach)
        share = max(-(-len(owner) // parts), minimum)
        used = -(-len(owner) // share)
        assert words[:4] == [len(owner), share, used, batch]
        items = [[max(length - reach, 0), max(length, 0), i, 0] for i, length in enumerate(lengths.tolist())]
        for part in range(used):
            at = owner[part * share]
            end = min((part + 1) * share, len(owner))
            assert words[4 + 8 * part : 12 + 8 * part] == [*at, start[at], end, *items[at[0]]]
        rest = words[4 + 8 * parts :]
        assert rest == [*(word for item in items for word in item), *([0] * (batch * num_kv_heads))]


@pytest.mark.parametrize(
    ("lengths", "parts", "slack", "longest"),
    [
        ((1024,) * 8, 132, 2, 17),  # 17 units, an equal share of 9: 20 are allowed
        ((1024,) * 4, 132, 6, None),  # an equal share of 5: 16
        ((1024,) * 4, 132, 7, 17),
        ((1024,) * 8, 132, -1, None),
        ((1024,) * 17, 132, 100, None),  # 136 items
        ((1024,) * 16, 128, 0, 17),
        ((0, 1, 64, 65, 640, 700, 0, 800), 64, 3, 14),
        ((0, 0, 0), 24, 0, 1),
        ((4096, *(64,) * 15), 132, 20, None),
    ],
)
def test_a_plan_keeps_requests_whole(kernels, lengths, parts, slack, longest) -> None:
    """An item a part, as far apart as the longest takes, where that is not much more than an equal share."""
    problem = PagedAttentionDecodeProblem(
        32, 8, 128, 16, None, torch.bfloat16, torch.bfloat16, kernels.device
    )
    with inputs.poisoned_outputs():
        (plan,) = attention.plan_paged_attention(
            *(problem, torch.tensor(lengths, dtype=torch.int32, device=kernels.device), 1, None),
            config=config(parts, whole_slack=slack),
        )
    words, units = plan.tolist(), [units_of(length, 2**31) for length in lengths]
    total, share, used, items = words[:4]
    assert items == len(lengths)
    if longest is None:
        assert (total, share) == (8 * sum(units), -(-8 * sum(units) // parts))
        return
    assert (total, share, used) == (8 * items * longest, longest, 8 * items) and longest == max(units)
    for part in range(used):
        item, start = part % items, part * longest
        expected = [item, part // items, start, start + units[item], 0, lengths[item], item, 0]
        assert words[4 + 8 * part : 12 + 8 * part] == expected


@pytest.mark.parametrize(("group", "q_len", "head_dim"), [(4, 1, 128), (7, 1, 64), (8, 4, 96)])
def test_requests_that_are_whole(kernels, group, q_len, head_dim) -> None:
    """Empty ones, short and long ones; nobody leaves anything in scratch, and nobody waits to be merged."""
    a = inputs.paged_attention_inputs(
        inputs.generator(group),
        kernels.pick((1000, 3, 0, 1290, 64, 640, 1281), (300, 3, 0, 129, 64, 192, 200)),
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=16,
        dtype=torch.bfloat16,
        device=kernels.device,
        q_len=q_len,
        sinks=True,
    )
    results = []
    for slack, stages in ((30, 2), (30, 4), (-1, 2)):
        told = config(14, stages=stages_that_fit(stages, head_dim), whole_slack=slack)
        plan = plan_of(a, told)
        longest = max(units_of(length, 2**31) for length in a.seq_lens.tolist())
        assert (int(plan[0][1]) == longest) == (slack > 0)
        results.append(attend(a, plan, told))
        judge_paged_attention_decode(results[-1], a).require()
        again = attend(a, plan, told)
        assert torch.equal(results[-1][0], again[0]) and torch.equal(results[-1][1], again[1])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_short_requests_are_not_cut(kernels) -> None:
    """The smallest part is as large as a request of 64 tokens: 8 of them under 8 key heads are 64 parts."""
    problem = PagedAttentionDecodeProblem(
        32, 8, 128, 16, None, torch.bfloat16, torch.bfloat16, kernels.device
    )
    lengths = torch.full((8,), 64, dtype=torch.int32, device=kernels.device)
    (plan,) = attention.plan_paged_attention(problem, lengths, 1, None, config=config(264, min_part_units=2))
    assert plan[:3].tolist() == [128, 2, 64]
    assert plan[4 : 4 + 8 * 64].view(64, 8)[:, 2].tolist() == list(range(0, 128, 2))


@pytest.mark.parametrize(
    ("group", "q_len", "head_dim"), [(4, 1, 64), (8, 1, 128), (7, 1, 256), (8, 4, 96), (16, 8, 64)]
)
def test_any_cut_and_one_plan_for_two_calls(kernels, monkeypatch, group, q_len, head_dim) -> None:
    """Parts of all sizes, rings of all depths; the counters are zero again after every call."""
    a = inputs.paged_attention_inputs(
        inputs.generator(group),
        kernels.pick((7000, 3, 0, 129, 64), (700, 3, 0, 129, 64)),
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=32,
        dtype=torch.bfloat16,
        device=kernels.device,
        q_len=q_len,
        sinks=True,
    )
    warps = 4 if group * q_len <= 64 else 8
    for parts, stages, minimum in ((1, 2, 1), (2, 3, 1), (3, 2, 1), (8, 3, 2), (17, 2, 3), (500, 2, 1)):
        told = config(parts, warps=warps, stages=stages_that_fit(stages, head_dim), min_part_units=minimum)
        plan = plan_of(a, told)
        before = plan[0].clone()
        first = attend(a, plan, told)
        judge_paged_attention_decode(first, a).require()
        # Whichever block comes last. On a GPU they come as they please.
        for order in ("reverse", "1"):
            monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
            again = attend(a, plan, told)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        monkeypatch.delenv("QSUN_EMULATOR_ORDER")
        used = int(plan[0][2])
        untouched = slice(0, 4 + 8 * used), slice(4 + 8 * parts, None)
        assert all(torch.equal(plan[0][part], before[part]) for part in untouched)


def stages_that_fit(stages: int, head_dim: int) -> int:
    """Fewer on a device with less shared memory."""
    stage = 4 * 2 * 16 * (2 * head_dim + 16)
    room = library.device_props(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return min(stages, (room.shared_memory_per_block - 2048) // stage)


def test_a_plan_keeps_the_lengths(kernels) -> None:
    a = inputs.paged_attention_inputs(
        inputs.generator(1),
        (100, 40),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=128,
        block_size=16,
        dtype=torch.float16,
        device=kernels.device,
    )
    plan = plan_of(a)
    expected = attend(a, plan)
    a.seq_lens.fill_(16)
    again = attend(a, plan)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
    judge_paged_attention_decode(attend(a), a).require()  # planned anew: the new lengths


def test_what_has_no_plan(kernels) -> None:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "block_size": 16, "device": kernels.device}
    for lengths, head_dim, dtype in (
        ((20,), 64, torch.float32),
        ((20,), 80, torch.float16),
        ((), 64, torch.half),
    ):
        a = inputs.paged_attention_inputs(
            inputs.generator(1), lengths, head_dim=head_dim, dtype=dtype, **sizes
        )
        plan = plan_of(a)
        assert plan == ()
        judge_paged_attention_decode(attend(a, plan), a).require()
