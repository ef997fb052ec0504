"""Starting a kernel while the one before it drains (programmatic dependent launch, sm_90 and newer).

A kernel that was launched with `launch_pdl=True` may start before the kernel in front of it has ended. Until
it has called `wait_for_earlier_kernels` it must read nothing that a kernel in front of it writes, and write
nothing at all. What it may do before is read weights, which were laid out long ago, or have them brought into
the L2 cache.

Every kernel of such a chain waits, so what one has waited for, all that come after it have, too. Interpreted,
and where the launch was a plain one, these functions do nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

from qsun_kernels.backends.triton.numerics import INTERPRETED, device_function

MINIMUM_CAPABILITY = (9, 0)


@lru_cache(maxsize=64)
def can_launch_early(device: torch.device) -> bool:
    """Whether kernels on this device may be launched with `launch_pdl=True`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MINIMUM_CAPABILITY


@device_function
def let_next_kernel_start() -> None:
    """The kernel behind this one may start as soon as every program of this one has said so, or ended."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@device_function
def wait_for_earlier_kernels() -> None:
    """Wait until every kernel in front of this one has ended and what it wrote can be read."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@device_function
def prefetch_lines(pointers: tl.tensor) -> None:
    """Ask for the cache lines (of 128 bytes) that hold these addresses, without waiting for them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
