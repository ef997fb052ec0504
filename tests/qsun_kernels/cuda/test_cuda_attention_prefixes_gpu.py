"""Prefixes that requests share in paged_attention_decode: who shares what, and results."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from qsun_kernels.backends.cuda import attention, library
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import cuda_attention, inputs
from qsun_kernels.testing.cuda_attention import attend, problem_of
from qsun_kernels.testing.judge import judge_paged_attention_decode

TILE = 64
ROWS = 64  # query rows of an item


def config(parts=5, *, prefix_parts=7, stages=2, **changes):
    return cuda_attention.config(parts, prefix_parts=prefix_parts, stages=stages, **changes)


def plan_of(a, told=None):
    return cuda_attention.plan_of(a, told, shares=True)


def equal_bits(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def batch_of(kernels, lengths, *, seed=0, group=2, num_kv_heads=1, head_dim=64, block_size=16, **options):
    return inputs.paged_attention_inputs(
        inputs.generator(seed),
        lengths,
        num_q_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=options.pop("dtype", torch.bfloat16),
        device=kernels.device,
        **options,
    )


@dataclass(frozen=True)
class Found:
    """What a plan says about prefixes: by request how many tokens, and the items as (tokens, requests)."""

    tokens: list[int]
    items: list[tuple[int, list[int]]]


def found_in(plan, a, told) -> Found:
    """Read, and hold the pieces of the plan against each other."""
    batch, rows = a.block_table.shape[0], a.q.shape[1] // a.k_cache.shape[1] * a.q_len
    words = plan[1].tolist()
    total, share, used, count = words[:4]
    at = 4 + 8 * told.prefix_parts
    raw = [words[at + 4 * i : at + 4 * i + 4] for i in range(count)]
    at += 4 * batch
    of_request = [words[at + 4 * i : at + 4 * i + 4] for i in range(batch)]
    at += 4 * batch
    order = words[at : at + batch]
    assert sorted(order) == list(range(batch))
    items, start = [], 0
    for first, tokens, request, members in raw:
        place, size = members >> 8, members & 255
        of_item = order[place : place + size]
        assert (first, request) == (0, of_item[0]) and size * rows <= ROWS and tokens % TILE == 0
        for offset, member in enumerate(of_item):
            assert of_request[member][:3] == [tokens, place + offset, start]
        items.append((tokens, of_item))
        start += 1 + tokens // TILE
    num_kv_heads = a.k_cache.shape[1]
    assert total == start * num_kv_heads
    if total:
        assert share == max(-(-total // told.prefix_parts), told.min_part_units)
        assert used == -(-total // share)
    # Whoever is in no item shares nothing, and the plan of requests begins where prefixes end.
    sharers = [member for _, of_item in items for member in of_item]
    assert len(set(sharers)) == len(sharers)
    firsts = plan[0][4 + 8 * told.parts :][: 4 * batch].view(batch, 4)[:, 0].tolist()
    for request in range(batch):
        assert (of_request[request][0] > 0) == (request in sharers)
        assert firsts[request] == of_request[request][0]
    return Found([entry[0] for entry in of_request], items)


def check_found(a, found: Found) -> None:
    """What is shared is the same memory, and visible to every query token of all that share it."""
    block_size = a.k_cache.shape[2]
    for tokens, of_item in found.items:
        entries = -(-tokens // block_size)
        rows = a.block_table[of_item, :entries]
        assert (rows == rows[0]).all()
        assert all(tokens <= int(a.seq_lens[request]) - a.q_len for request in of_item)


def shared(kernels, sizes, *, blocks=9, extra=20, **options):
    """Groups of these sizes, each with its own prefix of `blocks` blocks, in a shuffled batch.

    Returns the inputs and the group of every request.
    """
    source = inputs.generator(sum(sizes))
    group_of = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    group_of = group_of[torch.randperm(len(group_of), generator=source)].tolist()
    block_size = options.get("block_size", 16)
    q_len = options.get("q_len", 1)
    lengths = [
        blocks * block_size + q_len + int(torch.randint(extra, (1,), generator=source)) for _ in group_of
    ]
    a = batch_of(kernels, lengths, **options)
    for group in range(len(sizes)):
        inputs.share_prefix(a, [r for r, one in enumerate(group_of) if one == group], blocks)
    return a, group_of


@pytest.mark.parametrize("sizes", [(1, 2, 3), (64,), (200,), (8, 8, 1, 8)], ids=str)
def test_groups_read_their_prefix_once(kernels, sizes) -> None:
    """Also more requests than an item holds. The blocks that sharers do not use any more are NaN."""
    a, group_of = shared(kernels, sizes)
    told = config()
    plan = plan_of(a, told)
    found = found_in(plan, a, told)
    check_found(a, found)
    for request, group in enumerate(group_of):
        assert found.tokens[request] == (9 * 16 // TILE * TILE if sizes[group] > 1 else 0)
    rows = 2
    assert len(found.items) == sum(-(-size * rows // ROWS) for size in sizes if size > 1)
    for group in range(len(sizes)):  # of about the same size
        counts = [len(of_item) for _, of_item in found.items if group_of[of_item[0]] == group]
        assert not counts or max(counts) - min(counts) < len(counts)
    got = attend(a, plan, told)
    judge_paged_attention_decode(got, a).require()
    alone = attend(a, None, told)
    judge_paged_attention_decode(alone, a).require()
    torch.testing.assert_close(got[1], alone[1], rtol=1e-5, atol=1e-5)


def test_what_is_shared_is_read_through_one_row_of_the_table(kernels) -> None:
    """After the plan was made, rows of the table are spoilt where another's are read: nothing may change."""
    a, _ = shared(kernels, (6,))
    told = config()
    plan = plan_of(a, told)
    expected = attend(a, plan, told)
    ((tokens, members),) = found_in(plan, a, told).items
    a.block_table[members[1:], : tokens // 16] = 2**30  # a trap for whoever follows it
    assert equal_bits(attend(a, plan, told), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("group", "q_len", "head_dim"),
    [(1, 1, 64), (4, 1, 128), (8, 1, 256), (5, 3, 96), (8, 4, 128), (7, 2, 64), (16, 2, 64)],
)
def test_every_shape_of_rows(kernels, dtype, group, q_len, head_dim) -> None:
    """With softcap and sinks: a sink joins the denominator once."""
    for block_size, blocks in ((16, 9), (128, 2)):
        a, _ = shared(
            kernels,
            (2, 5, 1),
            blocks=blocks,
            group=group,
            q_len=q_len,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            num_kv_heads=2,
            softcap=4.0,
            sinks=True,
            std=2.0,
        )
        for parts, prefix_parts in ((1, 1), (3, 11), (40, 5)):
            told = config(parts, prefix_parts=prefix_parts)
            plan = plan_of(a, told)
            found = found_in(plan, a, told)
            assert len([tokens for tokens in found.tokens if tokens]) == 7
            judge_paged_attention_decode(attend(a, plan, told), a).require()


def test_what_is_common_ends_anywhere(kernels) -> None:
    """Common beginnings of every number of blocks; full tiles of them are shared, up to the query tokens."""
    for blocks in range(0, 14):
        a = batch_of(kernels, (13 * 16 + 5, 14 * 16, 13 * 16 + 1), seed=blocks, q_len=2)
        if blocks:
            inputs.share_prefix(a, (0, 1, 2), min(blocks, 13))
        told = config()
        plan = plan_of(a, told)
        found = found_in(plan, a, told)
        check_found(a, found)
        assert found.tokens == [blocks * 16 // TILE * TILE if blocks >= 4 else 0] * 3
        judge_paged_attention_decode(attend(a, plan, told), a).require()


def test_the_same_blocks_beyond_a_length_are_not_shared(kernels) -> None:
    """Whole rows of the table are equal; a request shares what it has itself."""
    a = batch_of(kernels, (320, 320, 320, 320, 320), q_len=2)
    inputs.share_prefix(a, (0, 1, 2, 3, 4), 20)
    a.seq_lens.copy_(torch.tensor([320, 129, 0, 130, 1], dtype=torch.int32))
    told = config()
    plan = plan_of(a, told)
    found = found_in(plan, a, told)
    check_found(a, found)
    assert [found.tokens[request] > 0 for request in range(5)] == [True, True, False, True, False]
    judge_paged_attention_decode(attend(a, plan, told), a).require()


@pytest.mark.parametrize("length", (64, 65, 128, 129, 640))
def test_the_same_request_twice(kernels, length) -> None:
    a = batch_of(kernels, (length, 7, length))
    a.block_table[2] = a.block_table[0]
    told = config()
    plan = plan_of(a, told)
    whole = (length - 1) // TILE * TILE
    assert found_in(plan, a, told).tokens == [whole, 0, whole]
    judge_paged_attention_decode(attend(a, plan, told), a).require()


def test_a_short_prefix_of_all_does_not_hide_long_ones(kernels) -> None:
    """All begin with 64 tokens, and each four of twelve with the same 320."""
    a = batch_of(kernels, [330] * 12)
    for first in range(3):
        inputs.share_prefix(a, range(first, 12, 3), 20)
    inputs.share_prefix(a, range(12), 4)
    told = config()
    plan = plan_of(a, told)
    found = found_in(plan, a, told)
    check_found(a, found)
    assert found.tokens == [320] * 12
    assert sorted(sorted(of_item) for _, of_item in found.items) == [
        list(range(first, 12, 3)) for first in range(3)
    ]
    judge_paged_attention_decode(attend(a, plan, told), a).require()


def test_little_is_not_shared(kernels) -> None:
    """Below the smallest prefix, or with too few tiles saved in all, a plan is the one without a table."""
    a, _ = shared(kernels, (3, 2), num_kv_heads=2)  # saves 2 tiles for 2 + 1 requests and 2 key heads
    for changes, shares in (
        ({"min_prefix_tiles": 2}, True),
        ({"min_prefix_tiles": 3}, False),
        ({"min_saved_tiles": 12}, True),
        ({"min_saved_tiles": 13}, False),
    ):
        told = config(**changes)
        plan = plan_of(a, told)
        assert bool(found_in(plan, a, told).items) == shares
        got = attend(a, plan, told)
        judge_paged_attention_decode(got, a).require()
        assert equal_bits(got, attend(a, None, told)) == (not shares)


def test_random_tables(kernels) -> None:
    """Trees of prefixes: requests branch off anywhere, in any order, some without tokens."""
    for seed in range(kernels.pick(60, 12)):
        source = inputs.generator(seed)

        def draw(low, high, source=source):
            return int(torch.randint(low, high, (1,), generator=source))

        batch, q_len = draw(1, 24), draw(1, 4)
        lengths = [draw(0, 500) if draw(0, 5) else 0 for _ in range(batch)]
        a = batch_of(
            kernels, lengths, seed=seed, q_len=q_len, group=draw(1, 9), block_size=(16, 32, 64)[seed % 3]
        )
        for _ in range(draw(0, 8)):
            one, other = draw(0, batch), draw(0, batch)
            blocks = min(lengths[one], lengths[other]) // a.k_cache.shape[2]
            if one != other and blocks:
                count = draw(1, blocks + 1)
                a.block_table[other, :count] = a.block_table[one, :count]
        told = config(draw(1, 12), prefix_parts=draw(1, 12), stages=2 + seed % 3)
        plan = plan_of(a, told)
        check_found(a, found_in(plan, a, told))
        result = judge_paged_attention_decode(attend(a, plan, told), a)
        assert result.ok, f"seed {seed}: {result.report}"


def test_results_repeat_bit_for_bit(kernels, monkeypatch) -> None:
    """Whichever block comes last, and with a plan that is made anew."""
    a, _ = shared(kernels, (5, 3, 1), group=4, num_kv_heads=2)
    told = config(9, prefix_parts=13)
    plan = plan_of(a, told)
    expected = attend(a, plan, told)
    for order in ("reverse", "1"):
        monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
        assert equal_bits(attend(a, plan, told), expected)
        again = plan_of(a, told)
        assert equal_bits(found_items(again, a, told), found_items(plan, a, told))
        assert equal_bits(attend(a, again, told), expected)


def found_items(plan, a, told):
    """The words of a plan's prefixes that mean something."""
    count = int(plan[1][3])
    items = 4 + 8 * told.prefix_parts
    order = items + 8 * a.block_table.shape[0]
    return plan[1][:4], plan[1][items : items + 4 * count], plan[1][order:]


def test_who_shares_no_prefixes(kernels) -> None:
    """Windows, many query rows and large batches have a plan of one piece, whatever the block table says."""
    for options in ({"window": 1000}, {"group": 33}, {"group": 9, "q_len": 4}, {"dtype": torch.float32}):
        a = batch_of(kernels, (200, 200, 3), **options)
        inputs.share_prefix(a, (0, 1), 12)
        plan = plan_of(a)
        assert len(plan) == (0 if "dtype" in options else 1)
        judge_paged_attention_decode(attend(a, plan), a).require()
    for batch, pieces in ((4096, 2), (4097, 1)):
        a = batch_of(kernels, [0] * batch, group=1)
        assert len(plan_of(a)) == pieces


@pytest.mark.slow
@pytest.mark.damaged
def test_a_length_that_the_table_cannot_hold_traps(emulated_kernels) -> None:
    """Before the row is followed past its end, and into the next request's."""
    a = batch_of(emulated_kernels, (100, 90))
    a.seq_lens[0] = a.block_table.shape[1] * 16 + 1
    with pytest.raises(KernelLaunchError, match=r"plan_paged_attention.*trap"):
        plan_of(a, config())


def test_what_the_library_chooses(kernels) -> None:
    """With its own configuration a small batch is not worth a second reading; a large one is."""
    for requests, shares in ((2, False), (kernels.pick(120, 90), True)):
        a, _ = shared(kernels, (requests,), blocks=kernels.pick(100, 20), num_kv_heads=kernels.pick(8, 2))
        plan = plan_of(a)
        told = library.binding.choose_paged_attention_decode(
            *(requests, 1, a.q.shape[1], a.k_cache.shape[1], 64, 16, 0, -1),
            *attention._kind(problem_of(a)),
            library.device_props(torch.cuda.current_device() if kernels.is_gpu else 0),
        )
        assert bool(found_in(plan, a, told).items) == shares
        judge_paged_attention_decode(attend(a, plan), a).require()


@pytest.mark.gpu
def test_a_captured_graph_finds_new_prefixes(device) -> None:
    """Tables and lengths change between replays: no group, some, all of the batch."""
    requests, blocks = 24, 40
    a = inputs.paged_attention_inputs(
        inputs.generator(1),
        [blocks * 16 + 9] * requests,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        block_size=16,
        dtype=torch.bfloat16,
        device=device,
    )
    told = sharing_config(a)
    own, lengths = a.block_table.clone(), a.seq_lens.clone()

    def step():
        plan = attention.plan_paged_attention(problem_of(a), a.seq_lens, 1, None, a.block_table, config=told)
        return plan, attend(a, plan, told)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, captured = step()
    for size in (1, 2, 4, requests, 3, 1):
        a.block_table.copy_(own)
        a.seq_lens.copy_(lengths - torch.arange(requests, dtype=torch.int32, device=device) * size)
        for first in range(0, requests, size):
            a.block_table[first : first + size, :5] = own[first, :5]
        graph.replay()
        torch.cuda.synchronize()
        found = found_in(plan, a, told)
        check_found(a, found)
        assert [tokens > 0 for tokens in found.tokens] == [size > 1] * requests
        judge_paged_attention_decode(captured, a).require()


def sharing_config(a):
    """The library's own parts, sharing whatever there is."""
    chosen = attention._choose(problem_of(a))
    return library.binding.PagedAttentionDecodeConfig(
        warps=chosen.warps,
        stages=chosen.stages,
        blocks_per_sm=chosen.blocks_per_sm,
        parts=chosen.parts,
        min_part_units=chosen.min_part_units,
        whole_slack=chosen.whole_slack,
        prefix_parts=chosen.prefix_parts,
        min_prefix_tiles=1,
        min_saved_tiles=0,
        overlaps_producer=chosen.overlaps_producer,
    )
