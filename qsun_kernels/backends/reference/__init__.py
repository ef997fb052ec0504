"""The torch backend: what every operator means, and what runs where no kernel does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qsun_kernels.backends.problems import Implementation
from qsun_kernels.backends.reference import (
    apply_rope,
    dequantize,
    paged_attention_decode,
    pending_norm,
    rms_norm,
    sample_tokens,
    silu_and_mul,
    wna16_gate_up_silu,
    wna16_linear,
    wna16_linear_rms_norm,
    write_kv_cache,
)

__all__ = ["IMPLEMENTATIONS", "unavailable"]

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "apply_rope": apply_rope.IMPLEMENTATION,
    "dequantize": dequantize.IMPLEMENTATION,
    "paged_attention_decode": paged_attention_decode.IMPLEMENTATION,
    "rms_norm": rms_norm.IMPLEMENTATION,
    "sample_tokens": sample_tokens.IMPLEMENTATION,
    "silu_and_mul": silu_and_mul.IMPLEMENTATION,
    "wna16_gate_up_silu": wna16_gate_up_silu.IMPLEMENTATION,
    "wna16_linear": replace(wna16_linear.IMPLEMENTATION, pending=pending_norm.PENDING_NORMS),
    "wna16_linear_rms_norm": wna16_linear_rms_norm.IMPLEMENTATION,
    "write_kv_cache": write_kv_cache.IMPLEMENTATION,
}


def unavailable() -> str | None:
    """Why the backend cannot run here: never, it needs torch alone."""
    return None
