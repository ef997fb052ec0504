"""paged_attention_decode over caches of codes: against float64 over the numbers that the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsun_kernels import paged_attention_decode, plan_paged_attention
from qsun_kernels.testing import inputs, judge
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case_of(kind: KvKind, device: torch.device, **changes: object) -> PagedAttentionInputs:
    sizes: dict[str, object] = {
        **{"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "block_size": 8},
        **{"dtype": torch.bfloat16, "kv": kind, "device": device},
    }
    return inputs.paged_attention_inputs(inputs.generator(7), [0, 1, 5, 16, 70], **(sizes | changes))  # type: ignore[arg-type]


def attend(case: PagedAttentionInputs, **options: object) -> tuple[Tensor, Tensor]:
    arguments: dict[str, object] = {
        **{"softmax_scale": case.softmax_scale, "window": case.window, "softcap": case.softcap},
        **{"sinks": case.sinks, "k_scale": case.k_scale, "v_scale": case.v_scale},
        **{"lse": True, "backend": "torch"},
    }
    with inputs.poisoned_outputs():
        return paged_attention_decode(  # type: ignore[call-overload, no-any-return]
            case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, **(arguments | options)
        )


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_agrees_with_float64(head_dim: int, dtype: torch.dtype, kind: KvKind, device: torch.device) -> None:
    case = case_of(kind, device, head_dim=head_dim, dtype=dtype)
    judge.judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_with_all_the_rest(kind: KvKind, device: torch.device) -> None:
    """Several tokens, a window, a softcap, sinks; large and small values."""
    for std in (1.0, 1e3, 1e-4):
        case = case_of(kind, device, q_len=3, window=9, softcap=5.0, sinks=True, std=std)
        judge.judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_the_form_without_host_reads_is_the_same_function(
    kind: KvKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, here on the CPU."""
    from qsun_kernels.backends.reference import paged_attention_decode as reference

    case = case_of(kind, torch.device("cpu"), window=11)
    expected = attend(case)
    monkeypatch.setattr(reference, "_attend_by_host", reference._attend_by_device)
    got = attend(case)
    judge.judge_paged_attention_decode(got, case).require()
    assert torch.allclose(got[0], expected[0], rtol=1e-2, atol=1e-2)


def test_a_plan_is_for_its_cache() -> None:
    cpu = torch.device("cpu")
    case = case_of("fp8", cpu)

    def plan(**changes: object) -> object:
        sizes: dict[str, object] = {
            **{"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "block_size": 8},
            **{"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn},
        }
        return plan_paged_attention(case.seq_lens, **(sizes | changes))  # type: ignore[arg-type]

    assert torch.equal(attend(case, plan=plan())[0], attend(case)[0])
    for changes, says in (
        ({"kv_scales": "tensor"}, "plan was made for kv_scales tensor, expected one for kv_scales token"),
        ({"kv_dtype": torch.int8}, "plan was made for kv_dtype torch.int8"),
    ):
        with pytest.raises(ValueError, match=says):
            attend(case, plan=plan(**changes))
    given = case_of("fp8-tensor", cpu)
    assert torch.equal(attend(given, plan=plan(kv_scales="tensor"))[0], attend(given)[0])
    four = case_of("int4", cpu)
    assert torch.equal(attend(four, plan=plan(kv_dtype=torch.uint8))[0], attend(four)[0])


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_a_nan_scale_is_seen_and_an_unread_one_is_not(kind: KvKind, device: torch.device) -> None:
    case = case_of(kind, device)
    out, _ = attend(case)
    assert out.isfinite().all()
    assert case.v_scale is not None and case.v_scale.isnan().any()
    v_scale = case.v_scale.clone()
    block = case.block_table[2, 0].long()
    v_scale[block, 1, 2] = torch.nan
    got, _ = attend(replace(case, v_scale=v_scale))
    spoiled = got.isnan().flatten(1).any(1)
    assert spoiled.tolist() == [False, False, True, False, False]
    assert got[2, 3:].isnan().all() and not got[2, :3].isnan().any()
