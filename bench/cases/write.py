"""Cases of `write_kv_cache`: new tokens on their way into the cache, with the steps that a layer does first.

Queries, keys and values are the same in every call and lie in the cache of the device: in a model the
projection just wrote them. Copies are of the KV cache, so that neighbouring calls write to different memory.
They lie one after the other, not side by side as in a model's matrix, where a separate norm of heads would
need a copy first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qsun_bench import kv_choice
from qsun_bench.cases import Json, Selection, Suite, generator
from qsun_bench.kv_choice import DEFAULT_BLOCK_SIZE, KvChoice
from qsun_bench.shapes import ModelShape, models
from qsun_kernels.backends.problems import WriteKvCacheProblem
from qsun_kernels.ops import RopeParameters, rope_cache
from qsun_kernels.testing.kv_writes import KvWrite, Written, judge_kv_write, kv_write
from qsun_kernels.testing.tolerances import Comparison

Step = Literal["norm", "rope", "rotate"]

_MAX_POSITIONS = 8192
_CUDA_TOKENS = (1, 8, 64, 256, 2048)
_CPU_TOKENS = (1, 8)


@dataclass(frozen=True, slots=True)
class WriteOperands:
    """A call without its queries, keys and values, which are the activation: (T * (Hq + 2 Hkv), D)."""

    call: KvWrite

    @property
    def k_cache(self) -> Tensor:
        return self.call.before.k_cache

    @property
    def v_cache(self) -> Tensor:
        return self.call.before.v_cache

    @property
    def k_scale(self) -> Tensor | None:
        return self.call.before.k_scale

    @property
    def v_scale(self) -> Tensor | None:
        return self.call.before.v_scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        all_four = (self.k_cache, self.v_cache, self.k_scale, self.v_scale)
        return tuple(tensor for tensor in all_four if tensor is not None)

    def copy(self) -> WriteOperands:
        k_cache, v_cache, k_scale, v_scale = (
            None if tensor is None else tensor.clone()
            for tensor in (self.k_cache, self.v_cache, self.k_scale, self.v_scale)
        )
        assert k_cache is not None and v_cache is not None
        return WriteOperands(replace(self.call, before=Written(None, k_cache, v_cache, k_scale, v_scale)))

    def views(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values (T, heads, D) in an activation."""
        tokens, kv_heads, head_dim = self.call.k.shape
        of_keys = tokens * kv_heads
        q, k, v = qkv.split([qkv.shape[0] - 2 * of_keys, of_keys, of_keys])
        return q.view(tokens, -1, head_dim), k.view(tokens, -1, head_dim), v.view(tokens, -1, head_dim)

    def judge(self, qkv: Tensor, q: Tensor, written: WriteOperands) -> Comparison:
        """Judge what a call with `qkv` returned, and the caches of `written`, a copy of these before it."""
        queries, k, v = self.views(qkv)
        got = Written(q, written.k_cache, written.v_cache, written.k_scale, written.v_scale)
        return judge_kv_write(got, replace(self.call, q=queries, k=k, v=v))


