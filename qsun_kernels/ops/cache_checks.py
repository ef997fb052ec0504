"""Checks of the paged KV cache, its scales and its codes, for the operators that write and read it."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import KV_SCALES, KvScales
from qsun_kernels.ops import checks

__all__ = ["cache_head_dim", "check_cache", "check_scales", "kind_of"]


def cache_head_dim(k_cache: Tensor) -> int:
    """Elements of a head in the cache (num_blocks, Hkv, block_size, D or D / 2): uint8 holds two a byte."""
    width = k_cache.shape[3]
    return 2 * width if k_cache.dtype == torch.uint8 else width


def check_cache(k_cache: Tensor, v_cache: Tensor, device: torch.device) -> None:
    """Two caches (num_blocks, Hkv, block_size, D), alike, contiguous, on `device`."""
    if not isinstance(k_cache, Tensor):
        raise TypeError(f"k_cache is a {type(k_cache).__name__}, expected a torch.Tensor")
    if k_cache.dtype not in KV_SCALES:
        raise TypeError(
            f"k_cache has dtype {k_cache.dtype}, expected one of {', '.join(map(str, KV_SCALES))}"
        )
    checks.beside("k_cache", k_cache, k_cache.dtype, device, "on the device of the data")
    checks.rank("k_cache", k_cache, 4, "(num_blocks, Hkv, block_size, D)")
    checks.contiguous("k_cache", k_cache)
    checks.beside("v_cache", v_cache, k_cache.dtype, device, "like k_cache")
    checks.shape("v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    checks.contiguous("v_cache", v_cache)
    if k_cache.shape[2] < 1:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}, expected a block_size of at least 1")


def check_scales(k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> KvScales:
    """Raise for scales that do not belong to such a cache; else say which kind they are."""
    allowed = KV_SCALES[k_cache.dtype]
    if allowed == ("none",):
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise ValueError(f"{name} is given, expected None: a cache of {k_cache.dtype} has no scales")
        return "none"
    per_token = tuple(k_cache.shape[:3])
    expected = f"(num_blocks, Hkv, block_size) = {per_token}"
    if "tensor" in allowed:
        expected = f"(1,) or {expected}"
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            raise ValueError(
                f"{name} is None, expected float32 {expected}: a cache of {k_cache.dtype} has scales"
            )
        checks.beside(name, scale, torch.float32, k_cache.device, "scales, on the device of the cache")
        if scale.shape != per_token and not (scale.shape == (1,) and "tensor" in allowed):
            raise ValueError(f"{name} has shape {tuple(scale.shape)}, expected {expected}")
        checks.contiguous(name, scale)
    assert k_scale is not None and v_scale is not None
    checks.shape("v_scale", v_scale, k_scale.shape, "the shape of k_scale")
    return kind_of(k_scale)


def kind_of(k_scale: Tensor | None) -> KvScales:
    """Which scales these are, once they are checked: (1,) for a tensor, three dimensions for tokens."""
    if k_scale is None:
        return "none"
    return "tensor" if k_scale.dim() == 1 else "token"
