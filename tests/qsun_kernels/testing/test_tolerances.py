"""The tolerance rule: it passes what is as good as torch, and fails what is subtly wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qsun_kernels import (
    PackedWeight,
    QuantSpec,
    RopeParameters,
    apply_rope,
    dequantize,
    paged_attention_decode,
    prepare_gate_up,
    prepare_weight,
    rms_norm,
    rope_cache,
    silu_and_mul,
    wna16_gate_up_silu,
    wna16_linear,
)
from qsun_kernels.testing import inputs, judge
from qsun_kernels.testing.tolerances import all_of, compare, compare_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numbers(dtype: torch.dtype, rows: int = 40, width: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """An exact result, and its rounding: the best that any computation can give."""
    exact = torch.randn(rows, width, generator=inputs.generator(0), dtype=torch.float64)
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rounded_exact_result_is_right_even_against_a_lucky_torch(dtype: torch.dtype) -> None:
    exact, rounded = numbers(dtype)
    for scale in ("row", "element"):
        verdict = compare("x", rounded, exact, rounded, scale=scale)  # type: ignore[arg-type]
        assert verdict.ok, verdict.report
        assert verdict.allowed == pytest.approx(2 * torch.finfo(dtype).eps / 2, rel=0.2)
    for value in (0.3, 1 / 3, 100.1):
        one = torch.tensor([value], dtype=torch.float64)
        # torch happens to be exact: half a unit is still granted, for a rounding has to be somewhere.
        verdict = compare("x", one.to(dtype), one, one.to(dtype))
        assert verdict.ok, verdict.report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_times_the_error_of_torch_is_too_much(dtype: torch.dtype) -> None:
    exact, _ = numbers(dtype)
    step = torch.finfo(dtype).eps * exact.abs()
    plain = (exact + 8 * step).to(dtype)
    assert compare("x", (exact + 12 * step).to(dtype), exact, plain, scale="element").ok
    verdict = compare("x", (exact + 26 * step).to(dtype), exact, plain, scale="element")
    assert not verdict.ok
    assert "allowed" in verdict.report
    with pytest.raises(AssertionError, match="worst error"):
        verdict.require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_is_found_and_named(dtype: torch.dtype) -> None:
    exact, rounded = numbers(dtype)
    wrong = rounded.clone()
    wrong[17, 3] += 8 * torch.finfo(dtype).eps * exact[17].abs().max()
    verdict = compare("x", wrong, exact, rounded)
    assert not verdict.ok
    assert "at [17, 3]" in verdict.report


def test_a_loss_of_precision_everywhere_is_found_below_the_worst_element() -> None:
    exact, plain = numbers(torch.float32)
    noisy = exact.abs().amax(-1, keepdim=True) * 2.0**-15
    plain = plain.clone()
    plain[5, 5] += noisy[5, 0]  # torch has one bad element
    everywhere = (exact + noisy).to(torch.float32)
    verdict = compare("x", everywhere, exact, plain)
    assert verdict.worst <= verdict.allowed
    assert not verdict.ok


@pytest.mark.parametrize(
    ("got", "exact", "ok"),
    [
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (-math.inf, math.inf, False),
        (1.0, math.inf, False),
        (math.inf, 1.0, False),
        (math.inf, 70000.0, True),  # rounds to infinity in float16
        (65504.0, 70000.0, False),
        (65504.0, 65505.0, True),
        (0.0, 2e-8, True),  # below half the smallest subnormal
        (0.0, 2e-7, False),
        (0.0, 0.0, True),
        (1e-7, 0.0, False),
    ],
    ids=str,
)
def test_special_values(got: float, exact: float, ok: bool) -> None:
    result, wanted = torch.tensor([got], dtype=torch.float16), torch.tensor([exact], dtype=torch.float64)
    verdict = compare("x", result, wanted, wanted.to(torch.float16), scale="element")
    assert verdict.ok is ok, verdict.report


def test_an_overflow_of_torch_is_no_licence() -> None:
    exact, rounded = numbers(torch.float16)
    plain = rounded.clone()
    plain[0, 0] = math.inf
    assert not compare("x", rounded * 1.01, exact, plain).ok
    assert compare("x", rounded, exact, plain).ok


@pytest.mark.parametrize("width", [0, 3])
def test_wrong_shapes_and_dtypes_fail(width: int) -> None:
    exact = torch.zeros(2, width, dtype=torch.float64)
    plain = torch.zeros(2, width)
    assert not compare("x", torch.zeros(2, width + 1), exact, plain).ok
    assert not compare("x", torch.zeros(2, width, dtype=torch.float16), exact, plain).ok
    assert compare("x", plain, exact, plain).ok


def test_compare_bits_tells_nan_and_signs_apart() -> None:
    nan = torch.tensor([math.nan, 1.0, 0.0])
    assert compare_bits("x", nan.clone(), nan).ok
    negative = torch.tensor([math.nan, 1.0, -0.0])
    verdict = compare_bits("x", negative, nan)
    assert not verdict.ok
    assert "first at [2]" in verdict.report
    assert not compare_bits("x", nan.double(), nan).ok
    assert not compare_bits("x", nan[:2], nan).ok


def test_all_of_reports_a_failure_or_the_nearest() -> None:
    exact, rounded = numbers(torch.float16)
    good = compare("good", rounded, exact, rounded)
    better = compare("better", rounded[:1], rounded[:1].double(), rounded[:1])
    bad = compare("bad", rounded + 1, exact, rounded)
    assert all_of([good, bad, better]).report.startswith("bad")
    assert all_of([better, good]).report.startswith("good")


# Each pair below is a result that is right and one that a plausible bug would give.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 512, 4096])
def test_a_product_with_a_bug_is_caught(K: int, dtype: torch.dtype) -> None:
    source = inputs.generator(1)
    packed = inputs.packed_weight(source, 96, K, QuantSpec(4, 64, False)).with_scales(dtype)
    x = inputs.normal(source, (5, K), dtype)
    prepared = prepare_weight(packed, dtype=dtype, backend="torch")
    judge.judge_wna16_linear(wna16_linear(x, prepared), x, packed).require()

    def wrong(weight: PackedWeight, read: torch.Tensor = x) -> bool:
        result = (read.double() @ dequantize(weight, torch.float32).double().T).to(dtype)
        return not judge.judge_wna16_linear(result, x, packed).ok

    assert packed.qzeros is not None
    assert not wrong(packed)
    missing = x.clone()
    missing[:, K - 1] = 0
    assert wrong(packed, missing)
    assert wrong(replace(packed, scales=packed.scales.roll(1, 1).contiguous())) or K == 64
    assert wrong(replace(packed, scales=packed.scales.roll(1, 0).contiguous()))
    zeros = packed.qzeros.clone()
    zeros[:, -1] ^= 1
    assert wrong(replace(packed, qzeros=zeros))
    swapped = torch.arange(K)
    swapped[[0, 1]] = swapped[[1, 0]]
    assert wrong(packed, x[:, swapped])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 1024])
def test_a_gated_product_with_a_bug_is_caught(K: int, dtype: torch.dtype) -> None:
    source = inputs.generator(6)
    packed = inputs.packed_weight(source, 96, K, QuantSpec(4, 64, False)).with_scales(dtype)
    x = inputs.normal(source, (5, K), dtype, std=2.0)
    prepared = prepare_gate_up(packed, dtype=dtype, backend="torch")
    judge.judge_wna16_gate_up_silu(wna16_gate_up_silu(x, prepared), x, packed).require()
    gate, up = (x.double() @ dequantize(packed, torch.float32).double().T).chunk(2, dim=-1)

    def wrong(result: torch.Tensor) -> bool:
        return not judge.judge_wna16_gate_up_silu(result.to(dtype), x, packed).ok

    silu = torch.nn.functional.silu
    assert not wrong(silu(gate) * up)
    assert wrong(silu(up) * gate)
    assert wrong(gate * up)
    assert wrong(torch.nn.functional.gelu(gate) * up)
    assert wrong(silu(gate) * up.roll(1, 1))
    assert wrong(silu(gate.roll(1, 0)) * up)
    assert wrong(silu(gate) * (up + x[:, :1] * dequantize(packed, torch.float32)[48:, 0] * 0.5))
    # As much precision as eight bits less have.
    coarse = torch.bfloat16 if dtype == torch.float32 else torch.float8_e4m3fn
    assert wrong(silu(gate.to(coarse).double()) * up)
    right = wna16_gate_up_silu(x, prepared)
    columns = torch.tensor([0, 7, 47])
    assert judge.judge_wna16_gate_up_silu(right, x, packed, columns=columns).ok
    right[2, 7] = right[2, 7] * 1.5 + 1
    assert not judge.judge_wna16_gate_up_silu(right, x, packed, columns=columns).ok
    assert judge.judge_wna16_gate_up_silu(right, x, packed, columns=columns[::2]).ok
    assert not judge.judge_wna16_gate_up_silu(right[:, :5], x, packed).ok


def test_float16_accumulation_is_caught() -> None:
    source = inputs.generator(2)
    packed = inputs.packed_weight(source, 64, 2048, QuantSpec(4, 128, True)).with_scales(torch.float16)
    x = inputs.normal(source, (3, 2048), torch.float16)
    weight = dequantize(packed, torch.float16)
    total = torch.zeros(3, 64, dtype=torch.float16)
    for k in range(2048):
        total = total + x[:, k, None] * weight[None, :, k]
    assert not judge.judge_wna16_linear(total, x, packed).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [17, 200, 1000])
def test_attention_with_a_bug_is_caught(length: int, dtype: torch.dtype) -> None:
    case = inputs.paged_attention_inputs(
        inputs.generator(3),
        [length, 40],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype,
    )

    def attend(case: inputs.PagedAttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        return paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            case.block_table,
            case.seq_lens,
            softmax_scale=case.softmax_scale,
            window=case.window,
            lse=True,
        )

    out, lse = attend(case)
    judge.judge_paged_attention_decode((out, lse), case).require()
    shorter = replace(case, seq_lens=case.seq_lens - 1)
    assert not judge.judge_paged_attention_decode(attend(shorter), case).ok
    windowed = replace(case, window=length - 1)
    assert not judge.judge_paged_attention_decode(attend(windowed), case).ok
    scaled = replace(case, softmax_scale=case.softmax_scale * 1.02)
    assert not judge.judge_paged_attention_decode(attend(scaled), case).ok
    assert not judge.judge_paged_attention_decode((out, lse / math.log(2)), case).ok
    assert not judge.judge_paged_attention_decode((out.flip(1), lse), case).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_several_tokens_with_a_bug_is_caught(dtype: torch.dtype) -> None:
    case = inputs.paged_attention_inputs(
        inputs.generator(4),
        [100, 40],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype,
        window=30,
        q_len=3,
        softcap=2.0,
        sinks=True,
    )
    assert case.sinks is not None

    def attend(case: inputs.PagedAttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
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
        )

    out, lse = attend(case)
    judge.judge_paged_attention_decode((out, lse), case).require()
    wrong = {
        "softcap": replace(case, softcap=2.1),
        "no softcap": replace(case, softcap=None),
        "sinks": replace(case, sinks=case.sinks + 0.1),
        "no sinks": replace(case, sinks=None),
        "window": replace(case, window=29),
    }
    for name, one in wrong.items():
        assert not judge.judge_paged_attention_decode(attend(one), case).ok, name
    # The last token's reach for all of them, and the tokens of a request in the wrong order.
    last = replace(case, q=case.q[1::3], window=30)
    assert not judge.judge_paged_attention_decode(
        tuple(t.repeat_interleave(3, 0) for t in attend(last)),  # type: ignore[arg-type]
        case,
    ).ok
    flipped = tuple(t.unflatten(0, (2, 3)).flip(1).flatten(0, 1) for t in (out, lse))
    assert not judge.judge_paged_attention_decode(flipped, case).ok  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_operators_with_a_bug_are_caught(dtype: torch.dtype) -> None:
    source = inputs.generator(4)
    x, residual = (inputs.normal(source, (7, 96), dtype) for _ in range(2))
    weight = inputs.normal(source, (96,), dtype)
    assert not judge.judge_rms_norm(rms_norm(x, weight, eps=2e-2), x, weight, 1e-6).ok
    assert not judge.judge_rms_norm(rms_norm(x, weight.roll(1), eps=1e-6), x, weight, 1e-6).ok
    norm, _ = rms_norm(x, weight, eps=1e-6, residual=residual)
    assert not judge.judge_rms_norm((norm, x), x, weight, 1e-6, residual).ok
    assert not judge.judge_silu_and_mul(silu_and_mul(x.roll(48, 1)), x).ok
    table = rope_cache(RopeParameters(10000.0), 96, 60)
    q, positions = x.view(7, 1, 96), torch.arange(7) + 20
    right = apply_rope(q, q, positions, table)
    judge.judge_apply_rope(right, q, q, positions, table).require()
    late = apply_rope(q, q, positions + 1, table)
    assert not judge.judge_apply_rope(late, q, q, positions, table).ok
    assert not judge.judge_apply_rope((right[0], q), q, q, positions, table).ok
    packed = inputs.packed_weight(source, 3, 64, QuantSpec(4, 32, True), scale_dtype=dtype)
    weight = dequantize(packed, dtype)
    weight[1, 1] = torch.nextafter(weight[1, 1], weight[1, 1] + 1)
    assert not judge.judge_dequantize(weight, packed, dtype).ok


def test_a_sample_of_columns_judges_those_columns() -> None:
    source = inputs.generator(5)
    packed = inputs.packed_weight(source, 64, 128, QuantSpec(4, 64, False))
    x = inputs.normal(source, (4, 128), torch.float32)
    y = wna16_linear(x, prepare_weight(packed, dtype=torch.float32))
    y[2, 9] += 1
    assert judge.judge_wna16_linear(y, x, packed, columns=torch.tensor([0, 8, 63])).ok
    assert not judge.judge_wna16_linear(y, x, packed, columns=torch.tensor([0, 9])).ok
    assert not judge.judge_wna16_linear(y[:, :5], x, packed, columns=torch.tensor([0])).ok