@dataclass(frozen=True, slots=True)
class WriteCase:
    """`tokens` new tokens of one layer. steps: those before the write. kv: what the cache holds."""

    op: ClassVar[str] = "write_kv_cache"

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    steps: tuple[Step, ...]
    kv: KvChoice = "auto"
    block_size: int = DEFAULT_BLOCK_SIZE

    @property
    def name(self) -> str:
        kept = kv_choice.in_names(self.kv, self.block_size)
        heads = f"h{self.q_heads}kv{self.kv_heads}d{self.head_dim}"
        return f"{heads}.{'+'.join(self.steps)}{kept}.T{self.tokens}"

    @property
    def bytes(self) -> int:
        """Read: queries, keys, values, slots, and what the steps need; written: queries and the cache."""
        size = self.dtype.itemsize
        read = (self.q_heads + 2 * self.kv_heads) * self.head_dim * size + 8
        if "rope" in self.steps:
            read += 8 + self.head_dim * torch.float32.itemsize
        head = kv_choice.head_bytes(self.kv, self.dtype, self.head_dim)
        written = self.q_heads * self.head_dim * size + 2 * self.kv_heads * head
        norms = 2 * self.head_dim * size if "norm" in self.steps else 0
        return self.tokens * (read + written) + norms + kv_choice.tensor_scale_bytes(self.kv)

    @property
    def operands_key(self) -> object:
        return self

    def fields(self) -> dict[str, Json]:
        name = str(self.dtype).removeprefix("torch.")
        return {
            "tokens": self.tokens,
            "steps": "+".join(self.steps),
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "dtype": name,
            "kv_dtype": kv_choice.in_records(self.kv, self.dtype),
        }

    def problem(self, device: torch.device) -> WriteKvCacheProblem:
        return WriteKvCacheProblem(
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.dtype,
            kv_choice.element_dtype(self.kv, self.dtype),
            device,
            kv_choice.scales_of(self.kv),
            self.q_heads,
            norm="norm" in self.steps,
            rope="rope" in self.steps,
            rotate="rotate" in self.steps,
        )

    def operands(self, device: torch.device) -> WriteOperands:
        source = generator(torch.device("cpu"), "write", self.name)
        call = kv_write(
            source,
            self.tokens,
            dtype=self.dtype,
            kv=self.dtype if self.kv == "auto" else self.kv,
            heads=(self.q_heads, self.kv_heads),
            head_dim=self.head_dim,
            block_size=self.block_size,
            steps=self.steps,
            skip=0.0,
            device=device,
        )
        if "rope" in self.steps:
            positions = torch.randint(0, _MAX_POSITIONS, (self.tokens,), generator=source).to(device)
            table = rope_cache(RopeParameters(10000.0), self.head_dim, _MAX_POSITIONS, device)
            call = replace(call, positions=positions, cos_sin=table)
        return WriteOperands(call)

    def activation(self, device: torch.device) -> Tensor:
        g = generator(device, "qkv", self.name)
        heads = self.tokens * (self.q_heads + 2 * self.kv_heads)
        return torch.randn(heads, self.head_dim, device=device, generator=g).to(self.dtype)


def cases(selection: Selection) -> Sequence[WriteCase]:
    """Every way into the cache for the heads of the chosen shapes at every number of tokens, each once."""
    on_cuda = selection.device.type == "cuda"
    small = selection.smoke or not on_cuda
    names = selection.shapes or (("smollm2-135m",) if small else ("llama-3.1-8b",))
    tokens = selection.batches or (_CPU_TOKENS if small else _CUDA_TOKENS)
    found = [
        WriteCase(count, q_heads, kv_heads, sizes.head_dim, selection.dtype, steps, kv, block_size)
        for sizes in models(names)
        for q_heads, kv_heads in selection.heads or ((sizes.q_heads, sizes.kv_heads),)
        for steps, kv in _ways(selection, sizes)
        for block_size in selection.block_sizes or (DEFAULT_BLOCK_SIZE,)
        for count in tokens
    ]
    return list(dict.fromkeys(found))


def _ways(selection: Selection, sizes: ModelShape) -> Iterator[tuple[tuple[Step, ...], KvChoice]]:
    """Steps and caches: 4-bit codes are of rotated heads where a head can be rotated, as in the engine."""
    power_of_two = sizes.head_dim & (sizes.head_dim - 1) == 0
    rotated: tuple[Step, ...] = ("rope", "rotate") if power_of_two else ("rope",)
    if not selection.kv:
        yield ("rope",), "auto"
        yield ("norm", "rope"), "auto"
        yield rotated, "int4"
    for kv in selection.kv:
        last = rotated if kv == "int4" else ("rope",)
        yield last, kv
        yield ("norm", *last), kv


SUITE = Suite(
    name="write",
    op=WriteCase.op,
    summary="queries, keys and values on their way into the cache, in one launch and in several",
    baseline="separate",
    cases=cases,
)
