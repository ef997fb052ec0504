"""paged_attention_decode with several query tokens, a softcap, sinks and a given output, in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsun_kernels import paged_attention_decode
from qsun_kernels.testing import inputs, judge
from qsun_kernels.testing.inputs import PagedAttentionInputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = [0, 1, 3, 8, 40, 131]


def attend(case: PagedAttentionInputs, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with inputs.poisoned_outputs():
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
            out=out,
            backend="torch",
        )


def case_of(
    device: torch.device | str,
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    q_len: int = 1,
    softcap: float | None = None,
    sinks: bool = False,
) -> PagedAttentionInputs:
    return inputs.paged_attention_inputs(
        inputs.generator(q_len),
        lengths,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=32,
        block_size=8,
        dtype=dtype,
        device=device,
        window=window,
        q_len=q_len,
        softcap=softcap,
        sinks=sinks,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("q_len", [2, 5, 8])
def test_several_tokens_agree_with_float64(
    device: torch.device, q_len: int, window: int | None, dtype: torch.dtype
) -> None:
    """Some requests are shorter than q_len: their first tokens stand nowhere."""
    case = case_of(device, LENGTHS, dtype=dtype, window=window, q_len=q_len)
    judge.judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks_agree_with_float64(
    device: torch.device, sinks: bool, softcap: float | None, q_len: int, dtype: torch.dtype
) -> None:
    case = case_of(
        device, LENGTHS, dtype=dtype, heads=(6, 2), window=60, q_len=q_len, softcap=softcap, sinks=sinks
    )
    judge.judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("window", [None, 3])
def test_a_token_is_what_it_is_alone(window: int | None) -> None:
    """Token j of q_len against a call of one token over the first seq_len - q_len + j + 1 positions."""
    case = case_of("cpu", [5, 29, 64], window=window, q_len=4)
    out, lse = attend(case)
    for token in range(4):
        alone = replace(case, q=case.q[token::4], seq_lens=case.seq_lens - 3 + token)
        for together, one in zip((out, lse), attend(alone), strict=True):
            torch.testing.assert_close(together[token::4], one, rtol=1e-5, atol=1e-6)


def test_tokens_before_the_first_position_get_zeros() -> None:
    case = case_of("cpu", [2, 0], q_len=4)
    out, lse = attend(case)
    nowhere = torch.tensor([True, True, False, False, True, True, True, True])
    assert not out[nowhere].any() and lse[nowhere].isneginf().all()
    assert out[~nowhere].all() and lse[~nowhere].isfinite().all()


def test_a_sink_is_a_position_without_value() -> None:
    """One more key whose score is the sink and whose value is zero."""
    case = case_of("cpu", [7], heads=(1, 1), sinks=True)
    assert case.sinks is not None
    keys, values = (cache[case.block_table[0, 0], 0] for cache in (case.k_cache, case.v_cache))
    scores = torch.cat((keys[:7] @ case.q[0, 0] * case.softmax_scale, case.sinks))
    weights = scores.softmax(0)
    out, lse = attend(case)
    torch.testing.assert_close(out[0, 0], weights[:7] @ values[:7])
    torch.testing.assert_close(lse[0, 0], scores.logsumexp(0))


@pytest.mark.parametrize("q_len", [1, 3])
def test_length_zero_with_sinks_gives_zeros_and_the_sinks(q_len: int) -> None:
    case = case_of("cpu", [0, 9], q_len=q_len, sinks=True)
    assert case.sinks is not None
    for table in (case.block_table, case.block_table[:, :0].contiguous()):
        lengths = case.seq_lens if table.shape[1] else torch.zeros_like(case.seq_lens)
        out, lse = attend(replace(case, block_table=table, seq_lens=lengths))
        assert not out[:q_len].any()
        assert torch.equal(lse[:q_len], case.sinks.expand(q_len, -1))


def test_sinks_of_minus_infinity_are_none() -> None:
    case = case_of("cpu", [0, 33], softcap=5.0)
    without = attend(case)
    with_sinks = attend(replace(case, sinks=torch.full((4,), -torch.inf)))
    assert all(torch.equal(a, b) for a, b in zip(without, with_sinks, strict=True))


def test_a_wide_softcap_changes_little_and_a_narrow_one_evens_out() -> None:
    case = case_of("cpu", [40])
    torch.testing.assert_close(attend(replace(case, softcap=1e4)), attend(case), rtol=1e-4, atol=1e-5)
    _, lse = attend(replace(case, softcap=1e-6))
    torch.testing.assert_close(lse, torch.full_like(lse, 40.0).log())


@pytest.mark.parametrize("q_len", [1, 3])
def test_out_is_written_and_returned(device: torch.device, q_len: int) -> None:
    case = case_of(device, LENGTHS, dtype=torch.bfloat16, q_len=q_len)
    expected, _ = attend(case)
    out = torch.full(case.q.shape, torch.nan, dtype=torch.bfloat16, device=device)
    got, _ = attend(case, out)
    assert got is out and torch.equal(out, expected)


@pytest.mark.parametrize(("window", "q_len"), [(None, 3), (5, 2), (4, 8)])
def test_the_form_without_host_reads_is_the_same_function(
    window: int | None, q_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, where no length may be read on the host, here on the CPU."""
    from qsun_kernels.backends.reference import paged_attention_decode as reference

    case = case_of("cpu", LENGTHS, window=window, q_len=q_len, softcap=3.0, sinks=True)
    monkeypatch.setattr(reference, "_attend_by_host", reference._attend_by_device)
    judge.judge_paged_attention_decode(attend(case), case).require()
