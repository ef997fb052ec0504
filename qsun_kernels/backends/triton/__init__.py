"""The Triton backend: kernels compiled at their first use for the GPU at hand, or interpreted on the CPU.

The only folder that imports triton. It imports without triton and without a GPU; `unavailable` then says what
is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qsun_kernels.backends.problems import Implementation

__all__ = ["IMPLEMENTATIONS", "unavailable"]


def _import() -> tuple[Mapping[str, Implementation], str | None]:
    """The implementations by operator, or none and what the import of triton said."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return MappingProxyType({}), f"triton cannot be imported: {error}"
    from qsun_kernels.backends.triton.apply_rope import APPLY_ROPE
    from qsun_kernels.backends.triton.dequantize import DEQUANTIZE
    from qsun_kernels.backends.triton.paged_attention_decode import PAGED_ATTENTION_DECODE
    from qsun_kernels.backends.triton.rms_norm import RMS_NORM
    from qsun_kernels.backends.triton.sample_tokens import SAMPLE_TOKENS
    from qsun_kernels.backends.triton.silu_and_mul import SILU_AND_MUL
    from qsun_kernels.backends.triton.wna16_gate_up_silu import WNA16_GATE_UP_SILU
    from qsun_kernels.backends.triton.wna16_linear import WNA16_LINEAR
    from qsun_kernels.backends.triton.wna16_linear_rms_norm import WNA16_LINEAR_RMS_NORM
    from qsun_kernels.backends.triton.write_kv_cache import WRITE_KV_CACHE

    implementations = {
        "apply_rope": APPLY_ROPE,
        "dequantize": DEQUANTIZE,
        "paged_attention_decode": PAGED_ATTENTION_DECODE,
        "rms_norm": RMS_NORM,
        "sample_tokens": SAMPLE_TOKENS,
        "silu_and_mul": SILU_AND_MUL,
        "wna16_gate_up_silu": WNA16_GATE_UP_SILU,
        "wna16_linear": WNA16_LINEAR,
        "wna16_linear_rms_norm": WNA16_LINEAR_RMS_NORM,
        "write_kv_cache": WRITE_KV_CACHE,
    }
    return MappingProxyType(implementations), None


IMPLEMENTATIONS, _import_error = _import()


def unavailable() -> str | None:
    """Why no kernel here can run on this machine; None when they can."""
    if _import_error is not None:
        return _import_error
    from qsun_kernels.backends.triton.launch import refuse_machine

    return refuse_machine()
