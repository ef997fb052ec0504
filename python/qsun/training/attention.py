"""Causal attention of many sequences in one pack, none seeing another.

The sequences are laid out right-padded in groups of similar length.  Under a causal mask a real token never
sees the padding behind it, so the mask needs no tensor and the fused kernels of torch take it; what padding
rows compute is dropped.  The result is that of a block-diagonal causal mask over the whole pack.

    rows of the pack      a0 b0 b1 b2 a1 c0 c1            (any order: `rows` says which row is which token)
    groups                [a0 a1 --]
                          [b0 b1 b2]   [c0 c1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WASTE = 1.25
"""A group is closed when padding would make it this many times as large as its tokens."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the rows of a pack go.

    slots: int64 (S,), the row that each padded slot is filled from (row 0 for padding).
    where: int64 (T,), the slot of each row.
    padding: bool (S,), the slots that no row owns; None when there is none.
    groups: (sequences, padded length) of each group, in the order of the slots.
    """

    slots: Tensor
    where: Tensor
    padding: Tensor | None
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, rows: Sequence[Tensor], device: torch.device) -> AttentionPlan:
        """rows: for each sequence the pack's rows of its tokens, int64, in order of position."""
        groups: list[tuple[int, int]] = []
        slots: list[Tensor] = []
        for members in _similar([len(r) for r in rows]):
            longest = len(rows[members[0]])
            groups.append((len(members), longest))
            for index in members:
                slots.append(functional.pad(rows[index], (0, longest - len(rows[index])), value=-1))
        flat = torch.cat(slots)
        real = (flat >= 0).nonzero()[:, 0]
        where = torch.empty(len(real), dtype=torch.int64)
        where[flat[real]] = real
        padding = (flat < 0).to(device) if len(real) < len(flat) else None
        return cls(flat.clamp(min=0).to(device), where.to(device), padding, tuple(groups))


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the sequences in groups, longest first, each wasting little on padding."""
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest > WASTE * (tokens + lengths[index]):
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += lengths[index]
    return groups


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, window: int | None
) -> Tensor:
    """Every row attends to the rows of its own sequence up to itself, at most `window` of them.

    q (T, num_q_heads, D), k, v (T, num_kv_heads, D) -> (T, num_q_heads, D).
    """
    parts = [_Spread.apply(x, plan.slots, plan.where) for x in (q, k, v)]
    outputs = []
    start = 0
    for count, length in plan.groups:
        rows = slice(start, start + count * length)
        start += count * length
        group = [part[rows].view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts]
        outputs.append(_attend(*group, scale=scale, window=window).transpose(1, 2).flatten(0, 1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    result: Tensor = _Collect.apply(padded, plan.slots, plan.where, plan.padding)
    return result


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """q (B, num_q_heads, L, D), k, v (B, num_kv_heads, L, D), causal."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or window >= length:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if grouped:
        # The fused kernels that take a mask know no groups.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(length, device=q.device)
    distance = positions[:, None] - positions[None, :]
    mask = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# Two gathers whose gradients are gathers too.  Those that autograd would derive add atomically on a GPU, in
# an order that changes from run to run.
class _Spread(torch.autograd.Function):
    """Rows (T, ...) to slots (S, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, where: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(where)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        # The gradient of padding is zero: no real token sees it.
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Slots (S, ...) to rows (T, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, where: Tensor, padding: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots, padding)
        return x.index_select(0, where)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        slots, padding = ctx.saved_tensors
        spread = grad.index_select(0, slots)
        if padding is not None:
            spread.masked_fill_(padding.view(-1, *(1,) * (grad.dim() - 1)), 0)
        return spread, None, None, None
