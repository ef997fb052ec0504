"""write_kv_cache: new keys and values into their slots of the paged cache, with all that comes before it."""

from __future__ import annotations

from typing import TypeAlias, cast, overload

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend, select
from qsun_kernels.backends.problems import (
    BackendName,
    PendingSums,
    WriteImplementation,
    WriteKvCacheProblem,
)
from qsun_kernels.ops import checked_mode, checks
from qsun_kernels.ops.cache_checks import cache_head_dim, check_cache, check_scales, kind_of
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["write_kv_cache"]


@overload
def write_kv_cache(
    k: Tensor | PendingSums,
    v: Tensor | PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    settled: bool = False,
    backend: BackendName | None = None,
) -> None: ...


@overload
def write_kv_cache(
    k: Tensor | PendingSums,
    v: Tensor | PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: Tensor | PendingSums,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    settled: bool = False,
    backend: BackendName | None = None,
) -> Tensor: ...


def write_kv_cache(
    k: Tensor | PendingSums,
    v: Tensor | PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q: Tensor | PendingSums | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    settled: bool = False,
    backend: BackendName | None = None,
) -> Tensor | None:
    """Write the key and value of each token to its slot, ``block * block_size + offset``; a negative slot
    skips the token.

    k, v (T, Hkv, D) of one dtype (float32, float16, bfloat16); the heads of a token lie side by side, the
    token stride is free. k_cache, v_cache (num_blocks, Hkv, block_size, D) contiguous, changed in place;
    slot_mapping int64 (T,); two tokens with one slot leave either there. That slots are in the cache, and
    positions in their table, is the caller's contract: else IndexError on the CPU, undefined on a GPU, and
    CacheIndexError with ``QSUN_CHECK=1`` (`checked_mode`).

    The dtype of the caches says how they are stored (docs/formats.md). float32, float16 and bfloat16: values
    are rounded to it. float8_e4m3fn, int8, and uint8 for 4 bits, (..., D / 2): value = code * scale, with
    k_scale, v_scale float32 (num_blocks, Hkv, block_size), one a head and token, changed in place. With
    float8_e4m3fn they may be (1,) instead, finite and above 0, and are only read. A head with a value that is
    not finite reads as NaN (with a scale of shape (1,): that value does).

    What a decoder layer does to q and k in front of it, each step wanted or not, in this order:
    k_norm, q_norm (D,) of the dtype of k: `rms_norm` of each head with `eps` (Qwen3). positions, cos_sin:
    `apply_rope`. rotate=True: each head times the Hadamard matrix / sqrt(D) (Sylvester's order, D a power of
    two), which spreads outliers over the head before it is quantised and leaves q . k as it was (QuaRot,
    arXiv 2404.00456, section 4); attention over such a cache needs every q rotated.

    q (T, Hq, D) like k: goes through the same steps, for skipped tokens too, and is returned contiguous.
    Without q, None is returned.

    k, v and q may all be sums that a product left (`PendingSums`, (splits, T, H, D)) instead, of one float16
    or bfloat16 product: they are added up first, to the bits that the product would have given. Not in traced
    code.

    settled: a promise that slot_mapping, positions, cos_sin and the norms were complete before the launch in
    front of this one began, and all that a `paged_attention_decode` behind this call reads with
    `follows_write`. So is whatever was complete before an earlier call without this promise on the same
    stream: nothing behind such a call begins before what is in front of it has ended. A kernel may then read
    them, and let the next launch begin, while those in front still run; in traced code it does not. A promise
    that does not hold is not noticed, and gives old values for new ones.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    if not isinstance(settled, bool):
        raise TypeError(f"settled is {settled!r}, expected True or False")
    steps = (positions, cos_sin, q_norm, k_norm, eps, rotate, k_scale, v_scale)
    if isinstance(k, PendingSums) or isinstance(v, PendingSums) or isinstance(q, PendingSums):
        return _write_sums(k, v, k_cache, v_cache, slot_mapping, q, steps, settled, backend)
    _check(k, v, k_cache, v_cache, slot_mapping, q, *steps)
    tensors = (k, v, k_cache, v_cache, slot_mapping, q, positions, cos_sin, q_norm, k_norm, k_scale, v_scale)
    if not is_traced(*tensors):
        return _launch(k, v, k_cache, v_cache, slot_mapping, q, *steps, settled, backend)
    after_norm = (eps, rotate, k_scale, v_scale)
    if q is None:
        torch.ops.qsun.write_kv_cache(
            *(k, v, k_cache, v_cache, slot_mapping, positions, cos_sin, k_norm, *after_norm), backend=backend
        )
        return None
    return cast(
        Tensor,
        torch.ops.qsun.write_kv_cache_with_q(
            *(k, v, k_cache, v_cache, slot_mapping, q, positions, cos_sin, q_norm, k_norm, *after_norm),
            backend=backend,
        ),
    )


def _check(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotate: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    dtype: torch.dtype | None = None,
) -> None:
    """dtype: of rows of which k, v and q are a part of the sums; None where they are the rows."""
    checks.floating("k", k)
    checks.heads("k", k, "(T, Hkv, D)")
    checks.beside("v", v, k.dtype, k.device, "like k")
    checks.shape("v", v, k.shape, "the shape of k")
    checks.heads("v", v, "(T, Hkv, D)")
    check_cache(k_cache, v_cache, k.device)
    T, H, D = k.shape
    if k_cache.shape[1] != H or cache_head_dim(k_cache) != D:
        width, size = ("D / 2", D / 2) if k_cache.dtype == torch.uint8 else ("D", D)
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} and dtype {k_cache.dtype}, "
            f"expected (num_blocks, Hkv, block_size, {width}) = (any, {H}, any, {size:g}) as k has"
        )
    check_scales(k_cache, k_scale, v_scale)
    checks.index("slot_mapping", slot_mapping, torch.int64, k.device)
    checks.shape("slot_mapping", slot_mapping, (T,), "(T,)")
    if q is not None:
        checks.beside("q", q, k.dtype, k.device, "like k")
        checks.heads("q", q, "(T, Hq, D)")
        checks.shape("q", q, (T, q.shape[1], D), "(T, Hq, D)")
    _check_norms(k, q, dtype or k.dtype, q_norm, k_norm, eps)
    if (positions is None) != (cos_sin is None):
        name, other = ("positions", "cos_sin") if positions is None else ("cos_sin", "positions")
        raise ValueError(f"{name} is None, expected it beside {other}, or neither")
    if positions is not None and cos_sin is not None:
        checks.rope("k", k, positions, cos_sin)
    if rotate:
        if q is None:
            raise ValueError("rotate is True and q is None, expected the queries, which rotate with the keys")
        if D & (D - 1):
            raise ValueError(f"rotate is True and k has a head_dim of {D}, expected a power of two")
    elif q is not None and q_norm is None and positions is None:
        raise ValueError("q is given and there is nothing to do to q, expected cos_sin, q_norm or rotate")
    refuse_gradient(
        "write_kv_cache",
        **{"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "q": q, "cos_sin": cos_sin},
        **{"q_norm": q_norm, "k_norm": k_norm, "k_scale": k_scale, "v_scale": v_scale},
    )


def _check_norms(
    k: Tensor,
    q: Tensor | None,
    dtype: torch.dtype,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    if q is None and q_norm is not None:
        raise ValueError("q_norm is given and q is None, expected both or neither")
    if q is not None and (q_norm is None) != (k_norm is None):
        name, other = ("q_norm", "k_norm") if q_norm is None else ("k_norm", "q_norm")
        raise ValueError(f"{name} is None, expected it beside {other}, or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            checks.beside(name, norm, dtype, k.device, "like k")
            checks.shape(name, norm, (k.shape[2],), "(D,)")
            checks.contiguous(name, norm)
    checks.epsilon("eps", eps)


_Steps: TypeAlias = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool, Tensor | None, Tensor | None
]
"""positions, cos_sin, q_norm, k_norm, eps, rotate, k_scale, v_scale."""


def _write_sums(
    k: Tensor | PendingSums,
    v: Tensor | PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | PendingSums | None,
    steps: _Steps,
    settled: bool,
    backend: BackendName | None,
) -> Tensor | None:
    """What `write_kv_cache` does where at least one of k, v and q is sums: checks, then the launch."""
    firsts: dict[str, Tensor] = {}
    for name, rows in (("k", k), ("v", v), ("q", q)):
        if rows is None and name == "q":
            continue
        if not isinstance(rows, PendingSums):
            raise TypeError(f"{name} is a {type(rows).__name__} beside sums, expected a PendingSums as well")
        assert isinstance(k, PendingSums)  # it comes first
        checks.floating(f"{name}.parts", rows.parts)
        checks.beside(f"{name}.parts", rows.parts, torch.float32, k.parts.device, "sums, on the device of k")
        checks.rank(f"{name}.parts", rows.parts, 4, "(splits, T, H, D)")
        if rows.dtype not in (torch.float16, torch.bfloat16) or rows.dtype != k.dtype:
            expected = "torch.float16 or torch.bfloat16, the same for k, v and q"
            raise TypeError(f"{name}.dtype is {rows.dtype}, expected {expected}")
        if (len(rows.parts), rows.parts.stride(0)) != (len(k.parts), k.parts.stride(0)) or not len(k.parts):
            raise ValueError(
                f"{name}.parts are {len(rows.parts)}, {rows.parts.stride(0)} elements apart; expected "
                f"{max(len(k.parts), 1)}, {k.parts.stride(0)} apart: k, v and q of one product"
            )
        firsts[name] = rows.parts[0]
    assert isinstance(k, PendingSums)
    _check(firsts["k"], firsts["v"], k_cache, v_cache, slot_mapping, firsts.get("q"), *steps, k.dtype)
    positions, cos_sin, q_norm, k_norm, _, _, k_scale, v_scale = steps
    around = (k_cache, v_cache, slot_mapping, positions, cos_sin, q_norm, k_norm, k_scale, v_scale)
    if is_traced(*firsts.values(), *around):
        raise RuntimeError("write_kv_cache of PendingSums was called in traced code; add them up before")
    return _launch(k, v, k_cache, v_cache, slot_mapping, q, *steps, settled, backend)


def _launch(
    k: Tensor | PendingSums,
    v: Tensor | PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | PendingSums | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotate: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    settled: bool,
    backend: str | None,
) -> Tensor | None:
    """k, v and q are rows, or all of them sums."""
    if checked_mode.ENABLED:
        max_positions = 0 if cos_sin is None else cos_sin.shape[0]
        checked_mode.check_written(slot_mapping, k_cache.shape[0], k_cache.shape[2], positions, max_positions)
    sizes = (
        k.shape[1],
        k.shape[2],
        k_cache.shape[2],
        k.dtype,
        k_cache.dtype,
        k.device,
        kind_of(k_scale),
        0 if q is None else q.shape[1],
        k_norm is not None,
        positions is not None,
        rotate,
    )
    requested = requested_backend(backend)
    rows: tuple[Tensor | PendingSums | None, ...] = (k, v, q)
    if isinstance(k, PendingSums):
        chosen = select(WriteKvCacheProblem(*sizes), requested).implementation
        run = chosen.run_sums if isinstance(chosen, WriteImplementation) else None
        if run is None:
            run = chosen.run
            rows = tuple(one.added() if isinstance(one, PendingSums) else one for one in rows)
    else:
        run = launcher(requested, WriteKvCacheProblem, *sizes)
    steps = (positions, cos_sin, q_norm, k_norm, eps, rotate, k_scale, v_scale)
    return cast("Tensor | None", run(*rows[:2], k_cache, v_cache, slot_mapping, rows[2], *steps, settled))


def _run(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    steps = (positions, cos_sin, None, k_norm, eps, rotate, k_scale, v_scale)
    _launch(k, v, k_cache, v_cache, slot_mapping, None, *steps, False, backend)


def _run_with_q(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    steps = (positions, cos_sin, q_norm, k_norm, eps, rotate, k_scale, v_scale)
    return cast(Tensor, _launch(k, v, k_cache, v_cache, slot_mapping, q, *steps, False, backend))


def _fake(k: Tensor, *others: object, backend: str | None = None) -> None:
    return None


def _fake_with_q(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor,
    *others: object,
    backend: str | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


_WRITTEN = "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping"
_STEPS = "float eps=1e-6, bool rotate=False, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None"

register(
    f"write_kv_cache({_WRITTEN}, Tensor? positions=None, Tensor? cos_sin=None, Tensor? k_norm=None, "
    f"{_STEPS}, *, str? backend=None) -> ()",
    _run,
    _fake,
)
register(
    f"write_kv_cache_with_q({_WRITTEN}, Tensor q, Tensor? positions=None, Tensor? cos_sin=None, "
    f"Tensor? q_norm=None, Tensor? k_norm=None, {_STEPS}, *, str? backend=None) -> Tensor",
    _run_with_q,
    _fake_with_q,
)
