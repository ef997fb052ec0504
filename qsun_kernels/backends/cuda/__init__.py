"""The CUDA backend: launchers on the binding of libqsun.

    library    the binding, what it was built for, why it cannot run here; what launchers share
    linear     wna16_linear, wna16_linear_rms_norm, wna16_gate_up_silu, dequantize
    pending_norm  norms that one of these leaves to the next
    split_products  sums that wna16_linear leaves to write_kv_cache
    attention  paged_attention_decode
    write_kv_cache
    fused      rms_norm, silu_and_mul, apply_rope
    sampling   sample_tokens

Launchers take arguments that the operators have validated, allocate the outputs (and scratch, where a kernel
needs some) with torch, and pass addresses, sizes and the current stream on. They never synchronise, so CUDA
graphs capture them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qsun_kernels.backends.cuda import (
    attention,
    fused,
    linear,
    pending_norm,
    sampling,
    split_products,
    write_kv_cache,
)
from qsun_kernels.backends.cuda.library import always, build_info, covers, unavailable
from qsun_kernels.backends.problems import (
    AttentionImplementation,
    Implementation,
    LinearImplementation,
    WriteImplementation,
)

__all__ = ["IMPLEMENTATIONS", "build_info", "covers", "unavailable"]

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "wna16_linear": LinearImplementation(
            linear.supports_linear,
            linear.wna16_linear,
            linear.describe_linear,
            linear.prepare,
            pending_norm.PENDING_NORMS,
            split_products.SPLIT_PRODUCTS,
        ),
        "wna16_gate_up_silu": LinearImplementation(
            linear.supports_gate_up,
            linear.wna16_gate_up_silu,
            linear.describe_gate_up,
            linear.prepare_gate_up,
        ),
        "wna16_linear_rms_norm": Implementation(
            linear.supports_linear_rms_norm, linear.wna16_linear_rms_norm, linear.describe_linear_rms_norm
        ),
        "dequantize": Implementation(
            linear.supports_linear, linear.dequantize, always("dequantize: a thread rebuilds 8 weights")
        ),
        "paged_attention_decode": AttentionImplementation(
            attention.supports_attention,
            attention.paged_attention_decode,
            attention.describe_attention,
            attention.plan_paged_attention,
        ),
        "write_kv_cache": WriteImplementation(
            write_kv_cache.supports,
            write_kv_cache.write_kv_cache,
            write_kv_cache.describe,
            write_kv_cache.write_sums,
        ),
        "rms_norm": Implementation(fused.supports_rms_norm, fused.rms_norm, fused.describe_rms_norm),
        "silu_and_mul": Implementation(
            fused.supports_silu_and_mul,
            fused.silu_and_mul,
            always("silu_and_mul: a thread 16 bytes of the output, or one element where unaligned"),
        ),
        "apply_rope": Implementation(
            fused.supports_rope, fused.apply_rope, always("apply_rope: queries and keys in one launch")
        ),
        "sample_tokens": Implementation(
            sampling.supports_sampling, sampling.sample_tokens, sampling.describe_sampling
        ),
    }
)
