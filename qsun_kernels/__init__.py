"""Operators for decoding with quantised weights on torch tensors: CUDA, Triton and torch behind one call."""

from __future__ import annotations

from qsun_kernels.backends.dispatch import use_backend
from qsun_kernels.backends.problems import AttentionPlan, PendingNorm, PendingSums, PreparedWeight
from qsun_kernels.errors import BackendUnavailable, CacheIndexError, CapturedCallError, KernelLaunchError
from qsun_kernels.ops import (
    RopeParameters,
    apply_rope,
    dequantize,
    explain,
    norm_may_pend,
    paged_attention_decode,
    plan_paged_attention,
    prepare_gate_up,
    prepare_weight,
    rms_norm,
    rope_cache,
    sample_tokens,
    silu_and_mul,
    sums_may_pend,
    wna16_gate_up_silu,
    wna16_linear,
    wna16_linear_pending_norm,
    wna16_linear_pending_sums,
    wna16_linear_rms_norm,
    write_kv_cache,
)
from qsun_kernels.quant import PackedWeight, QuantSpec, quantize_rtn

__all__ = [
    "AttentionPlan",
    "BackendUnavailable",
    "CacheIndexError",
    "CapturedCallError",
    "KernelLaunchError",
    "PackedWeight",
    "PendingNorm",
    "PendingSums",
    "PreparedWeight",
    "QuantSpec",
    "RopeParameters",
    "apply_rope",
    "dequantize",
    "explain",
    "norm_may_pend",
    "paged_attention_decode",
    "plan_paged_attention",
    "prepare_gate_up",
    "prepare_weight",
    "quantize_rtn",
    "rms_norm",
    "rope_cache",
    "sample_tokens",
    "silu_and_mul",
    "sums_may_pend",
    "use_backend",
    "wna16_gate_up_silu",
    "wna16_linear",
    "wna16_linear_pending_norm",
    "wna16_linear_pending_sums",
    "wna16_linear_rms_norm",
    "write_kv_cache",
]
