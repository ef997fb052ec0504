"""write_kv_cache: new keys and values into their slots of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, WriteKvCacheProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["check_cache", "write_kv_cache"]


def write_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    backend: BackendName | None = None,
) -> None:
    """Write the key and value of each token to its slot, ``block * block_size + offset``; a negative slot
    skips the token.

    k, v (T, Hkv, D) of one dtype (float32, float16, bfloat16); the heads of a token lie side by side, the
    token stride is free. k_cache, v_cache (num_blocks, Hkv, block_size, D) contiguous, changed in place;
    values are rounded to their dtype. slot_mapping int64 (T,); two tokens with one slot leave either there. A
    slot past the cache is an error on the CPU (IndexError) and undefined on a GPU.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    _check(k, v, k_cache, v_cache, slot_mapping)
    if is_traced(k, v, k_cache, v_cache, slot_mapping):
        torch.ops.qsun.write_kv_cache(k, v, k_cache, v_cache, slot_mapping, backend=backend)
    else:
        _launch(k, v, k_cache, v_cache, slot_mapping, backend=backend)


def check_cache(k_cache: Tensor, v_cache: Tensor, device: torch.device) -> None:
    """Two caches (num_blocks, Hkv, block_size, D), alike, contiguous, on `device`."""
    checks.floating("k_cache", k_cache)
    checks.beside("k_cache", k_cache, k_cache.dtype, device, "on the device of the data")
    checks.rank("k_cache", k_cache, 4, "(num_blocks, Hkv, block_size, D)")
    checks.contiguous("k_cache", k_cache)
    checks.beside("v_cache", v_cache, k_cache.dtype, device, "like k_cache")
    checks.shape("v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    checks.contiguous("v_cache", v_cache)
    if k_cache.shape[2] < 1:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}, expected a block_size of at least 1")


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    checks.floating("k", k)
    checks.heads("k", k, "(T, Hkv, D)")
    checks.beside("v", v, k.dtype, k.device, "like k")
    checks.shape("v", v, k.shape, "the shape of k")
    checks.heads("v", v, "(T, Hkv, D)")
    check_cache(k_cache, v_cache, k.device)
    T, H, D = k.shape
    if k_cache.shape[1] != H or k_cache.shape[3] != D:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)}, "
            f"expected (num_blocks, Hkv, block_size, D) = (any, {H}, any, {D}) as k has"
        )
    checks.index("slot_mapping", slot_mapping, torch.int64, k.device)
    checks.shape("slot_mapping", slot_mapping, (T,), "(T,)")
    refuse_gradient("write_kv_cache", k=k, v=v, k_cache=k_cache, v_cache=v_cache)


def _launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    backend: str | None = None,
) -> None:
    run = launcher(
        requested_backend(backend),
        WriteKvCacheProblem,
        k.shape[1],
        k.shape[2],
        k_cache.shape[2],
        k.dtype,
        k_cache.dtype,
        k.device,
    )
    run(k, v, k_cache, v_cache, slot_mapping)


def _fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    backend: str | None = None,
) -> None:
    return None


register(
    "write_kv_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
    "str? backend=None) -> ()",
    _launch,
    _fake,
)
