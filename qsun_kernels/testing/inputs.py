"""Random problems for tests and benchmarks, drawn on the CPU so that every device gets the same numbers.

What an operator must not read is filled with NaN: the slots of the cache past a request's length, the blocks
of nobody, the space between strided heads. What it must write is, inside `poisoned_outputs`, NaN until it
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun_kernels.quant import PackedWeight, QuantSpec
from qsun_kernels.testing.kv_codes import KvKind, quantised_cache

__all__ = [
    "ODD_ROWS",
    "ODD_WIDTHS",
    "PagedAttentionInputs",
    "generator",
    "normal",
    "packed_weight",
    "paged_attention_inputs",
    "poisoned_outputs",
    "qkv_views",
    "sampling_inputs",
    "share_prefix",
    "slot_mapping",
    "zipf_lengths",
]

ODD_ROWS = (0, 1, 2, 3, 5, 7, 8, 17, 33)
"""Numbers of rows (tokens, requests) around the sizes that tiles have, and none."""

ODD_WIDTHS = (1, 2, 31, 32, 33, 127, 130, 576, 1025)
"""Widths that no vector or tile divides, beside some that one does."""


def generator(seed: int) -> torch.Generator:
    """A source of random numbers on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


def normal(
    source: torch.Generator,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    std: float = 1.0,
) -> Tensor:
    """Normal numbers of mean 0, contiguous."""
    return (torch.randn(tuple(shape), generator=source) * std).to(dtype).to(device)


