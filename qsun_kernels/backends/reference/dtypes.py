"""The dtypes that the reference computes with."""

from __future__ import annotations

import torch

from qsun_kernels.backends.problems import KV_SCALES, KvScales

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def refuse_dtypes(**dtypes: torch.dtype) -> str | None:
    """Why one of the named dtypes cannot be computed with; None when all can."""
    for name, dtype in dtypes.items():
        if dtype not in FLOATING:
            return f"{name} is {dtype}, it takes {', '.join(map(str, FLOATING))}"
    return None


def refuse_cache(kv_dtype: torch.dtype, kv_scales: KvScales) -> str | None:
    """Why there is no KV cache of this dtype with these scales; None when there is."""
    if kv_dtype not in KV_SCALES:
        return f"kv_dtype is {kv_dtype}, it takes {', '.join(map(str, KV_SCALES))}"
    if kv_scales not in KV_SCALES[kv_dtype]:
        return f"kv_scales is {kv_scales}, a cache of {kv_dtype} has {' or '.join(KV_SCALES[kv_dtype])}"
    return None
