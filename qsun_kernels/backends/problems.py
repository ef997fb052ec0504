"""What a backend is asked, and what it answers.

A *problem* is everything about an operator call that decides which kernel can run it and that does not change
from one decode step to the next: widths, dtypes and the device, never the batch size or the lengths. Problems
are hashable, so that a choice is made once and remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from qsun_kernels.quant import PackedWeight, QuantSpec

__all__ = [
    "BACKENDS",
    "KV_SCALES",
    "MAX_PENDING_ROWS",
    "SQUARED_COLUMNS",
    "ApplyRopeProblem",
    "AttentionImplementation",
    "AttentionPlan",
    "BackendName",
    "DequantizeProblem",
    "Implementation",
    "KvScales",
    "LinearImplementation",
    "LinearOperator",
    "PagedAttentionDecodeProblem",
    "PendingNorm",
    "PendingNorms",
    "PendingSums",
    "PreparedWeight",
    "Problem",
    "RmsNormProblem",
    "SampleTokensProblem",
    "SiluAndMulProblem",
    "SplitProducts",
    "Wna16GateUpSiluProblem",
    "Wna16LinearRmsNormProblem",
    "Wna16Problem",
    "WriteImplementation",
    "WriteKvCacheProblem",
]

BackendName = Literal["cuda", "triton", "torch"]

LinearOperator = Literal["wna16_linear", "wna16_gate_up_silu"]
"""The operators that read a `PreparedWeight`."""

MAX_PENDING_ROWS = 16
"""Rows whose norm one product can leave to the next."""

SQUARED_COLUMNS = 16
"""Columns whose squares are one sum of `PendingNorm.squares`."""

BACKENDS: tuple[BackendName, ...] = ("cuda", "triton", "torch")
"""Every backend, in the order of preference."""


KvScales = Literal["none", "tensor", "token"]
"""The scales beside a KV cache: none, one for all of it, or one for each head of each token."""

KV_SCALES: Mapping[torch.dtype, tuple[KvScales, ...]] = {
    torch.float32: ("none",),
    torch.float16: ("none",),
    torch.bfloat16: ("none",),
    torch.float8_e4m3fn: ("token", "tensor"),
    torch.int8: ("token",),
    torch.uint8: ("token",),
}
"""The dtypes of a KV cache, each with the scales that it may have; torch.uint8 holds pairs of 4-bit codes."""


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
class _AroundLinear:
    """A product and what is done with it in the same call: the fields of `Wna16Problem`, for the weight."""

    N: int
    K: int
    bits: int
    group_size: int | Literal["channel"]
    symmetric: bool
    has_g_idx: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def linear(self) -> Wna16Problem:
        """The product, as a problem of its own."""
        return Wna16Problem(
            self.N,
            self.K,
            self.bits,
            self.group_size,
            self.symmetric,
            self.has_g_idx,
            self.dtype,
            self.device,
        )


@dataclass(frozen=True, slots=True)
class Wna16GateUpSiluProblem(_AroundLinear):
    """``silu(x @ gate.T) * (x @ up.T)`` with one weight [gate; up].

    N: rows of gate and up together, so the output has N / 2 columns.
    """

    operator: ClassVar[str] = "wna16_gate_up_silu"


@dataclass(frozen=True, slots=True)
class Wna16LinearRmsNormProblem(_AroundLinear):
    """A product as in `Wna16Problem`, added to a residual stream, and the RMS norm of the stream's rows."""

    operator: ClassVar[str] = "wna16_linear_rms_norm"

    @property
    def norm(self) -> RmsNormProblem:
        """The norm, as a problem of its own."""
        return RmsNormProblem(self.N, False, self.dtype, self.device)


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
    """One or a few query tokens a request against its blocks of the KV cache.

    window: number of last positions that a token attends to, None for all. dtype: of q and of the output;
    kv_dtype: of the cache, whose scales are kv_scales (see `KV_SCALES`).
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
    kv_scales: KvScales = "none"

    @property
    def sizes(self) -> tuple[object, ...]:
        """The fields in their order."""
        return (
            *(self.num_q_heads, self.num_kv_heads, self.head_dim, self.block_size),
            *(self.window, self.dtype, self.kv_dtype, self.device, self.kv_scales),
        )


@dataclass(frozen=True, slots=True)
class WriteKvCacheProblem:
    """New keys and values into cache slots, with what is done to them and to the queries on the way.

    dtype: of q, k and v; kv_dtype: of the cache, whose scales are kv_scales (see `KV_SCALES`). num_q_heads: 0
    without queries. norm: k, and q if there is one, go through an RMS norm. rope: through a rotary embedding.
    rotate: through a Hadamard matrix.
    """

    operator: ClassVar[str] = "write_kv_cache"

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    kv_scales: KvScales = "none"
    num_q_heads: int = 0
    norm: bool = False
    rope: bool = False
    rotate: bool = False


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


@dataclass(frozen=True, slots=True)
class SampleTokensProblem:
    """One token drawn from each row of `vocab_size` logits; dtype is that of the logits."""

    operator: ClassVar[str] = "sample_tokens"

    vocab_size: int
    dtype: torch.dtype
    device: torch.device


Problem: TypeAlias = (
    Wna16Problem
    | Wna16GateUpSiluProblem
    | Wna16LinearRmsNormProblem
    | DequantizeProblem
    | PagedAttentionDecodeProblem
    | WriteKvCacheProblem
    | RmsNormProblem
    | ApplyRopeProblem
    | SiluAndMulProblem
    | SampleTokensProblem
)


@dataclass(frozen=True, slots=True)
class Implementation:
    """One operator of one backend.

    supports: None when the backend can run the problem, else why not, in one line with the values that
    decided. run: the launcher; takes validated arguments by position, the same as the reference's launcher;
    further ones have defaults. describe: in one line, which kernel `run` would use for the problem.
    """

    supports: Callable[[Any], str | None]
    run: Callable[..., Any]
    describe: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class LinearImplementation(Implementation):
    """`wna16_linear` or `wna16_gate_up_silu` of one backend, which also prepares weights.

    prepare: (packed weight on the device of its use, with scales already in `dtype`; dtype of the
    activations) -> the weight in the layout that `run` reads, for the operator of this implementation.
    pending: of `wna16_linear`, how the backend leaves norms to the products behind; None where it does not.
    split: the same of sums that it leaves to the operator behind.
    """

    prepare: Callable[[PackedWeight, torch.dtype], PreparedWeight]
    pending: PendingNorms | None = None
    split: SplitProducts | None = None


@dataclass(frozen=True, slots=True)
class AttentionImplementation(Implementation):
    """`paged_attention_decode` of one backend, which also plans.

    plan: (problem, seq_lens, q_len, window, block_table) -> the tensors that share the work out among the
    programs of `run`, made on the device without waiting for it; () where a backend needs none. `run` takes
    them as an argument, None to plan by itself. block_table: None, or that of the calls, in which a backend
    may look for prefixes that requests share.
    """

    plan: Callable[
        [PagedAttentionDecodeProblem, torch.Tensor, int, int | None, torch.Tensor | None],
        tuple[torch.Tensor, ...],
    ]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """How the work of one decode step is shared out, for every call of that step with equal sizes.

    problem: the sizes, dtypes, window and device that it was made for. batch: number of requests. q_len:
    query tokens of each. backend: whose plan it is. tensors: what that backend made for the lengths that
    `seq_lens` held, and for the block table if it was given one. tensors is None for a plan made in traced
    code: its calls plan by themselves, and backend is the one that was named there, or None.
    """

    problem: PagedAttentionDecodeProblem
    batch: int
    q_len: int
    backend: BackendName | None
    tensors: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class PendingNorm:
    """Rows of which a part of the RMS norm is left to do: the norm is ``weighted / sqrt(mean + eps)``.

    weighted: (M, K), the rows times the norm's weight, rounded once. squares: float32 (M, ceil(K / 16)), sums
    of squares of the rows, of 16 neighbouring columns each; mean is their sum over K. Made by
    `wna16_linear_pending_norm`; `wna16_linear` and `wna16_gate_up_silu` take it as x, and multiply their
    float32 sums by the root.
    """

    weighted: torch.Tensor
    squares: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class PendingNorms:
    """How one backend leaves a norm to the product behind.

    cannot_leave, cannot_take: None when a product with this weight can leave the norm of its rows, or take
    one as x, else why not, in one line. pays: (rows, weight, weight of the product behind) whether both
    products run as they would without, so that a launch is all that changes. leave: (x, weight, residual,
    norm_weight, eps, bias) -> (norm, r). take: (x, weight, bias, residual, out) -> what the operator that the
    weight was prepared for returns.
    """

    cannot_leave: Callable[[PreparedWeight], str | None]
    cannot_take: Callable[[PreparedWeight], str | None]
    pays: Callable[[int, PreparedWeight, PreparedWeight], bool]
    leave: Callable[..., tuple[PendingNorm, torch.Tensor]]
    take: Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PendingSums:
    """Rows of a product that was split along K, and whose sums are left to whoever reads them.

    parts: float32 (splits, *shape of the rows); the rows are parts[0] + parts[1] + .. in that order, rounded
    to `dtype`. Made by `wna16_linear_pending_sums`; `write_kv_cache` takes them as q, k and v.
    """

    parts: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the rows."""
        return self.parts.shape[1:]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.parts.device

    def heads(self, counts: Sequence[int], head_dim: int) -> tuple[PendingSums, ...]:
        """Rows (T, sum(counts) * head_dim) as (T, count, head_dim) of each count: views, as of rows."""
        split = self.parts.unflatten(-1, (sum(counts), head_dim)).split(list(counts), dim=-2)
        return tuple(PendingSums(parts, self.dtype) for parts in split)

    def added(self) -> torch.Tensor:
        """The rows."""
        first, *others = self.parts.unbind(0)
        total = first.clone()
        for part in others:
            total += part
        return total.to(self.dtype)


