"""Cases of `paged_attention_decode`: uniform and skewed batches over a shuffled block table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qsun_bench.cases import Json, Selection, Suite, generator
from qsun_bench.shapes import models
from qsun_kernels.backends.problems import PagedAttentionDecodeProblem
from qsun_kernels.testing.inputs import zipf_lengths

_BLOCK_SIZE = 16
_CUDA_UNIFORM: tuple[tuple[int, int], ...] = (
    (1, 1024), (1, 8192), (1, 65536), (8, 1024), (8, 8192), (32, 1024), (32, 4096),
    (64, 512), (64, 2048), (128, 1024), (256, 512), (256, 2048), (1024, 128),
)  # fmt: skip
# Measured last: here FlashAttention 3 of vLLM 0.24 may end the CUDA context, and every measurement behind it.
_CUDA_LAST = ((128, 4096),)
_CUDA_SKEWED: tuple[tuple[int, float, int], ...] = (
    (64, 1.0, 131072), (64, 1.2, 131072), (64, 1.5, 131072), (200, 1.2, 262144),
)  # fmt: skip
_CUDA_ONE_LONG = ((64, 131072),)
_CPU_UNIFORM = ((1, 1024), (8, 512))
_CPU_SKEWED = ((16, 1.0, 8192),)


@dataclass(frozen=True, slots=True)
class AttentionOperands:
    """A KV cache whose blocks lie in random order, its block table and lengths.

    k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim). block_table: int32 (B, max_blocks).
    """

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    q_heads: int
    softmax_scale: float
    window: int | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.k_cache, self.v_cache)

    def copy(self) -> AttentionOperands:
        return AttentionOperands(
            self.k_cache.clone(),
            self.v_cache.clone(),
            self.block_table.clone(),
            self.seq_lens.clone(),
            self.q_heads,
            self.softmax_scale,
            self.window,
        )

    def gathered(self, row: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one request in order, each (num_kv_heads, length, head_dim)."""
        length = int(self.seq_lens[row])
        block_size = self.k_cache.shape[2]
        blocks = self.block_table[row, : -(-length // block_size)].long()
        first = 0 if self.window is None else max(0, length - self.window)
        both = []
        for cache in (self.k_cache, self.v_cache):
            dense = cache[blocks].transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3])
            both.append(dense[:, first:length])
        return both[0], both[1]

    def exact(self, activation: Tensor) -> Tensor:
        rows = []
        group = activation.shape[1] // self.k_cache.shape[1]
        for row, q in enumerate(activation.double()):
            keys, values = (t.double().repeat_interleave(group, 0) for t in self.gathered(row))
            scores = (q[:, None] @ keys.transpose(1, 2)) * self.softmax_scale
            rows.append((torch.softmax(scores, dim=-1) @ values)[:, 0])
        return torch.stack(rows)

    def plain(self, activation: Tensor) -> Tensor:
        rows = []
        for row, q in enumerate(activation):
            keys, values = (t[None] for t in self.gathered(row))
            out = torch.nn.functional.scaled_dot_product_attention(
                q[None, :, None], keys, values, scale=self.softmax_scale, enable_gqa=True
            )
            rows.append(out[0, :, 0])
        return torch.stack(rows)

    def terms(self, activation: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One decode step of a batch. label: the batch and its lengths, as the name of the case."""

    op: ClassVar[str] = "paged_attention_decode"

    label: str
    seq_lens: tuple[int, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = _BLOCK_SIZE
    window: int | None = None

    @property
    def name(self) -> str:
        return self.label

    @property
    def bytes(self) -> int:
        kept = (n if self.window is None else min(n, self.window) for n in self.seq_lens)
        kv = 2 * sum(kept) * self.kv_heads * self.head_dim * self.dtype.itemsize
        tables = sum(-(-n // self.block_size) for n in self.seq_lens) * 4 + len(self.seq_lens) * 4
        return kv + tables + 2 * len(self.seq_lens) * self.q_heads * self.head_dim * self.dtype.itemsize

    @property
    def operands_key(self) -> object:
        return self

    def fields(self) -> dict[str, Json]:
        name = str(self.dtype).removeprefix("torch.")
        return {
            "batch": len(self.seq_lens),
            "seq_lens": list(self.seq_lens),
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "window": self.window,
            "dtype": name,
            "kv_dtype": name,
        }

    def problem(self, device: torch.device) -> PagedAttentionDecodeProblem:
        return PagedAttentionDecodeProblem(
            self.q_heads,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.window,
            self.dtype,
            self.dtype,
            device,
        )

    def operands(self, device: torch.device) -> AttentionOperands:
        g = generator(device, "kv", self.name, self.seq_lens)
        needed = [-(-n // self.block_size) for n in self.seq_lens]
        order = torch.randperm(sum(needed), generator=g, device=device).to(torch.int32)
        # Entries past a request's length are never read: an index outside the cache would show if they were.
        table = torch.full((len(needed), max(needed)), torch.iinfo(torch.int32).max, dtype=torch.int32)
        table = table.to(device)
        start = 0
        for row, count in enumerate(needed):
            table[row, :count] = order[start : start + count]
            start += count
        shape_ = (sum(needed), self.kv_heads, self.block_size, self.head_dim)
        k_cache = torch.randn(shape_, device=device, generator=g, dtype=torch.float32).to(self.dtype)
        v_cache = torch.randn(shape_, device=device, generator=g, dtype=torch.float32).to(self.dtype)
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32, device=device)
        return AttentionOperands(
            k_cache, v_cache, table, seq_lens, self.q_heads, self.head_dim**-0.5, self.window
        )

    def activation(self, device: torch.device) -> Tensor:
        g = generator(device, "q", len(self.seq_lens), self.q_heads, self.head_dim)
        shape_ = (len(self.seq_lens), self.q_heads, self.head_dim)
        return torch.randn(shape_, device=device, generator=g).to(self.dtype)


def cases(selection: Selection) -> Sequence[AttentionCase]:
    """Uniform batches and Zipf-skewed ones for the attention sizes of the chosen shapes, equal sizes once."""
    on_cuda = selection.device.type == "cuda"
    names = selection.shapes or (("llama-3.1-8b",) if on_cuda else ("smollm2-135m",))
    uniform, skewed = (_CUDA_UNIFORM, _CUDA_SKEWED) if on_cuda else (_CPU_UNIFORM, _CPU_SKEWED)
    one_long, last = (_CUDA_ONE_LONG, _CUDA_LAST) if on_cuda else ((), ())
    if selection.smoke:
        names, uniform, skewed, one_long, last = (
            selection.shapes or ("smollm2-135m",),
            ((1, 300), (5, 129)),
            ((8, 1.0, 1000),),
            ((4, 1000),),
            (),
        )
    if selection.batches or selection.contexts:
        batches = selection.batches or (1,)
        contexts = selection.contexts or (1024,)
        uniform, skewed = tuple((b, c) for b in batches for c in contexts), ()
        one_long, last = (), ()
    batches_of_lengths = [(f"{b}x{c}", (c,) * b) for b, c in uniform]
    batches_of_lengths += [
        (f"{b}-zipf{alpha:g}-{total}", tuple(zipf_lengths(torch.Generator().manual_seed(b), b, total, alpha)))
        for b, alpha, total in skewed
    ]
    batches_of_lengths += [(f"{b}-onelong-{total}", _one_long(b, total)) for b, total in one_long]
    batches_of_lengths += [(f"{b}x{c}", (c,) * b) for b, c in last]
    seen: set[object] = set()
    found: list[AttentionCase] = []
    for sizes in models(names):
        key = (sizes.q_heads, sizes.kv_heads, sizes.head_dim)
        if key in seen:
            continue
        seen.add(key)
        heads = f"h{sizes.q_heads}kv{sizes.kv_heads}d{sizes.head_dim}"
        for label, lengths in batches_of_lengths:
            found.append(AttentionCase(f"{heads}.{label}", lengths, *key, selection.dtype))
    return found


def _one_long(batch: int, total: int) -> tuple[int, ...]:
    """One request of half the tokens, the others of equal shares of the rest, in the middle of the batch."""
    short = total // 2 // (batch - 1)
    lengths = [short] * batch
    lengths[batch // 2] = total - short * (batch - 1)
    return tuple(lengths)


SUITE = Suite(
    name="attention",
    op=AttentionCase.op,
    summary="paged decode attention, uniform and skewed batches",
    baseline="sdpa",
    cases=cases,
)
