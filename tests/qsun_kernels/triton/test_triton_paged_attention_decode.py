"""paged_attention_decode through Triton against float64, at the precision of torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import paged_attention_decode, plan_paged_attention
from qsun_kernels.backends.triton import paged_attention_decode as implementation
from qsun_kernels.backends.triton.paged_attention_plan import choose_rows, choose_tile, make_plan
from qsun_kernels.testing import inputs
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.judge import judge_paged_attention_decode

pytestmark = [
    pytest.mark.triton,
    # numpy, of the logarithm of an empty sum, where the kernel then takes -inf.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend(case: PagedAttentionInputs, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse), with outputs that are NaN until they are written; parts: None lets the launcher decide."""
    with inputs.poisoned_outputs():
        if parts is not None:
            rows = case.q_len * case.q.shape[1] // case.k_cache.shape[1]
            tile = choose_tile(case.q.shape[2], case.q.dtype, case.k_cache.dtype, choose_rows(rows))
            plan = make_plan(case.seq_lens, parts, tile, case.q_len, case.window)
            return implementation.paged_attention_decode(
                case.q,
                case.k_cache,
                case.v_cache,
                case.block_table,
                case.seq_lens,
                case.softmax_scale,
                case.window,
                case.softcap,
                case.sinks,
                None,
                (plan,),
            )
        return paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            case.block_table,
            case.seq_lens,
            softmax_scale=case.softmax_scale,
            window=case.window,
            softcap=case.softcap,
            sinks=case.sinks,
            lse=True,
            backend="triton",
        )


def batch(
    device: torch.device,
    seq_lens: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 5,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
    q_len: int = 1,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
    std: float = 1.0,
) -> PagedAttentionInputs:
    return inputs.paged_attention_inputs(
        inputs.generator(seed),
        seq_lens,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
        window=window,
        q_len=q_len,
        softcap=softcap,
        sinks=sinks,
        std=std,
    )


HEADS_AND_WIDTHS = [((1, 1), 1), ((3, 3), 20), ((7, 1), 64), ((10, 2), 80), ((40, 1), 128), ((2, 1), 256)]


