"""Products that run on while their program goes on (wgmma, sm_90 only), and waiting for them.

A product of 64 rows or more is multiplied by four warps at once, and the instruction returns before it has
read its operands. Where the left one is in registers, these must not be written until it has. In a loop
Triton (3.6, and others) cuts such a product into pieces of 16 columns and lets all but one of a step's pieces
be in flight when the next step begins, whose first instructions write the registers that the pieces still
read: single results are then of other numbers altogether, on some runs. So every loop here that accumulates
products with a left operand that it has computed waits for them before a step ends. Within a step nothing is
waited for: a piece is multiplied while the next is computed, in registers of its own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

from qsun_kernels.backends.triton.numerics import INTERPRETED, device_function

CAPABILITY = (9, 0)


@lru_cache(maxsize=64)
def multiplies_by_warpgroups(device: torch.device) -> bool:
    """Whether kernels on this device may use wgmma, which no other generation has."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY


@device_function
def wait_for_products() -> None:
    """Wait until every product of this warp has read its operands and written its sums."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
