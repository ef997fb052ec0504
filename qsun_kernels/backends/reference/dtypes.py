"""The dtypes that the reference computes with."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def refuse_dtypes(**dtypes: torch.dtype) -> str | None:
    """Why one of the named dtypes cannot be computed with; None when all can."""
    for name, dtype in dtypes.items():
        if dtype not in FLOATING:
            return f"{name} is {dtype}, it takes {', '.join(map(str, FLOATING))}"
    return None