@pytest.mark.parametrize(("heads", "head_dim"), HEADS_AND_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_and_widths(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    case = batch(device, [0, 1, 37], heads=heads, head_dim=head_dim, dtype=dtype, seed=head_dim)
    judge_paged_attention_decode(attend(case, parts=2 if dtype == torch.float16 else 1), case).require()


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_sizes_and_lengths_around_a_tile(device: torch.device, block_size: int) -> None:
    tile = choose_tile(64, torch.bfloat16, torch.bfloat16, 16)
    case = batch(
        device,
        [tile - 1, tile, tile + 1, 2 * tile, 0],
        heads=(2, 2),
        head_dim=64,
        block_size=block_size,
        dtype=torch.bfloat16,
        seed=block_size,
    )
    judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_another_dtype(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = batch(device, [23, 4], dtype=dtype, kv_dtype=kv_dtype)
    judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("parts", [1, 2], ids="{} parts".format)
@pytest.mark.parametrize("window", [1, 2, 16, 32, 33, 34, 2**40])
def test_windows(device: torch.device, window: int, parts: int) -> None:
    """Lengths below, at and above the window; what lies before it is NaN."""
    case = batch(device, [33, 1, 32, 0, 40], dtype=torch.bfloat16, window=window, seed=window % 97)
    judge_paged_attention_decode(attend(case, parts), case).require()


@pytest.mark.parametrize("parts", [1, 2, 5, 20], ids="{} parts".format)
def test_parts(device: torch.device, parts: int) -> None:
    """More parts than tiles, and parts of uneven size; the result hardly depends on them."""
    case = batch(device, [600, 2, 0], heads=(2, 1), head_dim=64, dtype=torch.float16, seed=parts)
    got = attend(case, parts)
    judge_paged_attention_decode(got, case).require()
    again = attend(case, parts)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


GROUPS_TOKENS_WIDTHS = [
    ((2, 2), 8, 64),
    ((8, 2), 2, 96),
    ((5, 1), 1, 64),
    ((6, 1), 5, 20),
    ((7, 1), 2, 128),
    ((8, 1), 5, 64),
    ((16, 1), 1, 256),
    ((16, 1), 8, 40),
    ((20, 1), 2, 80),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "q_len", "head_dim"), GROUPS_TOKENS_WIDTHS)
def test_groups_and_tokens(
    device: torch.device, heads: tuple[int, int], q_len: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Rows of one program and of several; requests whole, cut, empty, and shorter than their new tokens."""
    case = batch(device, [170, 3, 0, 40], heads=heads, head_dim=head_dim, dtype=dtype, q_len=q_len)
    judge_paged_attention_decode(attend(case, 3), case).require()


@pytest.mark.parametrize("parts", [1, 4], ids="{} parts".format)
@pytest.mark.parametrize("q_len", [2, 8])
@pytest.mark.parametrize("window", [1, 5, 90])
def test_windows_of_several_tokens(device: torch.device, window: int, q_len: int, parts: int) -> None:
    """Each token has its own window; what lies before the first one's is NaN."""
    case = batch(device, [150, 1, 7, 0, 40], heads=(2, 1), window=window, q_len=q_len, seed=window)
    judge_paged_attention_decode(attend(case, parts), case).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("softcap", "sinks", "q_len"), [(0.5, False, 1), (30.0, True, 1), (None, True, 1), (4.0, True, 3)]
)
def test_softcap_and_sinks(
    device: torch.device, softcap: float | None, sinks: bool, q_len: int, dtype: torch.dtype
) -> None:
    """Requests that lie in one part, that are merged, and one of length 0."""
    case = batch(
        device, [300, 0, 20], dtype=dtype, head_dim=64, q_len=q_len, softcap=softcap, sinks=sinks, std=2.0
    )
    for parts in (1, 3):
        out, lse = attend(case, parts)
        judge_paged_attention_decode((out, lse), case).require()
        nobody = slice(q_len, 2 * q_len)
        expected = torch.full_like(lse, -torch.inf) if case.sinks is None else case.sinks.expand_as(lse)
        assert not out[nobody].any() and torch.equal(lse[nobody], expected[nobody])


@pytest.mark.parametrize("parts", [2, 7, 40], ids="{} parts".format)
def test_a_skewed_batch(device: torch.device, parts: int) -> None:
    """The longest request lies in most parts, and most requests in one part."""
    lengths = inputs.zipf_lengths(inputs.generator(4), 20, 2500, 1.5)
    case = batch(device, lengths, heads=(2, 1), head_dim=64, block_size=16, dtype=torch.bfloat16)
    got = attend(case, parts)
    judge_paged_attention_decode(got, case).require()
    assert all(torch.equal(a, b) for a, b in zip(got, attend(case, parts), strict=True))


def test_out_is_written_and_returned(device: torch.device) -> None:
    case = batch(device, [40, 0], dtype=torch.bfloat16, q_len=2)
    out = torch.full(case.q.shape, torch.nan, dtype=case.q.dtype, device=device)
    arguments = (case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens)
    got = paged_attention_decode(*arguments, softmax_scale=case.softmax_scale, out=out, backend="triton")
    assert got is out and torch.equal(out, attend(case)[0])


@pytest.mark.parametrize("batch_size", [0, 1, 9])
def test_batch_sizes(device: torch.device, batch_size: int) -> None:
    case = batch(device, [(7 * i) % 20 for i in range(batch_size)], seed=batch_size)
    out, lse = attend(case)
    assert out.shape == case.q.shape and out.is_contiguous() and lse.shape == out.shape[:2]
    if batch_size:
        judge_paged_attention_decode((out, lse), case).require()


def test_a_batch_of_nobody(device: torch.device) -> None:
    """Padding rows only, with no column in the block table."""
    case = batch(device, [0, 0, 0])
    case = replace(case, block_table=case.block_table[:, :0].contiguous())
    for parts in (None, 2):
        out, lse = attend(case, parts)
        assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize(
    ("dtype", "parts"), [*((dtype, 1) for dtype in DTYPES), (torch.bfloat16, 3)], ids=str
)
def test_one_hot_scores_give_each_value_exactly(device: torch.device, dtype: torch.dtype, parts: int) -> None:
    """Request t asks for the key of position t only: its value comes out exactly, and lse is the score."""
    D = 16
    case = batch(device, [D] * D, heads=(1, 1), head_dim=D, block_size=4, dtype=dtype)
    eye = torch.eye(D, dtype=dtype, device=device)
    values = inputs.normal(inputs.generator(5), (D, D), dtype, device)
    for request in range(D):
        for position in range(D):
            block = case.block_table[request, position // 4]
            case.k_cache[block, 0, position % 4] = eye[position]
            case.v_cache[block, 0, position % 4] = values[position]
    case = replace(case, q=(1024 * eye)[:, None], softmax_scale=1.0)
    out, lse = attend(case, parts)
    assert torch.equal(out[:, 0], values)
    assert torch.equal(lse, torch.full_like(lse, 1024.0))


def test_physical_order_of_blocks_does_not_matter(device: torch.device) -> None:
    case = batch(device, [33, 70, 5], dtype=torch.bfloat16, head_dim=64)
    order = torch.randperm(len(case.k_cache), generator=inputs.generator(1)).to(device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    moved = replace(
        case,
        k_cache=case.k_cache[order],
        v_cache=case.v_cache[order],
        block_table=place[case.block_table.long()].int(),
    )
    for parts in (1, 3):
        for here, there in zip(attend(case, parts), attend(moved, parts), strict=True):
            assert torch.equal(here, there)


def test_nan_stays_with_its_request_and_kv_head(device: torch.device) -> None:
    for parts in (1, 3):
        case = batch(device, [40, 40], heads=(4, 2), seed=3)
        clean, clean_lse = attend(case, parts)
        case.k_cache[case.block_table[1, 7], 1, 2] = torch.nan
        out, lse = attend(case, parts)
        assert out[1, 2:].isnan().all() and lse[1, 2:].isnan().all()
        assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :2], clean[1, :2])
        assert torch.equal(lse[0], clean_lse[0]) and torch.equal(lse[1, :2], clean_lse[1, :2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [1e-4, 20.0, 150.0], ids=str)
def test_flat_and_steep_scores(device: torch.device, dtype: torch.dtype, std: float) -> None:
    """From equal weights for all to scores in the thousands, where one position takes all."""
    case = batch(device, [50, 17], dtype=dtype, std=std, head_dim=20)
    for parts in (1, 2):
        judge_paged_attention_decode(attend(case, parts), case).require()


@pytest.mark.parametrize("softmax_scale", [0.0, -0.5, 3.0])
def test_any_softmax_scale(device: torch.device, softmax_scale: float) -> None:
    case = replace(batch(device, [21, 3]), softmax_scale=softmax_scale)
    judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.gpu
def test_more_parts_than_tiles(device: torch.device) -> None:
    case = batch(device, [20_000, 1, 0], heads=(4, 1), head_dim=128, block_size=16, dtype=torch.bfloat16)
    judge_paged_attention_decode(attend(case, 500), case).require()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((9, 3), 64), ((28, 4), 128), ((8, 1), 256)])
@pytest.mark.parametrize("lengths", [[8192], [1, 5000, 0, 333], "zipf"], ids=["one", "four", "zipf"])
def test_model_sizes(
    device: torch.device,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    lengths: list[int] | str,
) -> None:
    if isinstance(lengths, str):
        lengths = inputs.zipf_lengths(inputs.generator(1), 64, 30_000, 1.2)
    case = batch(device, lengths, heads=heads, head_dim=head_dim, block_size=16, dtype=dtype)
    got = attend(case)
    judge_paged_attention_decode(got, case).require()
    assert torch.equal(got[0], attend(case)[0])


@pytest.mark.gpu
def test_a_captured_plan_is_made_anew(device: torch.device) -> None:
    """One plan for two calls, all three in the graph; thousands of requests."""
    lengths = inputs.zipf_lengths(inputs.generator(3), 3000, 60_000, 1.2, minimum=0)
    case = batch(device, lengths, heads=(8, 2), head_dim=64, block_size=16, dtype=torch.bfloat16)
    first = case.seq_lens.clone()

    def both() -> tuple[Tensor, Tensor]:
        plan = plan_paged_attention(
            case.seq_lens,
            num_q_heads=8,
            num_kv_heads=2,
            head_dim=64,
            block_size=16,
            dtype=torch.bfloat16,
            backend="triton",
        )
        arguments = (case.block_table, case.seq_lens)
        scale = case.softmax_scale
        return (
            paged_attention_decode(
                case.q, case.k_cache, case.v_cache, *arguments, softmax_scale=scale, plan=plan
            ),
            paged_attention_decode(
                case.q, case.v_cache, case.k_cache, *arguments, softmax_scale=scale, plan=plan
            ),
        )

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for new in (first, first // 3, torch.zeros_like(first), first):
        case.seq_lens.copy_(new)
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        # Planned by themselves, they agree bit for bit with what the graph planned.
        for replayed, again in zip(got, both(), strict=True):
            assert torch.equal(replayed, again) and not replayed.isnan().any()


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_lengths(device: torch.device) -> None:
    case = batch(device, [700, 1200, 3, 90], heads=(32, 8), head_dim=128, block_size=16, dtype=torch.bfloat16)
    lengths = case.seq_lens.clone()
    attend(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            case.block_table,
            case.seq_lens,
            softmax_scale=case.softmax_scale,
            lse=True,
            backend="triton",
        )
    for new in (lengths, lengths // 2, torch.zeros_like(lengths), (lengths - 1).clamp(min=0)):
        case.seq_lens.copy_(new)
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        judge_paged_attention_decode(got, case).require()