def packed_weight(
    source: torch.Generator,
    N: int,
    K: int,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype = torch.float32,
    act_order: bool = False,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """Uniform codes and zero points, scales spread over a factor of eight, so that a wrong group shows.

    The scales make rows of roughly unit norm. act_order: columns are dealt to groups at random, each group as
    large as it would be in order.
    """
    codes = torch.randint(0, spec.max_code + 1, (N, K), generator=source, dtype=torch.int32).to(torch.uint8)
    groups = spec.num_groups(K)
    spread = 2.0 ** (3 * torch.rand(N, groups, generator=source) - 1.5)
    scales = (spread * (4 / (spec.max_code * K**0.5))).to(scale_dtype)
    qzeros = None
    if not spec.symmetric:
        qzeros = torch.randint(0, spec.max_code + 1, (N, groups), generator=source).to(torch.uint8)
    g_idx = None
    if act_order:
        in_order = torch.arange(K, dtype=torch.int32) // spec.columns_per_group(K)
        g_idx = in_order[torch.randperm(K, generator=source)].contiguous()
    return PackedWeight.from_codes(codes, scales, spec, qzeros, g_idx).to(device)


def qkv_views(
    source: torch.Generator,
    tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a model has them: views (T, heads, D) into one matrix, here with NaN behind
    each row.
    """
    heads = num_q_heads + 2 * num_kv_heads
    matrix = torch.full((tokens, (heads + 1) * head_dim), torch.nan, dtype=dtype)
    matrix[:, : heads * head_dim] = normal(source, (tokens, heads * head_dim), dtype)
    by_head = matrix.to(device).view(tokens, heads + 1, head_dim)
    q, k, v, _ = by_head.split([num_q_heads, num_kv_heads, num_kv_heads, 1], dim=1)
    return q, k, v


def slot_mapping(
    source: torch.Generator,
    tokens: int,
    num_slots: int,
    *,
    skip: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Different slots for the tokens, int64 (T,); about a share `skip` of them negative, which skips the
    token.
    """
    if tokens > num_slots:
        raise ValueError(f"tokens is {tokens}, expected at most num_slots, {num_slots}")
    slots = torch.randperm(num_slots, generator=source)[:tokens]
    skipped = torch.rand(tokens, generator=source) < skip
    return torch.where(skipped, -1 - slots, slots).to(device)


def zipf_lengths(
    source: torch.Generator, batch: int, total: int, exponent: float, *, minimum: int = 1
) -> list[int]:
    """Lengths in proportion to rank ** -exponent, shuffled, that add up to `total`: a few long requests, many
    short.
    """
    if total < batch * minimum:
        raise ValueError(f"total is {total}, expected at least batch * minimum = {batch * minimum}")
    weights = torch.arange(1, batch + 1, dtype=torch.float64) ** -exponent
    free = total - batch * minimum
    lengths = (weights / weights.sum() * free).floor().long() + minimum
    lengths[0] += total - int(lengths.sum())
    return [int(length) for length in lengths[torch.randperm(batch, generator=source)]]


@dataclass(frozen=True, slots=True)
class PagedAttentionInputs:
    """Arguments of `paged_attention_decode`, with shapes as there."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    softmax_scale: float
    window: int | None
    softcap: float | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def q_len(self) -> int:
        """Query tokens of each request."""
        requests = self.seq_lens.shape[0]
        return self.q.shape[0] // requests if requests else 1


def paged_attention_inputs(
    source: torch.Generator,
    seq_lens: Sequence[int],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    kv: KvKind | None = None,
    device: torch.device | str = "cpu",
    window: int | None = None,
    q_len: int = 1,
    softcap: float | None = None,
    sinks: bool = False,
    spare_blocks: int = 2,
    std: float = 1.0,
) -> PagedAttentionInputs:
    """A batch of requests of these lengths over scattered blocks.

    Every slot that no request may read is NaN, and so are the blocks behind the block ids past a request's
    length. kv: a kind of codes that the caches become. q is a strided view of q_len tokens a request. sinks:
    with normal numbers for them. spare_blocks: blocks of nobody, and columns of the block table past the
    longest request.
    """
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + max(1, spare_blocks)
    ids = torch.randperm(num_blocks, generator=source).to(torch.int32)
    nobody = ids[sum(counts) :]
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache = torch.full(shape, torch.nan, dtype=kv_dtype)
    v_cache = torch.full(shape, torch.nan, dtype=kv_dtype)
    max_blocks = max(counts, default=0) + spare_blocks
    block_table = nobody[torch.randint(0, len(nobody), (len(counts), max_blocks), generator=source)]
    taken = 0
    for request, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        own = ids[taken : taken + count]
        taken += count
        block_table[request, :count] = own
        first = 0 if window is None else max(0, length - q_len - window + 1)
        for cache in (k_cache, v_cache):
            tokens = torch.full((count * block_size, num_kv_heads, head_dim), torch.nan, dtype=kv_dtype)
            tokens[first:length] = normal(source, (length - first, num_kv_heads, head_dim), kv_dtype, std=std)
            cache[own.long()] = tokens.view(count, block_size, num_kv_heads, head_dim).transpose(1, 2)
    k_scale = v_scale = None
    if kv is not None:
        (k_cache, k_scale), (v_cache, v_scale) = (quantised_cache(c, kv) for c in (k_cache, v_cache))
    q, _, _ = qkv_views(source, len(counts) * q_len, num_q_heads, num_kv_heads, head_dim, dtype, device)
    return PagedAttentionInputs(
        q=q,
        k_cache=k_cache.to(device),
        v_cache=v_cache.to(device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        softmax_scale=head_dim**-0.5,
        window=window,
        softcap=softcap,
        sinks=normal(source, (num_q_heads,), torch.float32, device) if sinks else None,
        k_scale=None if k_scale is None else k_scale.to(device),
        v_scale=None if v_scale is None else v_scale.to(device),
    )


def share_prefix(problem: PagedAttentionInputs, requests: Sequence[int], blocks: int) -> None:
    """Let the block tables of `requests` begin with the same blocks, in place: those of the first of them.

    blocks: how many; every one of the requests has to have them, and whole. The blocks that the others had
    become NaN. Only for caches of values.
    """
    first, *others = requests
    block_size = problem.k_cache.shape[2]
    shortest = min(int(problem.seq_lens[request]) for request in requests)
    if blocks * block_size > shortest:
        raise ValueError(f"blocks is {blocks}, expected at most {shortest // block_size}, which all have")
    shared = problem.block_table[first, :blocks].clone()
    for request in others:
        own = problem.block_table[request, :blocks]
        left = own[own != shared].long()
        for cache in (problem.k_cache, problem.v_cache):
            cache[left] = torch.nan
        problem.block_table[request, :blocks] = shared


def sampling_inputs(
    source: torch.Generator,
    batch: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    std: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, temperature, top_k, top_p, min_p and keys for `sample_tokens`; rows lie NaN elements apart.

    Rows take turns: greedy, all filters off, each filter alone, all together, filters at their bounds; every
    sixteen rows hold one of all equal logits, one huge one, -inf entries, and a NaN, +inf and nothing but
    -inf, where the row cannot be drawn from.
    """
    gap = int(torch.randint(0, 9, (1,), generator=source))
    rows = torch.full((batch, vocab_size + gap), torch.nan, dtype=dtype)
    logits = rows[:, :vocab_size]
    logits.copy_(normal(source, (batch, vocab_size), dtype, std=std))
    some = int(torch.randint(1, vocab_size + 1, (1,), generator=source))
    settings = torch.zeros(batch, 4, dtype=torch.float64)
    for row in range(batch):
        settings[row] = torch.tensor(
            [
                (0.0, 0, 1.0, 0.0),  # temperature, top_k, top_p, min_p
                (1.0, 0, 1.0, 0.0),
                (0.7, some, 1.0, 0.0),
                (1.3, 0, 0.9, 0.0),
                (1.0, 0, 1.0, 0.05),
                (2.0, min(50, vocab_size), 0.8, 0.02),
                (1.0, 1, 0.5, 0.0),
                (0.5, vocab_size, 1e-6, 1.0),
                (30.0, vocab_size - vocab_size // 3, 0.999, 1e-9),
            ][(row * 5 + row // 16) % 9]
        )
        kind = row % 16
        if kind == 3:
            logits[row] = 1.5
        elif kind == 5:
            logits[row, vocab_size // 2] = torch.finfo(dtype).max
        elif kind == 8 and vocab_size > 1:
            logits[row, vocab_size // 3 :: 2] = -torch.inf
            logits[row, 0] = 0.0
        elif kind in (10, 12):
            logits[row, vocab_size // 2] = torch.nan if kind == 10 else torch.inf
        elif kind == 14:
            logits[row] = -torch.inf
    temperature, top_k, top_p, min_p = settings.unbind(dim=1)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=source)
    return (
        rows.to(device)[:, :vocab_size],
        temperature.float().to(device),
        top_k.int().to(device),
        top_p.float().to(device),
        min_p.float().to(device),
        keys.to(device),
    )


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (the largest value, for integers): what is not written
    shows.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic  # a module whose class declares the switch
    was_filling = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        filling.fill_uninitialized_memory = was_filling
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
