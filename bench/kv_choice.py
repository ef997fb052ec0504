"""What a KV cache holds, as cases and options name it, and how many bytes that takes."""

from __future__ import annotations

from typing import Literal

import torch

from qsun_kernels.backends.problems import KvScales
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind, kv_dtype_of

KvChoice = Literal["auto"] | KvKind
"""Values of the dtype of the queries ("auto"), or codes of a kind: names of the engine's kv_cache_dtype."""

KV_CHOICES: tuple[KvChoice, ...] = ("auto", *KV_KINDS)

DEFAULT_BLOCK_SIZE = 16
_SCALE_BYTES = torch.float32.itemsize


def element_dtype(kv: KvChoice, dtype: torch.dtype) -> torch.dtype:
    """Of the cache's elements; dtype: of the queries."""
    return dtype if kv == "auto" else kv_dtype_of(kv)


def scales_of(kv: KvChoice) -> KvScales:
    """Which scales stand beside it."""
    if kv == "auto":
        return "none"
    return "tensor" if kv == "fp8-tensor" else "token"


def width(kv: KvChoice, head_dim: int) -> int:
    """Elements of the cache that a head of one token takes: 4-bit codes lie two a byte."""
    return head_dim // 2 if kv == "int4" else head_dim


def head_bytes(kv: KvChoice, dtype: torch.dtype, head_dim: int) -> int:
    """Of the keys, or the values, of a head of one token, with its scale if it has one of its own."""
    scale = _SCALE_BYTES if scales_of(kv) == "token" else 0
    return width(kv, head_dim) * element_dtype(kv, dtype).itemsize + scale


def tensor_scale_bytes(kv: KvChoice) -> int:
    """Of the scales that are given once, for all keys and for all values."""
    return 2 * _SCALE_BYTES if scales_of(kv) == "tensor" else 0


def in_records(kv: KvChoice, dtype: torch.dtype) -> str:
    """The field kv_dtype of a record: the dtype of values, or the kind of codes."""
    return str(dtype).removeprefix("torch.") if kv == "auto" else kv


def in_names(kv: KvChoice, block_size: int) -> str:
    """The part of a case's name that tells what is unlike values in blocks of DEFAULT_BLOCK_SIZE tokens."""
    codes = "" if kv == "auto" else f".{kv}"
    return codes if block_size == DEFAULT_BLOCK_SIZE else f"{codes}.b{block_size}"
