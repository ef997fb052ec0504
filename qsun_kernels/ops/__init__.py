"""The operators: one file each, with its signature, its checks and its registration as `torch.ops.qsun.*`."""

from __future__ import annotations

from qsun_kernels.ops.apply_rope import apply_rope
from qsun_kernels.ops.dequantize import dequantize
from qsun_kernels.ops.explain import explain
from qsun_kernels.ops.paged_attention_decode import paged_attention_decode
from qsun_kernels.ops.plan_paged_attention import plan_paged_attention
from qsun_kernels.ops.rms_norm import rms_norm
from qsun_kernels.ops.rope_cache import RopeParameters, rope_cache
from qsun_kernels.ops.sample_tokens import sample_tokens
from qsun_kernels.ops.silu_and_mul import silu_and_mul
from qsun_kernels.ops.wna16_gate_up_silu import prepare_gate_up, wna16_gate_up_silu
from qsun_kernels.ops.wna16_linear import prepare_weight, wna16_linear
from qsun_kernels.ops.wna16_linear_pending_norm import norm_may_pend, wna16_linear_pending_norm
from qsun_kernels.ops.wna16_linear_pending_sums import sums_may_pend, wna16_linear_pending_sums
from qsun_kernels.ops.wna16_linear_rms_norm import wna16_linear_rms_norm
from qsun_kernels.ops.write_kv_cache import write_kv_cache

__all__ = [
    "RopeParameters",
    "apply_rope",
    "dequantize",
    "explain",
    "norm_may_pend",
    "paged_attention_decode",
    "plan_paged_attention",
    "prepare_gate_up",
    "prepare_weight",
    "rms_norm",
    "rope_cache",
    "sample_tokens",
    "silu_and_mul",
    "sums_may_pend",
    "wna16_gate_up_silu",
    "wna16_linear",
    "wna16_linear_pending_norm",
    "wna16_linear_pending_sums",
    "wna16_linear_rms_norm",
    "write_kv_cache",
]
