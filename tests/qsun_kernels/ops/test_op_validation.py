"""Wrong arguments: an error of the right type that names the argument, what was got and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qsun_kernels
from qsun_kernels import QuantSpec, prepare_gate_up, prepare_weight
from qsun_kernels.testing import inputs

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
META = torch.device("meta")


def strided(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """A tensor of this shape whose last dimension has stride 2."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def packed(N: int = 16, K: int = 32) -> qsun_kernels.PackedWeight:
    return inputs.packed_weight(inputs.generator(0), N, K, QuantSpec(4, 32, True))


def good_arguments(operator: str) -> dict[str, Any]:
    """Arguments that the operator accepts."""
    cache = torch.zeros(3, 2, 4, 8)
    rows = torch.zeros(5, 2, 8)
    good: dict[str, Callable[[], dict[str, Any]]] = {
        "rms_norm": lambda: {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": 1e-6},
        "silu_and_mul": lambda: {"x": torch.ones(3, 8)},
        "apply_rope": lambda: {
            "q": torch.zeros(5, 4, 8),
            "k": rows,
            "positions": torch.zeros(5, dtype=torch.int64),
            "cos_sin": torch.zeros(9, 8),
        },
        "write_kv_cache": lambda: {
            "k": rows,
            "v": rows.clone(),
            "k_cache": cache,
            "v_cache": cache.clone(),
            "slot_mapping": torch.arange(5),
        },
        "paged_attention_decode": lambda: {
            "q": torch.zeros(2, 4, 8),
            "k_cache": cache,
            "v_cache": cache.clone(),
            "block_table": torch.zeros(2, 3, dtype=torch.int32),
            "seq_lens": torch.ones(2, dtype=torch.int32),
            "softmax_scale": 0.1,
        },
        "wna16_linear": lambda: {"x": torch.ones(3, 32), "weight": prepare_weight(packed(), dtype=F32)},
        "wna16_linear_rms_norm": lambda: {
            "x": torch.ones(3, 32),
            "weight": prepare_weight(packed(), dtype=F32),
            "residual": torch.ones(3, 16),
            "norm_weight": torch.ones(16),
            "eps": 1e-6,
        },
        "wna16_gate_up_silu": lambda: {
            "x": torch.ones(3, 32),
            "weight": prepare_gate_up(packed(), dtype=F32),
        },
        "prepare_gate_up": lambda: {"packed": packed(), "dtype": F16},
        "dequantize": lambda: {"weight": packed(), "dtype": F16},
        "sample_tokens": lambda: {
            "logits": torch.zeros(3, 8),
            "temperature": torch.ones(3),
            "top_k": torch.zeros(3, dtype=torch.int32),
            "top_p": torch.ones(3),
            "min_p": torch.zeros(3),
            "keys": torch.zeros(3, dtype=torch.int64),
        },
        "prepare_weight": lambda: {"packed": packed(), "dtype": F16},
    }
    return good[operator]()


@pytest.mark.parametrize(
    "operator",
    [
        "rms_norm",
        "silu_and_mul",
        "apply_rope",
        "write_kv_cache",
        "paged_attention_decode",
        "wna16_linear",
        "wna16_linear_rms_norm",
        "wna16_gate_up_silu",
        "dequantize",
        "prepare_weight",
        "prepare_gate_up",
        "sample_tokens",
    ],
)
def test_the_good_arguments_are_good(operator: str) -> None:
    """Without this, a case below could fail for another reason than its own."""
    getattr(qsun_kernels, operator)(**good_arguments(operator))


CASES: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    # rms_norm
    ("rms_norm", {"x": [1.0]}, TypeError, ["x is a list", "torch.Tensor"]),
    (
        "rms_norm",
        {"x": torch.ones(3, 8, dtype=torch.int32)},
        TypeError,
        ["x has dtype torch.int32", "torch.bfloat16"],
    ),
    ("rms_norm", {"x": torch.ones(3, 8, dtype=torch.float64)}, TypeError, ["x has dtype torch.float64"]),
    ("rms_norm", {"x": torch.tensor(1.0)}, ValueError, ["x has shape ()", "at least one dimension"]),
    ("rms_norm", {"x": strided(3, 8)}, ValueError, ["x has strides (16, 2)", "stride 1"]),
    ("rms_norm", {"x": torch.ones(3, 7)}, ValueError, ["weight has shape (8,)", "(H,) = (7,)"]),
    (
        "rms_norm",
        {"weight": torch.ones(8, dtype=F16)},
        TypeError,
        ["weight has dtype torch.float16", "torch.float32"],
    ),
    ("rms_norm", {"weight": torch.ones(8, device=META)}, ValueError, ["weight is on meta", "expected cpu"]),
    ("rms_norm", {"weight": strided(8)}, ValueError, ["weight has strides (2,)", "contiguous"]),
    ("rms_norm", {"weight": None}, TypeError, ["weight is a NoneType"]),
    ("rms_norm", {"eps": -1.0}, ValueError, ["eps is -1.0", "at least 0"]),
    ("rms_norm", {"eps": float("nan")}, ValueError, ["eps is nan"]),
    ("rms_norm", {"eps": float("inf")}, ValueError, ["eps is inf"]),
    ("rms_norm", {"eps": "1e-6"}, ValueError, ["eps is '1e-6'"]),
    ("rms_norm", {"residual": torch.ones(2, 8)}, ValueError, ["residual has shape (2, 8)", "(3, 8)"]),
    (
        "rms_norm",
        {"residual": torch.ones(3, 8, dtype=BF16)},
        TypeError,
        ["residual has dtype torch.bfloat16"],
    ),
    ("rms_norm", {"residual": strided(3, 8)}, ValueError, ["residual has strides"]),
    ("rms_norm", {"backend": "cudnn"}, ValueError, ["backend is 'cudnn'", "'cuda', 'triton', 'torch'"]),
    # silu_and_mul
    ("silu_and_mul", {"x": torch.ones(3, 7)}, ValueError, ["x has shape (3, 7)", "an even last size"]),
    ("silu_and_mul", {"x": torch.ones(3, 8, dtype=torch.bool)}, TypeError, ["x has dtype torch.bool"]),
    ("silu_and_mul", {"x": strided(3, 8)}, ValueError, ["x has strides (16, 2)"]),
    # sample_tokens
    ("sample_tokens", {"logits": torch.zeros(8)}, ValueError, ["logits has shape (8,)", "(B, V)"]),
    ("sample_tokens", {"logits": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, ["logits has dtype"]),
    ("sample_tokens", {"logits": strided(3, 8)}, ValueError, ["logits has strides (16, 2)"]),
    ("sample_tokens", {"logits": torch.zeros(3, 0)}, ValueError, ["shape (3, 0)", "V from 1 to 2**22"]),
    (
        "sample_tokens",
        {"logits": torch.empty(3, 2**22 + 1, dtype=F16)},
        ValueError,
        ["shape (3, 4194305)", "V from 1 to 2**22"],
    ),
    ("sample_tokens", {"temperature": 1.0}, TypeError, ["temperature is a float"]),
    (
        "sample_tokens",
        {"temperature": torch.ones(4)},
        ValueError,
        ["temperature has shape (4,)", "(B,) = (3,)"],
    ),
    (
        "sample_tokens",
        {"top_k": torch.zeros(3, dtype=torch.int64)},
        TypeError,
        ["top_k has dtype torch.int64"],
    ),
    (
        "sample_tokens",
        {"top_p": torch.ones(3, device=META)},
        ValueError,
        ["top_p is on meta", "expected cpu"],
    ),
    ("sample_tokens", {"min_p": strided(3)}, ValueError, ["min_p has strides (2,)", "contiguous"]),
    ("sample_tokens", {"keys": torch.zeros(3, dtype=torch.int32)}, TypeError, ["keys has dtype torch.int32"]),
    # apply_rope
    ("apply_rope", {"q": torch.zeros(5, 32)}, ValueError, ["q has shape (5, 32)", "(T, Hq, D)"]),
    ("apply_rope", {"q": torch.zeros(5, 4, 7)}, ValueError, ["q has shape (5, 4, 7)", "even D"]),
    (
        "apply_rope",
        {"q": torch.zeros(4, 5, 8).transpose(0, 1)},
        ValueError,
        ["q has strides", "side by side"],
    ),
    ("apply_rope", {"q": strided(5, 4, 8)}, ValueError, ["q has strides", "side by side"]),
    ("apply_rope", {"k": torch.zeros(4, 2, 8)}, ValueError, ["k has shape (4, 2, 8)", "(5, any, 8)"]),
    ("apply_rope", {"k": torch.zeros(5, 2, 16)}, ValueError, ["k has shape (5, 2, 16)", "(5, any, 8)"]),
    ("apply_rope", {"k": torch.zeros(5, 2, 8, dtype=F16)}, TypeError, ["k has dtype torch.float16"]),
    (
        "apply_rope",
        {"positions": torch.zeros(5, dtype=torch.int32)},
        TypeError,
        ["positions has dtype torch.int32"],
    ),
    (
        "apply_rope",
        {"positions": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        ["positions has shape (4,)", "(5,)"],
    ),
    ("apply_rope", {"cos_sin": torch.zeros(9, 8, dtype=F16)}, TypeError, ["cos_sin has dtype", "float32"]),
    ("apply_rope", {"cos_sin": torch.zeros(9, 16)}, ValueError, ["cos_sin has shape (9, 16)", "(9, 8)"]),
    ("apply_rope", {"cos_sin": torch.zeros(8)}, ValueError, ["cos_sin has shape (8,)", "(max_positions, D)"]),
    ("apply_rope", {"cos_sin": torch.zeros(8, 9).T}, ValueError, ["cos_sin has strides", "contiguous"]),
    # write_kv_cache
    ("write_kv_cache", {"k": torch.zeros(5, 16)}, ValueError, ["k has shape (5, 16)", "(T, Hkv, D)"]),
    ("write_kv_cache", {"v": torch.zeros(4, 2, 8)}, ValueError, ["v has shape (4, 2, 8)", "(5, 2, 8)"]),
    ("write_kv_cache", {"v": torch.zeros(5, 2, 8, dtype=F16)}, TypeError, ["v has dtype torch.float16"]),
    ("write_kv_cache", {"v": strided(5, 2, 8)}, ValueError, ["v has strides", "side by side"]),
    (
        "write_kv_cache",
        {"k_cache": torch.zeros(3, 2, 8)},
        ValueError,
        ["k_cache has shape (3, 2, 8)", "num_blocks"],
    ),
    (
        "write_kv_cache",
        {"k_cache": torch.zeros(3, 4, 2, 8).transpose(1, 2)},
        ValueError,
        ["k_cache has strides"],
    ),
    (
        "write_kv_cache",
        {"k_cache": torch.zeros(3, 2, 4, 8, dtype=torch.int16)},
        TypeError,
        ["k_cache has dtype"],
    ),
    ("write_kv_cache", {"v_cache": torch.zeros(2, 2, 4, 8)}, ValueError, ["v_cache has shape (2, 2, 4, 8)"]),
    ("write_kv_cache", {"v_cache": torch.zeros(3, 2, 4, 8, dtype=F16)}, TypeError, ["v_cache has dtype"]),
    (
        "write_kv_cache",
        {"k_cache": torch.zeros(3, 1, 4, 8), "v_cache": torch.zeros(3, 1, 4, 8)},
        ValueError,
        ["k_cache has shape (3, 1, 4, 8)", "(any, 2, any, 8)"],
    ),
    (
        "write_kv_cache",
        {"k_cache": torch.zeros(3, 2, 0, 8), "v_cache": torch.zeros(3, 2, 0, 8)},
        ValueError,
        ["k_cache has shape (3, 2, 0, 8)", "block_size of at least 1"],
    ),
    (
        "write_kv_cache",
        {"slot_mapping": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        ["slot_mapping has shape (4,)"],
    ),
    (
        "write_kv_cache",
        {"slot_mapping": torch.zeros(5, dtype=torch.int32)},
        TypeError,
        ["slot_mapping has dtype"],
    ),
    (
        "write_kv_cache",
        {"slot_mapping": torch.zeros(10, dtype=torch.int64)[::2]},
        ValueError,
        ["slot_mapping has str"],
    ),
    # paged_attention_decode
    (
        "paged_attention_decode",
        {"q": torch.zeros(2, 32)},
        ValueError,
        ["q has shape (2, 32)", "(B * q_len, Hq, D)"],
    ),
    (
        "paged_attention_decode",
        {"q": torch.zeros(2, 4, 16)},
        ValueError,
        ["k_cache has shape", "head_dim of 16"],
    ),
    (
        "paged_attention_decode",
        {"q": torch.zeros(2, 3, 8)},
        ValueError,
        ["q has 3 heads", "multiple of the 2 heads"],
    ),
    ("paged_attention_decode", {"q": strided(2, 4, 8)}, ValueError, ["q has strides"]),
    (
        "paged_attention_decode",
        {"q": torch.zeros(2, 4, 8, device=META)},
        ValueError,
        ["k_cache is on cpu", "meta"],
    ),
    ("paged_attention_decode", {"v_cache": torch.zeros(3, 2, 4, 16)}, ValueError, ["v_cache has shape"]),
    (
        "paged_attention_decode",
        {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
        TypeError,
        ["block_table has dtype torch.int64", "torch.int32"],
    ),
    (
        "paged_attention_decode",
        {"block_table": torch.zeros(3, 3, dtype=torch.int32)},
        ValueError,
        ["seq_lens has shape (2,)", "each row of block_table, (B,) = (3,)"],
    ),
    (
        "paged_attention_decode",
        {"block_table": torch.zeros(6, dtype=torch.int32)},
        ValueError,
        ["block_table has shape (6,)", "(B, max_blocks)"],
    ),
    (
        "paged_attention_decode",
        {"block_table": torch.zeros(2, 6, dtype=torch.int32)[:, :3]},
        ValueError,
        ["block_table has strides (6, 1)", "contiguous"],
    ),
    (
        "paged_attention_decode",
        {"seq_lens": torch.ones(2, dtype=torch.int64)},
        TypeError,
        ["seq_lens has dtype torch.int64"],
    ),
    (
        "paged_attention_decode",
        {"seq_lens": torch.ones(3, dtype=torch.int32)},
        ValueError,
        ["seq_lens has shape (3,)", "(B,) = (2,)"],
    ),
    (
        "paged_attention_decode",
        {"softmax_scale": float("nan")},
        ValueError,
        ["softmax_scale is nan", "finite"],
    ),
    ("paged_attention_decode", {"softmax_scale": None}, ValueError, ["softmax_scale is None"]),
    ("paged_attention_decode", {"window": 0}, ValueError, ["window is 0", "at least 1"]),
    ("paged_attention_decode", {"window": -5}, ValueError, ["window is -5"]),
    ("paged_attention_decode", {"window": 2.5}, TypeError, ["window is 2.5", "integer"]),
    ("paged_attention_decode", {"q": torch.zeros(3, 4, 8)}, ValueError, ["q has 3 rows", "B = 2"]),
    ("paged_attention_decode", {"q": torch.zeros(0, 4, 8)}, ValueError, ["q has 0 rows", "B = 2"]),
    ("paged_attention_decode", {"q": torch.zeros(18, 4, 8)}, ValueError, ["q has 18 rows", "q_len <= 8"]),
    (
        "paged_attention_decode",
        {
            "block_table": torch.zeros(0, 3, dtype=torch.int32),
            "seq_lens": torch.zeros(0, dtype=torch.int32),
        },
        ValueError,
        ["q has 2 rows", "B = 0"],
    ),
    ("paged_attention_decode", {"softcap": 0.0}, ValueError, ["softcap is 0.0", "above 0"]),
    ("paged_attention_decode", {"softcap": float("inf")}, ValueError, ["softcap is inf", "finite"]),
    ("paged_attention_decode", {"softcap": "30"}, ValueError, ["softcap is '30'"]),
    ("paged_attention_decode", {"sinks": [0.0] * 4}, TypeError, ["sinks is a list", "torch.Tensor"]),
    ("paged_attention_decode", {"sinks": torch.zeros(2)}, ValueError, ["sinks has shape (2,)", "(4,)"]),
    ("paged_attention_decode", {"sinks": torch.zeros(4, dtype=BF16)}, TypeError, ["sinks has dtype"]),
    ("paged_attention_decode", {"sinks": strided(4)}, ValueError, ["sinks has strides (2,)"]),
    ("paged_attention_decode", {"out": torch.zeros(2, 32)}, ValueError, ["out has shape (2, 32)"]),
    ("paged_attention_decode", {"out": torch.zeros(2, 4, 8, dtype=F16)}, TypeError, ["out has dtype"]),
    ("paged_attention_decode", {"out": strided(2, 4, 8)}, ValueError, ["out has strides"]),
    ("paged_attention_decode", {"plan": 1}, TypeError, ["plan is a int", "plan_paged_attention"]),
    # wna16_linear
    ("wna16_linear", {"x": torch.ones(3, 31)}, ValueError, ["x has shape (3, 31)", "(..., 32)"]),
    (
        "wna16_linear",
        {"x": torch.ones(3, 32, dtype=F16)},
        TypeError,
        ["x has dtype torch.float16", "float32", "prepared"],
    ),
    ("wna16_linear", {"x": torch.ones(3, 32, device=META)}, ValueError, ["x is on meta", "expected cpu"]),
    ("wna16_linear", {"x": strided(3, 32)}, ValueError, ["x has strides"]),
    ("wna16_linear", {"x": None}, TypeError, ["x is a NoneType"]),
    ("wna16_linear", {"weight": torch.ones(16, 32)}, TypeError, ["weight is a Tensor", "prepare_weight"]),
    ("wna16_linear", {"weight": packed()}, TypeError, ["weight is a PackedWeight", "PreparedWeight"]),
    ("wna16_linear", {"bias": torch.ones(15)}, ValueError, ["bias has shape (15,)", "(N,) = (16,)"]),
    ("wna16_linear", {"bias": torch.ones(16, dtype=F16)}, TypeError, ["bias has dtype torch.float16"]),
    ("wna16_linear", {"residual": torch.ones(3, 15)}, ValueError, ["residual has shape (3, 15)", "(3, 16)"]),
    ("wna16_linear", {"residual": torch.ones(16)}, ValueError, ["residual has shape (16,)", "(3, 16)"]),
    ("wna16_linear", {"out": torch.ones(4, 16)}, ValueError, ["out has shape (4, 16)", "(3, 16)"]),
    ("wna16_linear", {"out": torch.ones(3, 16, dtype=F16)}, TypeError, ["out has dtype torch.float16"]),
    (
        "wna16_linear",
        {"out": torch.ones(3, 17)[:, :16]},
        ValueError,
        ["out has strides (17, 1)", "contiguous"],
    ),
    ("wna16_linear", {"backend": "triton"}, ValueError, ["backend is 'triton'", "'torch'", "prepared"]),
    ("wna16_linear", {"batch_invariant": 1}, TypeError, ["batch_invariant is 1", "True or False"]),
    ("wna16_linear", {"batch_invariant": None}, TypeError, ["batch_invariant is None"]),
    (
        "wna16_linear",
        {"weight": prepare_gate_up(packed(), dtype=F32)},
        ValueError,
        ["weight was prepared for wna16_gate_up_silu", "wna16_linear", "prepare_weight"],
    ),
    # wna16_linear_rms_norm
    ("wna16_linear_rms_norm", {"x": torch.ones(3, 31)}, ValueError, ["x has shape (3, 31)", "(..., 32)"]),
    ("wna16_linear_rms_norm", {"x": strided(3, 32)}, ValueError, ["x has strides"]),
    (
        "wna16_linear_rms_norm",
        {"weight": packed()},
        TypeError,
        ["weight is a PackedWeight", "prepare_weight"],
    ),
    (
        "wna16_linear_rms_norm",
        {"weight": prepare_gate_up(packed(), dtype=F32)},
        ValueError,
        ["weight was prepared for wna16_gate_up_silu", "prepare_weight"],
    ),
    ("wna16_linear_rms_norm", {"residual": None}, TypeError, ["residual is a NoneType"]),
    (
        "wna16_linear_rms_norm",
        {"residual": torch.ones(16)},
        ValueError,
        ["residual has shape (16,)", "(3, 16)"],
    ),
    ("wna16_linear_rms_norm", {"residual": strided(3, 16)}, ValueError, ["residual has strides"]),
    ("wna16_linear_rms_norm", {"norm_weight": None}, TypeError, ["norm_weight is a NoneType"]),
    ("wna16_linear_rms_norm", {"norm_weight": torch.ones(15)}, ValueError, ["norm_weight has shape (15,)"]),
    ("wna16_linear_rms_norm", {"norm_weight": strided(16)}, ValueError, ["norm_weight has strides"]),
    (
        "wna16_linear_rms_norm",
        {"norm_weight": torch.ones(16, dtype=F16)},
        TypeError,
        ["norm_weight has dtype torch.float16"],
    ),
    ("wna16_linear_rms_norm", {"bias": torch.ones(15)}, ValueError, ["bias has shape (15,)", "(N,) = (16,)"]),
    ("wna16_linear_rms_norm", {"eps": -1.0}, ValueError, ["eps is -1.0", "at least 0"]),
    ("wna16_linear_rms_norm", {"batch_invariant": 1}, TypeError, ["batch_invariant is 1"]),
    ("wna16_linear_rms_norm", {"backend": "triton"}, ValueError, ["backend is 'triton'", "'torch'"]),
    # wna16_gate_up_silu
    ("wna16_gate_up_silu", {"x": torch.ones(3, 31)}, ValueError, ["x has shape (3, 31)", "(..., 32)"]),
    (
        "wna16_gate_up_silu",
        {"x": torch.ones(3, 32, dtype=BF16)},
        TypeError,
        ["x has dtype torch.bfloat16", "float32", "prepared"],
    ),
    ("wna16_gate_up_silu", {"x": torch.ones(3, 32, device=META)}, ValueError, ["x is on meta"]),
    ("wna16_gate_up_silu", {"x": strided(3, 32)}, ValueError, ["x has strides"]),
    ("wna16_gate_up_silu", {"x": torch.tensor(1.0)}, ValueError, ["x has shape ()"]),
    ("wna16_gate_up_silu", {"weight": packed()}, TypeError, ["weight is a PackedWeight", "prepare_gate_up"]),
    (
        "wna16_gate_up_silu",
        {"weight": prepare_weight(packed(), dtype=F32)},
        ValueError,
        ["weight was prepared for wna16_linear", "wna16_gate_up_silu", "prepare_gate_up"],
    ),
    ("wna16_gate_up_silu", {"out": torch.ones(3, 16)}, ValueError, ["out has shape (3, 16)", "(3, 8)"]),
    ("wna16_gate_up_silu", {"out": torch.ones(3, 8, dtype=F16)}, TypeError, ["out has dtype torch.float16"]),
    ("wna16_gate_up_silu", {"out": torch.ones(3, 9)[:, :8]}, ValueError, ["out has strides (9, 1)"]),
    ("wna16_gate_up_silu", {"backend": "triton"}, ValueError, ["backend is 'triton'", "'torch'"]),
    # prepare_gate_up
    ("prepare_gate_up", {"packed": torch.ones(16, 32)}, TypeError, ["packed is a Tensor", "PackedWeight"]),
    ("prepare_gate_up", {"packed": packed(N=17)}, ValueError, ["packed has N = 17 rows", "even"]),
    ("prepare_gate_up", {"dtype": torch.int8}, TypeError, ["dtype is torch.int8"]),
    ("prepare_gate_up", {"backend": "tpu"}, ValueError, ["backend is 'tpu'"]),
    # dequantize, prepare_weight
    ("dequantize", {"weight": torch.ones(16, 32)}, TypeError, ["weight is a Tensor", "PackedWeight"]),
    ("dequantize", {"dtype": torch.int8}, TypeError, ["dtype is torch.int8", "torch.bfloat16"]),
    ("dequantize", {"dtype": "float16"}, TypeError, ["dtype is 'float16'"]),
    ("prepare_weight", {"packed": torch.ones(16, 32)}, TypeError, ["packed is a Tensor", "PackedWeight"]),
    ("prepare_weight", {"dtype": torch.float64}, TypeError, ["dtype is torch.float64", "torch.float16"]),
    ("prepare_weight", {"backend": "tpu"}, ValueError, ["backend is 'tpu'", "'triton'"]),
]


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("operator", "wrong", "error", "fragments"),
    CASES,
    ids=[f"{operator}-{'-'.join(wrong)}-{i}" for i, (operator, wrong, _, _) in enumerate(CASES)],
)
def test_wrong_arguments_are_named(
    operator: str, wrong: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    with pytest.raises(error) as caught:
        getattr(qsun_kernels, operator)(**(good_arguments(operator) | wrong))
    assert type(caught.value) is error
    for fragment in (*fragments, "expected"):
        assert fragment in str(caught.value)


@pytest.mark.damaged
def test_out_must_not_be_the_residual() -> None:
    arguments = good_arguments("wna16_linear")
    residual = torch.ones(3, 16)
    with pytest.raises(ValueError, match="out is residual, expected memory of its own"):
        qsun_kernels.wna16_linear(**arguments, residual=residual, out=residual)


@pytest.mark.damaged
def test_out_must_not_be_the_input() -> None:
    weight = prepare_gate_up(packed(N=16, K=8), dtype=F32)
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match="out is x, expected memory of its own"):
        qsun_kernels.wna16_gate_up_silu(x, weight, out=x)


@pytest.mark.damaged
@pytest.mark.parametrize(("dtype", "scale"), [(F16, 1e6), (F16, 1e-9), (BF16, 1e-42)])
def test_a_scale_that_the_activations_cannot_hold_is_named(dtype: torch.dtype, scale: float) -> None:
    weight = packed()
    weight.scales[3, 0] = scale
    with pytest.raises(ValueError, match=r"scales\[3, 0\] is .* expected values that"):
        prepare_weight(weight, dtype=dtype)


def test_empty_rows_are_fine() -> None:
    """No tokens is a batch like any other; it must not be mistaken for a wrong shape."""
    assert qsun_kernels.rms_norm(torch.empty(0, 8), torch.ones(8), eps=1e-6).shape == (0, 8)
    assert qsun_kernels.silu_and_mul(torch.empty(2, 0, 8)).shape == (2, 0, 4)
