"""How attention is shared out: equal parts of all tiles, whatever the lengths, and who merges what."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import paged_attention_decode, plan_paged_attention
from qsun_kernels.backends.triton import paged_attention_decode as implementation
from qsun_kernels.backends.triton.paged_attention_plan import (
    MIN_SHARE,
    choose_parts,
    choose_rows,
    choose_tile,
    make_plan,
    parts_of,
    programs_a_part,
)
from qsun_kernels.testing import inputs

pytestmark = [
    pytest.mark.triton,
    # numpy, of the logarithm of an empty sum, where the kernel then takes -inf.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]

BF16 = torch.bfloat16


def expected_plan(lengths: list[int], parts: int, tile: int, q_len: int, window: int | None) -> list[int]:
    """share, first request of each part and of the one behind the last, first tile of each request."""
    seen = [n if window is None else min(n, q_len + window - 1) for n in lengths]
    offsets = [0, *accumulate(max(1, -(-n // tile)) for n in seen)]
    share = max(MIN_SHARE, -(-offsets[-1] // parts))
    firsts = [min(bisect_right(offsets, part * share) - 1, len(lengths)) for part in range(parts + 1)]
    return [share, *firsts, *offsets]


@pytest.mark.parametrize("parts", [1, 3, 33, 264])
@pytest.mark.parametrize("batch", ["one", "empty", "zipf", "many", "chunks"])
def test_a_plan_is_equal_shares(device: torch.device, batch: str, parts: int) -> None:
    source = inputs.generator(parts)
    lengths = {
        "one": [100_000],
        "empty": [0, 0, 0],
        "zipf": inputs.zipf_lengths(source, 64, 131072, 1.5),
        "many": torch.randint(0, 200, (4096,), generator=source).tolist(),
        "chunks": [1] * 1024 + [5000] + [0] * 1024,
    }[batch]
    for q_len, window in ((1, None), (5, 300)):
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        with inputs.poisoned_outputs():
            plan = make_plan(seq_lens, parts, 64, q_len, window)
        assert plan.tolist() == expected_plan(lengths, parts, 64, q_len, window)
        assert parts_of(plan, len(lengths)) == parts


def test_a_plan_follows_the_lengths_on_the_device(device: torch.device) -> None:
    """The same number of parts for other lengths: what a captured graph needs."""
    shapes = {
        make_plan(torch.tensor(lengths, dtype=torch.int32, device=device), 33, 64, 1, None).shape
        for lengths in ([1, 1, 1], [100_000, 0, 7])
    }
    assert shapes == {(33 + 3 + 3,)}


def test_parts_fill_the_device_once() -> None:
    assert choose_parts(8, 132) == 33
    assert choose_parts(1, 132) == 264
    assert choose_parts(5, 132) == 52
    assert choose_parts(1000, 132) == 1
    assert choose_parts(2, 1) == 1


def test_rows_are_tokens_times_heads_of_a_group() -> None:
    assert [choose_rows(n) for n in (1, 16, 17, 40, 128)] == [16, 16, 32, 32, 32]
    assert [programs_a_part(8 * q_len, 4) for q_len in (1, 4, 5, 8)] == [4, 4, 8, 8]


def test_tiles() -> None:
    assert [choose_tile(d, BF16, BF16, 16) for d in (16, 64, 96, 128, 256)] == [128, 128, 64, 64, 32]
    assert [choose_tile(d, BF16, BF16, 32) for d in (16, 64, 96, 128, 256)] == [128, 64, 32, 32, 32]
    for rows in (16, 32):
        assert choose_tile(128, torch.float32, BF16, rows) == 16
        assert choose_tile(32, torch.float32, torch.float32, rows) == 64


def test_a_given_plan_is_not_made_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs.paged_attention_inputs(
        inputs.generator(2),
        [40, 0, 150],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        block_size=8,
        dtype=torch.float32,
        device=device,
        q_len=2,
    )

    def attend(values: Tensor, given: bool) -> Tensor:
        return paged_attention_decode(
            case.q,
            case.k_cache,
            values,
            case.block_table,
            case.seq_lens,
            softmax_scale=case.softmax_scale,
            plan=plan if given else None,
            backend="triton",
        )

    plan = plan_paged_attention(
        case.seq_lens,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        block_size=8,
        dtype=torch.float32,
        q_len=2,
        backend="triton",
    )
    other = case.v_cache.flip(3).contiguous()
    expected = attend(case.v_cache, False), attend(other, False)

    def fail(*_: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(implementation, "plan_paged_attention", fail)
    for values, one in zip((case.v_cache, other), expected, strict=True):
        assert torch.equal(attend(values, True), one)
    with pytest.raises(AssertionError, match="planned again"):
        attend(other, False)


def test_no_requests_make_an_empty_plan(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=device)
    plan = plan_paged_attention(
        none, num_q_heads=4, num_kv_heads=2, head_dim=16, block_size=8, dtype=BF16, backend="triton"
    )
    cache = torch.zeros(1, 2, 8, 16, dtype=BF16, device=device)
    out, lse = paged_attention_decode(
        torch.zeros(0, 4, 16, dtype=BF16, device=device),
        cache,
        cache,
        torch.zeros(0, 3, dtype=torch.int32, device=device),
        none,
        softmax_scale=1.0,
        plan=plan,
        lse=True,
    )
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
