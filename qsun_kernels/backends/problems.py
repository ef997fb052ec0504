"""What a backend is asked, and what it answers.

A *problem* is everything about an operator call that decides which kernel can run it and that does not change
from one decode step to the next: widths, dtypes and the device, never the batch size or the lengths. Problems
are hashable, so that a choice is made once and remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from qsun_kernels.quant import PackedWeight, QuantSpec

__all__ = [
    "BACKENDS",
    "ApplyRopeProblem",
    "BackendName",
    "DequantizeProblem",
    "Implementation",
    "LinearImplementation",
    "PagedAttentionDecodeProblem",
    "PreparedWeight",
    "Problem",
    "RmsNormProblem",
    "SiluAndMulProblem",
    "Wna16Problem",
    "WriteKvCacheProblem",
]

BackendName = Literal["cuda", "triton", "torch"]

BACKENDS: tuple[BackendName, ...] = ("cuda", "triton", "torch")
"""Every backend, in the order of preference."""


@dataclass(frozen=True, slots=True)
class Wna16Problem:
    """``x (M, K) @ dequantised weight (N, K).T`` with `bits`-bit codes and one scale a `group_size` inputs.

    dtype: of activations, scales and output. group_size: a number of input columns, or ``"channel"`` (one
    group a row). symmetric: no stored zero points. has_g_idx: groups are given column by column (act-order).
    """

    operator: ClassVar[str] = "wna16_linear"

    N: int
    K: int
    bits: int
    group_size: int | Literal["channel"]
    symmetric: bool
    has_g_idx: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class DequantizeProblem:
    """The dense (N, K) weight that a packed weight stands for; dtype is that of the output."""

    operator: ClassVar[str] = "dequantize"

    N: int
    K: int
    bits: int
    group_size: int | Literal["channel"]
    symmetric: bool
    has_g_idx: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class PagedAttentionDecodeProblem:
    """One query token a request against its blocks of the KV cache.

    window: number of last positions attended to, None for all. dtype: of q and of the output; kv_dtype: of
    the cache.
    """

    operator: ClassVar[str] = "paged_attention_decode"

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class WriteKvCacheProblem:
    """Scatter of new keys and values into cache slots; dtype of k and v, kv_dtype of the cache."""

    operator: ClassVar[str] = "write_kv_cache"

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class RmsNormProblem:
    """Root-mean-square norm over the last `hidden_size` values, after adding a residual if there is one."""

    operator: ClassVar[str] = "rms_norm"

    hidden_size: int
    has_residual: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class ApplyRopeProblem:
    """Rotary position embedding of query and key heads of width `head_dim`."""

    operator: ClassVar[str] = "apply_rope"

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class SiluAndMulProblem:
    """``silu(gate) * up`` on rows of [gate | up]; size is the width of one half, that is of the output."""

    operator: ClassVar[str] = "silu_and_mul"

    size: int
    dtype: torch.dtype
    device: torch.device


Problem: TypeAlias = (
    Wna16Problem
    | DequantizeProblem
    | PagedAttentionDecodeProblem
    | WriteKvCacheProblem
    | RmsNormProblem
    | ApplyRopeProblem
    | SiluAndMulProblem
)


@dataclass(frozen=True, slots=True)
class Implementation:
    """One operator of one backend.

    supports: None when the backend can run the problem, else why not, in one line with the values that
    decided. run: the launcher; takes validated arguments by position (the order of the operator's own
    signature). describe: in one line, which kernel `run` would use for the problem.
    """

    supports: Callable[[Any], str | None]
    run: Callable[..., Any]
    describe: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class LinearImplementation(Implementation):
    """`wna16_linear` of one backend, which also prepares weights.

    prepare: (packed weight on the device of its use, with scales already in `dtype`; dtype of the
    activations) -> the weight in the layout that `run` reads.
    """

    prepare: Callable[[PackedWeight, torch.dtype], PreparedWeight]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedWeight:
    """A quantised weight (N, K) laid out for the backend that will multiply by it.

    dtype: of the activations it was prepared for. layout: names what `tensors` hold: ``"cuda.rows"`` and
    ``"triton.rows"`` the canonical (qweight, scales[, qzeros][, g_idx]), ``"torch.int4pack"`` and
    ``"torch.dense"`` what qsun_kernels/backends/reference/wna16_linear.py says.
    """

    spec: QuantSpec
    N: int
    K: int
    dtype: torch.dtype
    backend: BackendName
    layout: str
    tensors: tuple[torch.Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
