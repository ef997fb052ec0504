"""What the built CUDA library would launch for a problem, asked without launching."""

from __future__ import annotations

import torch

from qsun_bench.cases.wna16 import Wna16Case
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.panels import BLOCK_COLUMNS

# What is asked about where no GPU is: the properties of an H100 SXM.
_H100 = {
    "compute_major": 9,
    "compute_minor": 0,
    "sm_count": 132,
    "shared_memory_per_block": 227 << 10,
    "l2_bytes": 50 << 20,
}


def cuda_launch(case: Wna16Case, device: torch.device) -> str | None:
    """The configuration that the library's own chooser takes for a case; None where it is not built."""
    binding = getattr(library, "binding", None)
    if binding is None:
        return None
    if device.type == "cuda":
        where, props = str(device), binding.device_info(device.index or 0)
    else:
        where, props = "an H100", binding.DeviceProps(**_H100)
    if case.dtype not in linear.PANEL_DTYPES:
        return f"{binding.choose_wna16_linear(case.M, case.N, props)} on {where}"
    group = case.spec.group_size
    groups_per_block = 1 if group == "channel" else BLOCK_COLUMNS // group
    zeros = not case.spec.symmetric
    launch = binding.describe_wna16_panels(
        case.M, case.N, case.K, case.spec.bits, groups_per_block, zeros, False, props
    )
    return f"{launch} on {where}"
