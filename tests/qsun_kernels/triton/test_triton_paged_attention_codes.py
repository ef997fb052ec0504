"""paged_attention_decode over caches of codes through Triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels.backends.triton.paged_attention_decode import paged_attention_decode
from qsun_kernels.backends.triton.paged_attention_plan import choose_rows, choose_tile, make_plan
from qsun_kernels.testing import inputs
from qsun_kernels.testing.inputs import PagedAttentionInputs
from qsun_kernels.testing.judge import judge_paged_attention_decode
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def batch(device: torch.device, kv: KvKind, seq_lens: list[int], **changes: object) -> PagedAttentionInputs:
    sizes: dict[str, object] = {
        **{"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 5},
        **{"dtype": torch.bfloat16, "kv": kv, "device": device},
    }
    return inputs.paged_attention_inputs(inputs.generator(3), seq_lens, **(sizes | changes))  # type: ignore[arg-type]


def attend(case: PagedAttentionInputs, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    _, num_q_heads, head_dim = case.q.shape
    group = num_q_heads // case.k_cache.shape[1]
    tile = choose_tile(head_dim, case.q.dtype, case.k_cache.dtype, choose_rows(case.q_len * group))
    plan = make_plan(case.seq_lens, parts, tile, case.q_len, case.window)
    with inputs.poisoned_outputs():
        return paged_attention_decode(
            *(case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, case.softmax_scale),
            *(case.window, case.softcap, case.sinks, None, (plan,), case.k_scale, case.v_scale),
        )


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_with_every_dtype(device: torch.device, dtype: torch.dtype, kind: KvKind) -> None:
    case = batch(device, kind, [0, 1, 37, 70], dtype=dtype)
    judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 4), ((3, 3), 20), ((10, 2), 96), ((2, 1), 256)])
def test_heads_and_widths(device: torch.device, heads: tuple[int, int], head_dim: int, kind: KvKind) -> None:
    case = batch(device, kind, [21, 3], num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_cut_into_parts_and_merged(device: torch.device, kind: KvKind) -> None:
    case = batch(device, kind, [300, 0, 9, 140], num_kv_heads=1, sinks=True)
    judge_paged_attention_decode(attend(case, parts=5), case).require()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_several_tokens_window_and_softcap(device: torch.device, kind: KvKind) -> None:
    for std in (1.0, 1e3, 1e-4):
        case = batch(device, kind, [40, 6], q_len=3, window=9, softcap=5.0, std=std, dtype=torch.float16)
        judge_paged_attention_decode(attend(case), case).require()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_a_nan_scale_reads_as_nan(device: torch.device, kind: KvKind) -> None:
    case = batch(device, kind, [5, 9])
    assert case.k_scale is not None
    case.k_scale[case.block_table[1, 1].long(), 1, 2] = torch.nan
    out, _ = attend(case)
    assert out[1, 2:].isnan().all() and out[0].isfinite().all() and out[1, :2].isfinite().all()


def test_a_nan_code_of_float8_reads_as_nan(device: torch.device) -> None:
    """With one scale for all a code says so itself."""
    case = batch(device, "fp8-tensor", [5, 9])
    case.v_cache.view(torch.uint8)[case.block_table[1, 1].long(), 1, 2, 7] = 0x7F
    out, _ = attend(case)
    assert out[1, 2:, 7].isnan().all() and int(out.isnan().sum()) == 2
