"""Cases of `paged_attention_decode`: uniform and skewed batches over a shuffled block table.

On a GPU the suite's own cases are batches of one model's heads over a cache of values in blocks of 16; some
of them again over caches of codes; one of them with more query heads a key head, and with larger blocks; and
batches whose requests begin with the same blocks, with and without sharing them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsun_bench import kv_choice
from qsun_bench.cases import Json, Selection, Suite, generator
from qsun_bench.kv_choice import DEFAULT_BLOCK_SIZE, KvChoice
from qsun_bench.shapes import models
from qsun_kernels.backends.problems import KvScales, PagedAttentionDecodeProblem
from qsun_kernels.testing.inputs import zipf_lengths
from qsun_kernels.testing.kv_codes import KvKind, dequantised, quantised_rows

# Elements that are made and quantised at once: the float64 of a whole cache would not fit beside it.
_CHUNK = 1 << 26
_CUDA_UNIFORM: tuple[tuple[int, int], ...] = (
    (1, 1024), (1, 8192), (1, 65536), (8, 1024), (8, 8192), (32, 1024), (32, 4096),
    (64, 512), (64, 2048), (128, 1024), (256, 512), (256, 2048), (1024, 128),
)  # fmt: skip
# Measured last: here FlashAttention 3 of vLLM 0.24 may end the CUDA context, and every measurement behind it.
_CUDA_LAST = ((64, 8192), (128, 4096))
# Of normally distributed numbers, what one scale for all of them takes to the largest code.
_DEVIATIONS = 6.0
# What the batches of codes are of; each is one of values, too.
_CODES: tuple[KvKind, ...] = ("fp8", "int8", "int4")
_CODES_UNIFORM = ((1, 8192), (8, 1024), (64, 2048), (64, 8192))
_CODES_SKEWED = ((64, 1.2, 131072),)
# One batch under other groups of query heads and in other blocks of the cache.
_SWEPT = (64, 2048)
_GROUPS = (5, 6, 7, 8)
_BLOCK_SIZES = (32, 64, 128)
_CUDA_SKEWED: tuple[tuple[int, float, int], ...] = (
    (64, 1.0, 131072), (64, 1.2, 131072), (64, 1.5, 131072), (200, 1.2, 262144),
)  # fmt: skip
_CUDA_ONE_LONG = ((64, 131072),)
# Groups, requests of each, tokens that a group shares, tokens of a request's own.
_CUDA_SHARED = ((1, 64, 4096, 256), (8, 8, 4096, 256))
_CPU_SHARED = ((1, 4, 512, 64),)
_CPU_UNIFORM = ((1, 1024), (8, 512))
_CPU_SKEWED = ((16, 1.0, 8192),)

# (query heads, key heads, head_dim); (name, lengths).
_Heads = tuple[int, int, int]
_Batch = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class AttentionOperands:
    """A KV cache whose blocks lie in random order, its block table and lengths.

    k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim), of codes as `kv_codes` makes them
    where there are scales. block_table: int32 (B, max_blocks). dtype: of the queries.
    """

    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    q_heads: int
    head_dim: int
    dtype: torch.dtype
    softmax_scale: float
    window: int | None
    shares_prefixes: bool = False  # read once what several requests have in the same blocks

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        scales = (self.k_scale, self.v_scale)
        return (self.k_cache, self.v_cache, *(scale for scale in scales if scale is not None))

    @property
    def kv_scales(self) -> KvScales:
        if self.k_scale is None:
            return "none"
        return "tensor" if self.k_scale.shape == (1,) else "token"

    def copy(self) -> AttentionOperands:
        own: dict[str, Any] = {
            field.name: value.clone()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **own)

    def gathered(self, row: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one request in order, each (num_kv_heads, length, head_dim).

        Of a cache of codes in float64: code * scale, exactly.
        """
        length = int(self.seq_lens[row])
        block_size = self.k_cache.shape[2]
        blocks = self.block_table[row, : -(-length // block_size)].long()
        first = 0 if self.window is None else max(0, length - self.window)
        both = []
        for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale)):
            dense = cache.view(torch.uint8)[blocks].view(cache.dtype)
            if scale is not None:
                dense = dequantised(dense, scale if scale.shape == (1,) else scale[blocks])
            dense = dense.transpose(0, 1).reshape(cache.shape[1], -1, self.head_dim)
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
            keys, values = (t[None].to(q.dtype) for t in self.gathered(row))
            out = torch.nn.functional.scaled_dot_product_attention(
                q[None, :, None], keys, values, scale=self.softmax_scale, enable_gqa=True
            )
            rows.append(out[0, :, 0])
        return torch.stack(rows)

    def terms(self, activation: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One decode step of a batch. label: the batch and its lengths.

    kv: what the cache holds, "auto" for values of `dtype`. The name tells what is unlike the most: codes, and
    blocks of another size than 16. shared_tokens: with these each request begins, in the same blocks as the
    others of its group. groups: of requests that follow one another. shares_prefixes: whether the plan is
    given the block table.
    """

    op: ClassVar[str] = "paged_attention_decode"

    label: str
    seq_lens: tuple[int, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = DEFAULT_BLOCK_SIZE
    window: int | None = None
    kv: KvChoice = "auto"
    shared_tokens: int = 0
    groups: int = 1
    shares_prefixes: bool = False

    @property
    def name(self) -> str:
        return self.label + kv_choice.in_names(self.kv, self.block_size)

    @property
    def bytes(self) -> int:
        kept = (n if self.window is None else min(n, self.window) for n in self.seq_lens)
        again = (len(self.seq_lens) - self.groups) * self.shared_tokens
        head = kv_choice.head_bytes(self.kv, self.dtype, self.head_dim)
        kv = 2 * (sum(kept) - again) * self.kv_heads * head + kv_choice.tensor_scale_bytes(self.kv)
        tables = sum(-(-n // self.block_size) for n in self.seq_lens) * 4 + len(self.seq_lens) * 4
        return kv + tables + 2 * len(self.seq_lens) * self.q_heads * self.head_dim * self.dtype.itemsize

    @property
    def operands_key(self) -> object:
        return self

    def fields(self) -> dict[str, Json]:
        name = str(self.dtype).removeprefix("torch.")
        shared: dict[str, Json] = {}
        if self.shared_tokens:
            shared = {
                "shared_tokens": self.shared_tokens,
                "groups": self.groups,
                "shares_prefixes": self.shares_prefixes,
            }
        return {
            **shared,
            "batch": len(self.seq_lens),
            "seq_lens": list(self.seq_lens),
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "window": self.window,
            "dtype": name,
            "kv_dtype": kv_choice.in_records(self.kv, self.dtype),
        }

    def problem(self, device: torch.device) -> PagedAttentionDecodeProblem:
        return PagedAttentionDecodeProblem(
            self.q_heads,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.window,
            self.dtype,
            kv_choice.element_dtype(self.kv, self.dtype),
            device,
            kv_choice.scales_of(self.kv),
        )

    def operands(self, device: torch.device) -> AttentionOperands:
        # By the label, not the name: a cache of codes holds what the cache of values holds, rounded.
        g = generator(device, "kv", self.label, self.seq_lens)
        needed = [-(-n // self.block_size) for n in self.seq_lens]
        shared = self.shared_tokens // self.block_size
        group_size = len(needed) // self.groups
        in_use = sum(needed) - (len(needed) - self.groups) * shared
        order = torch.randperm(in_use, generator=g, device=device).to(torch.int32)
        # Entries past a request's length are never read: an index outside the cache would show if they were.
        table = torch.full((len(needed), max(needed)), torch.iinfo(torch.int32).max, dtype=torch.int32)
        table = table.to(device)
        start = 0
        for row, count in enumerate(needed):
            first = row // group_size * group_size
            known = shared if row > first else 0
            table[row, :known] = table[first, :known]
            table[row, known:count] = order[start : start + count - known]
            start += count - known
        k_cache, k_scale = self._random_cache(in_use, g)
        v_cache, v_scale = self._random_cache(in_use, g)
        return AttentionOperands(
            *(k_cache, v_cache, k_scale, v_scale, table),
            torch.tensor(self.seq_lens, dtype=torch.int32, device=device),
            *(self.q_heads, self.head_dim, self.dtype, self.head_dim**-0.5, self.window),
            shares_prefixes=self.shares_prefixes,
        )

    def _random_cache(self, num_blocks: int, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Normally distributed keys or values, or their codes and scales."""
        block = (self.kv_heads, self.block_size, self.head_dim)
        width = kv_choice.width(self.kv, self.head_dim)
        dtype = kv_choice.element_dtype(self.kv, self.dtype)
        cache = torch.empty((num_blocks, *block[:2], width), dtype=dtype, device=g.device)
        scale = given = None
        scales = kv_choice.scales_of(self.kv)
        if scales == "token":
            scale = torch.empty((num_blocks, *block[:2]), device=g.device)
        elif scales == "tensor":
            given = torch.tensor([_DEVIATIONS / torch.finfo(dtype).max], device=g.device)
        step = max(1, _CHUNK // math.prod(block))
        for start in range(0, num_blocks, step):
            part = slice(start, min(start + step, num_blocks))
            values = torch.randn((part.stop - start, *block), device=g.device, generator=g).to(self.dtype)
            if self.kv == "auto":
                cache[part] = values
                continue
            cache[part], of_rows = quantised_rows(values, self.kv, given)
            if scale is not None:
                scale[part] = of_rows
        return cache, scale if given is None else given

    def activation(self, device: torch.device) -> Tensor:
        g = generator(device, "q", len(self.seq_lens), self.q_heads, self.head_dim)
        shape_ = (len(self.seq_lens), self.q_heads, self.head_dim)
        return torch.randn(shape_, device=device, generator=g).to(self.dtype)


def cases(selection: Selection) -> Sequence[AttentionCase]:
    """Uniform batches and Zipf-skewed ones for the attention sizes of the chosen shapes, equal sizes once.

    Heads, codes and block sizes that were asked for are combined with all of them. When nothing was asked
    for, there are batches with common beginnings, too, and on a GPU some of codes, of larger groups and of
    larger blocks.
    """
    on_cuda = selection.device.type == "cuda"
    names = selection.shapes or (("llama-3.1-8b",) if on_cuda else ("smollm2-135m",))
    uniform, skewed = (_CUDA_UNIFORM, _CUDA_SKEWED) if on_cuda else (_CPU_UNIFORM, _CPU_SKEWED)
    one_long, last = (_CUDA_ONE_LONG, _CUDA_LAST) if on_cuda else ((), ())
    shared: tuple[tuple[int, int, int, int], ...] = _CUDA_SHARED if on_cuda else _CPU_SHARED
    if selection.smoke:
        names, uniform, skewed, one_long, last = (
            selection.shapes or ("smollm2-135m",),
            ((1, 300), (5, 129)),
            ((8, 1.0, 1000),),
            ((4, 1000),),
            (),
        )
        shared = ((2, 3, 128, 20),)
    if selection.batches or selection.contexts:
        batches = selection.batches or (1,)
        contexts = selection.contexts or (1024,)
        uniform, skewed = tuple((b, c) for b in batches for c in contexts), ()
        one_long, last = (), ()
    lengths = _uniform(uniform) + _skewed(skewed)
    lengths += [(f"{b}-onelong-{total}", _one_long(b, total)) for b, total in one_long]
    asked = (selection.batches, selection.contexts, selection.heads, selection.kv, selection.block_sizes)
    settings = list(product(selection.kv or ("auto",), selection.block_sizes or (DEFAULT_BLOCK_SIZE,)))
    found: list[AttentionCase] = []
    for heads in _heads(selection, names):
        found += _combined(heads, lengths, settings, selection.dtype)
        if selection.smoke and not any(asked):
            found += _combined(
                heads, lengths[1:2], [(kv, DEFAULT_BLOCK_SIZE) for kv in _CODES], selection.dtype
            )
        elif on_cuda and not any(asked):
            found += _further(heads, selection.dtype)
        if not any(asked):
            found += _shared_cases(heads, selection.dtype, shared)
        found += _combined(heads, _uniform(last), settings, selection.dtype)
    return list(dict.fromkeys(found))


def _heads(selection: Selection, names: Sequence[str]) -> Sequence[_Heads]:
    """Those of the models, or those asked for with the models' widths; equal ones once."""
    found = [
        (q_heads, kv_heads, sizes.head_dim)
        for sizes in models(names)
        for q_heads, kv_heads in selection.heads or ((sizes.q_heads, sizes.kv_heads),)
    ]
    return list(dict.fromkeys(found))


def _combined(
    heads: _Heads,
    batches: Sequence[_Batch],
    settings: Sequence[tuple[KvChoice, int]],
    dtype: torch.dtype,
) -> Iterator[AttentionCase]:
    """Every batch over every kind and block size of cache."""
    of = "h{}kv{}d{}".format(*heads)
    for (kv, block_size), (label, lengths) in product(settings, batches):
        yield AttentionCase(f"{of}.{label}", lengths, *heads, dtype, block_size, kv=kv)


def _further(heads: _Heads, dtype: torch.dtype) -> Iterator[AttentionCase]:
    """Some batches of codes; one with larger groups of query heads, and in larger blocks."""
    _, kv_heads, head_dim = heads
    swept = _uniform((_SWEPT,))
    coded = _uniform(_CODES_UNIFORM) + _skewed(_CODES_SKEWED)
    yield from _combined(heads, coded, [(kv, DEFAULT_BLOCK_SIZE) for kv in _CODES], dtype)
    for group in _GROUPS:
        yield from _combined(
            (group * kv_heads, kv_heads, head_dim), swept, [("auto", DEFAULT_BLOCK_SIZE)], dtype
        )
    yield from _combined(heads, swept, [("auto", block_size) for block_size in _BLOCK_SIZES], dtype)


def _uniform(sizes: Sequence[tuple[int, int]]) -> list[_Batch]:
    return [(f"{batch}x{length}", (length,) * batch) for batch, length in sizes]


def _skewed(sizes: Sequence[tuple[int, float, int]]) -> list[_Batch]:
    return [
        (f"{b}-zipf{alpha:g}-{total}", tuple(zipf_lengths(torch.Generator().manual_seed(b), b, total, alpha)))
        for b, alpha, total in sizes
    ]


def _shared_cases(
    heads: _Heads, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int, int]]
) -> Iterator[AttentionCase]:
    """Batches with common beginnings, each once with a plan that shares them and once without."""
    for groups, each, shared_tokens, own in sizes:
        label = "h{}kv{}d{}".format(*heads) + f".{groups}x{each}x{shared_tokens}+{own}"
        lengths = (shared_tokens + own,) * (groups * each)
        for name, shares in (("shared", True), ("alone", False)):
            yield AttentionCase(
                *(f"{label}-{name}", lengths, *heads, dtype),
                shared_tokens=shared_tokens,
                groups=groups,
                shares_prefixes=shares,
            )


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
