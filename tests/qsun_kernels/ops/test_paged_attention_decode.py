"""paged_attention_decode: against float64, over poisoned caches, at odd lengths and extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from qsun_kernels import paged_attention_decode
from qsun_kernels.testing import inputs, judge
from qsun_kernels.testing.inputs import PagedAttentionInputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(4, 2, 64, 16), (9, 3, 80, 5), (1, 1, 2, 1), (7, 1, 128, 16), (32, 8, 128, 32)]


def attend(case: PagedAttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    with inputs.poisoned_outputs():
        return paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            case.block_table,
            case.seq_lens,
            softmax_scale=case.softmax_scale,
            window=case.window,
            lse=True,
            backend="torch",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
def test_agrees_with_float64(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = inputs.paged_attention_inputs(
        inputs.generator(head_dim),
        [0, 1, 5, 16, 17, 100, 0, 259],
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        window=window,
    )
    judge.judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
def test_a_cache_of_another_dtype(kv_dtype: torch.dtype, device: torch.device) -> None:
    case = inputs.paged_attention_inputs(
        inputs.generator(1),
        [3, 40],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        block_size=8,
        dtype=torch.float32,
        kv_dtype=kv_dtype,
        device=device,
    )
    judge.judge_paged_attention_decode(attend(case), case).require()


def test_a_skewed_batch(device: torch.device) -> None:
    source = inputs.generator(2)
    case = inputs.paged_attention_inputs(
        source,
        inputs.zipf_lengths(source, 24, 2000, 1.5),
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.bfloat16,
        device=device,
    )
    judge.judge_paged_attention_decode(attend(case), case).require()


def test_is_scaled_dot_product_attention() -> None:
    """One request whose blocks are in order, against torch's own operator."""
    source = inputs.generator(3)
    q = inputs.normal(source, (1, 8, 64), torch.float32)
    keys, values = (inputs.normal(source, (2, 48, 64), torch.float32) for _ in range(2))
    k_cache, v_cache = (t.view(2, 3, 16, 64).transpose(0, 1).contiguous() for t in (keys, values))
    out = paged_attention_decode(
        q,
        k_cache,
        v_cache,
        torch.tensor([[0, 1, 2]], dtype=torch.int32),
        torch.tensor([45], dtype=torch.int32),
        softmax_scale=0.2,
    )
    expected = functional.scaled_dot_product_attention(
        q[0, :, None], keys[:, :45].repeat_interleave(4, 0), values[:, :45].repeat_interleave(4, 0), scale=0.2
    )
    torch.testing.assert_close(out[0], expected[:, 0])


def case_of(lengths: list[int], dtype: torch.dtype = torch.float32, **kwargs: object) -> PagedAttentionInputs:
    shape = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 4} | kwargs
    return inputs.paged_attention_inputs(inputs.generator(9), lengths, dtype=dtype, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_form_without_host_reads_is_the_same_function(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, where no length may be read on the host, here on the CPU."""
    from qsun_kernels.backends.reference import paged_attention_decode as reference

    case = case_of([0, 1, 8, 13, 40], torch.bfloat16, window=window)
    monkeypatch.setattr(reference, "_attend_by_host", reference._attend_by_device)
    out, lse = attend(case)
    judge.judge_paged_attention_decode((out, lse), case).require()
    assert not out[0].any()
    assert lse[0].isneginf().all()


def test_length_zero_gives_zeros_and_minus_infinity() -> None:
    out, lse = attend(case_of([0, 0]))
    assert not out.any()
    assert torch.equal(lse, torch.full((2, 4), -math.inf))


def test_no_requests_and_no_blocks() -> None:
    out, lse = attend(case_of([]))
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)
    empty = torch.empty(0, 2, 4, 16)
    out = paged_attention_decode(
        torch.ones(2, 4, 16),
        empty,
        empty,
        torch.empty(2, 0, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        softmax_scale=1.0,
    )
    assert not out.any()


def test_a_window_of_one_is_the_last_value() -> None:
    case = case_of([1, 9, 12], window=1)
    out, _ = attend(case)
    for request, length in enumerate([1, 9, 12]):
        block = case.block_table[request, (length - 1) // 4]
        last = case.v_cache[block, :, (length - 1) % 4]
        assert torch.equal(out[request], last.repeat_interleave(2, 0))


def test_results_merge_by_their_logarithms() -> None:
    """The logarithm is natural and belongs to the softmax: halves of a context merge to the whole."""
    case = case_of([40])
    whole, whole_lse = attend(case)
    halves = []
    for blocks in (case.block_table[:, :5], case.block_table[:, 5:10]):
        out, lse = paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            blocks.contiguous(),
            torch.tensor([20], dtype=torch.int32),
            softmax_scale=case.softmax_scale,
            lse=True,
        )
        halves.append((out, lse))
    total = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(out * torch.exp(lse - total)[..., None] for out, lse in halves)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(total, whole_lse)


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_nan_in_one_request_stays_there(cache: str) -> None:
    case = case_of([7, 9, 12])
    expected, _ = attend(case)
    getattr(case, cache)[case.block_table[1, 0], 0, 1] = math.nan
    out, _ = attend(case)
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    # Query heads 0 and 1 share the KV head that was spoilt.
    assert out[1, :2].isnan().all()
    assert torch.equal(out[1, 2:], expected[1, 2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_overflow_an_unshifted_exponential(dtype: torch.dtype) -> None:
    case = case_of([33], dtype, std=60.0, head_dim=64)
    out, lse = attend(case)
    assert out.isfinite().all()
    assert lse.max() > 100  # exp of it is infinite in float32
    judge.judge_paged_attention_decode((out, lse), case).require()


def test_values_near_the_largest_float16() -> None:
    case = case_of([30], torch.float16)
    case.v_cache.copy_(case.v_cache.clamp(-1, 1) * 65000)
    judge.judge_paged_attention_decode(attend(case), case).require()


def test_block_ids_past_the_length_are_not_followed() -> None:
    case = case_of([5, 12])
    expected = attend(case)
    for request, used in enumerate([2, 3]):
        case.block_table[request, used:] = torch.iinfo(torch.int32).max
    assert all(torch.equal(a, b) for a, b in zip(attend(case), expected, strict=True))


def test_repeats_bit_for_bit() -> None:
    case = case_of([5, 12, 100], torch.bfloat16)
    first, second = attend(case), attend(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.damaged
@pytest.mark.parametrize("length", [-1, 29])
def test_a_length_that_the_table_cannot_hold_is_an_error_on_the_cpu(length: int) -> None:
    case = case_of([17])
    assert case.block_table.shape[1] * 4 == 28
    case.seq_lens[0] = length
    with pytest.raises(ValueError, match=rf"seq_lens\[0\] is {length}, expected 0\.\.28"):
        attend(case)


@pytest.mark.damaged
@pytest.mark.parametrize("block", [-1, 1000])
def test_a_block_outside_the_cache_is_an_error_on_the_cpu(block: int) -> None:
    case = case_of([17])
    case.block_table[0, 1] = block
    with pytest.raises(IndexError, match="out of range"):
        attend(case)