@dataclass(frozen=True, slots=True)
class SplitProducts:
    """How one backend leaves the sums of a product that it splits along K.

    splits: (rows, weight) -> the parts that a product of so many rows leaves, 1 where it is not split. leave:
    (x, weight) -> the sums; for rows of which there is more than one part.
    """

    splits: Callable[[int, PreparedWeight], int]
    leave: Callable[[torch.Tensor, PreparedWeight], PendingSums]


@dataclass(frozen=True, slots=True)
class WriteImplementation(Implementation):
    """`write_kv_cache` of one backend.

    run_sums: what `run` does, of k, v and q as `PendingSums`; None where they are to be added up before.
    """

    run_sums: Callable[..., Any] | None = None


_ORDERED = ".ordered"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedWeight:
    """A quantised weight (N, K) laid out for the backend and the operator that will multiply by it.

    dtype: of the activations it was prepared for. operator: who reads it; one for ``"wna16_linear"`` is also
    read by `wna16_linear_rms_norm`; for ``"wna16_gate_up_silu"`` the
    weight is [gate; up] and N counts the rows of both. layout: names what `tensors` hold:

    - ``"cuda.rows"``, ``"triton.rows"``: the canonical (qweight, scales[, qzeros][, g_idx]).
    - ``"cuda.panels"``: (panels[, perm]) of qsun_kernels/backends/panels.py, in groups of the spec's size;
      ``"cuda.panels32"`` where act-order groups of uneven size are stored in runs of 32 columns.
    - ``"cuda.gate_up_panels"``, ``"cuda.gate_up_panels32"``: the same with the rows of gate and up
      interleaved by eight.
    - ``"triton.tiles"``: what qsun_kernels/backends/triton/wna16_layout.py says.
    - ``"torch.int4pack"``, ``"torch.dense"``: what qsun_kernels/backends/reference/wna16_linear.py says.
    - any of them with ``".ordered"`` behind it: the same, see `in_stream_order`.
    """

    spec: QuantSpec
    N: int
    K: int
    dtype: torch.dtype
    backend: BackendName
    layout: str
    tensors: tuple[torch.Tensor, ...]
    operator: LinearOperator = "wna16_linear"

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def stored_layout(self) -> str:
        """The layout without what says when it may be read."""
        return self.layout.removesuffix(_ORDERED)

    @property
    def is_prefetched(self) -> bool:
        """Whether a kernel may read the weight before those in front of it in the stream have ended."""
        return not self.layout.endswith(_ORDERED)

    def in_stream_order(self) -> PreparedWeight:
        """The same weight, the same tensors, read no earlier than the order of the stream says.

        Nothing writes a weight once it is prepared, so on GPUs that can a launch begins to read it while the
        kernels in front still run. Use this where one of them does write it, such as a copy of new values
        into `tensors` on the same stream; it costs the time that the early start saves.
        """
        return replace(self, layout=self.stored_layout + _ORDERED)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
