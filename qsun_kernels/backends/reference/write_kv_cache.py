"""write_kv_cache in torch: the separate operators one after another, then the append."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, WriteKvCacheProblem
from qsun_kernels.backends.reference import apply_rope, rms_norm
from qsun_kernels.backends.reference.dtypes import refuse_cache, refuse_dtypes
from qsun_kernels.backends.reference.hadamard import hadamard
from qsun_kernels.backends.reference.kv_codes import quantize_kv


def supports(problem: WriteKvCacheProblem) -> str | None:
    """Every shape and every cache, on every device."""
    return refuse_dtypes(dtype=problem.dtype) or refuse_cache(problem.kv_dtype, problem.kv_scales)


def describe(problem: WriteKvCacheProblem) -> str:
    """What runs."""
    steps = (("rms_norm", problem.norm), ("apply_rope", problem.rope), ("hadamard", problem.rotate))
    before = [name for name, taken in steps if taken]
    if problem.kv_scales != "none":
        before.append("quantisation")
    return " after ".join(["torch index_put", *([", ".join(before)] if before else [])])


def run(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    settled: bool = False,
) -> Tensor | None:
    """Norm, rotary embedding and rotation of q and k; then
    ``cache[slot // block_size, :, slot % block_size] = row`` for each token; tokens with a negative slot are
    skipped.

    k, v (T, H, D), q (T, Hq, D); caches (num_blocks, H, block_size, D), changed in place (D / 2 for 4-bit
    codes); scales (num_blocks, H, block_size), changed in place, or (1,), read; slot_mapping int64 (T,).
    Norm and embedding each round to the dtype of q and k, as the operators of their own do; the rotation is
    float32 and is rounded when it is stored, as a code or in the dtype of the cache or of q. Returns q.
    A slot past the cache raises IndexError on the CPU, and fails the device assertion of torch on a GPU.
    """
    k = _prepare(k, k_norm, eps, positions, cos_sin, rotate)
    if q is not None:
        dtype = q.dtype
        q = _prepare(q, q_norm, eps, positions, cos_sin, rotate).to(dtype).contiguous()
    if k.shape[0] and k_cache.shape[0]:
        stored = [*_as_stored(k, k_cache, k_scale), *_as_stored(v, v_cache, v_scale)]
        drop_skipped = _drop_skipped if slot_mapping.device.type == "cpu" else _replace_skipped
        stored, slots = drop_skipped(stored, slot_mapping)
        block_size = k_cache.shape[2]
        block, offset = slots // block_size, slots % block_size
        for cache, rows in stored:
            cache[block, :, offset] = rows
    return q


def _prepare(
    heads: Tensor,
    norm: Tensor | None,
    eps: float,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    rotate: bool,
) -> Tensor:
    """Heads (T, H, D) after the steps that were asked for; float32 if the rotation is one of them."""
    if norm is not None:
        heads = rms_norm.normalize(heads, norm, eps)
    if positions is not None and cos_sin is not None:
        heads = apply_rope.turn(heads, positions, cos_sin)
    return hadamard(heads) if rotate else heads


def _as_stored(rows: Tensor, cache: Tensor, scale: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """What `rows` (T, H, D) become, each with the tensor that it goes to, by [block, :, offset]."""
    if scale is None:
        return [(cache, rows.to(cache.dtype))]
    is_given = scale.shape == (1,)
    codes, scales = quantize_kv(rows.float(), cache.dtype, scale if is_given else None)
    # torch moves bytes about where it does not move float8.
    stored = [(cache.view(torch.uint8), codes.view(torch.uint8))]
    return stored if is_given else [*stored, (scale, scales)]


def _drop_skipped(
    stored: list[tuple[Tensor, Tensor]], slot_mapping: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The tokens that are kept, and their slots."""
    kept = slot_mapping >= 0
    if bool(kept.all()):
        return stored, slot_mapping
    return [(cache, rows[kept]) for cache, rows in stored], slot_mapping[kept]


def _replace_skipped(
    stored: list[tuple[Tensor, Tensor]], slot_mapping: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Let skipped tokens repeat the first kept one, which changes nothing and needs no count on the host.

    When every token is skipped they write to slot 0 what it holds.
    """
    kept = slot_mapping >= 0
    first = kept.to(torch.uint8).argmax()
    source = torch.where(kept, torch.arange(kept.shape[0], device=kept.device), first)
    slots = slot_mapping[source]
    none_kept = slots[0] < 0
    replaced = [(cache, torch.where(none_kept, cache[0, :, 0], rows[source])) for cache, rows in stored]
    return replaced, slots.clamp(min=0)


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
