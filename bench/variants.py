"""Our kernels as another GPU would be given them, run on this one: contenders of suites that ask for them."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared
from qsun_kernels import prepare_weight
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.dispatch import refusal
from qsun_kernels.backends.panels import BLOCK_COLUMNS
from qsun_kernels.backends.problems import BACKENDS

SM80 = "cuda-sm80"
"""The kernels of GPUs before sm_90: no copy engine, no wgmma, no programmatic dependent launch."""

OURS = (*BACKENDS, SM80)

_SM80_SHARED_MEMORY = 163 << 10  # of a block on an A100


def sm80_refusal(case: Case, device: torch.device) -> str | None:
    """None, or why the variant cannot run a case."""
    if device.type != "cuda":
        return f"device is {device}, expected a GPU"
    if (reason := refusal("cuda", case.problem(device))) is not None:
        return reason
    return None if getattr(case, "dtype", None) in linear.PANEL_DTYPES else "only 16-bit activations"


def prepare_sm80(operands: Wna16Operands) -> Prepared:
    """The weight in memory of its own, launched as the library would on a GPU of compute capability 8.0 that
    has this one's multiprocessors and the shared memory of an A100.
    """
    weight = prepare_weight(operands.copy().weight, dtype=operands.dtype, backend="cuda")
    device = weight.tensors[0].device
    own = library.device_props(device.index or 0)
    props = library.binding.DeviceProps(
        compute_major=8,
        compute_minor=0,
        sm_count=own.sm_count,
        shared_memory_per_block=_SM80_SHARED_MEMORY,
        l2_bytes=own.l2_bytes,
    )
    spec = weight.spec
    groups = 1 if spec.group_size == "channel" else BLOCK_COLUMNS // spec.group_size

    def run(x: Tensor) -> Tensor:
        sizes = x.shape[0], weight.N, weight.K, spec.bits, groups, not spec.symmetric
        config = (
            library.binding.choose_wna16_tiles(*sizes, props)
            if library.binding.uses_wna16_tiles(*sizes, False, props)
            else library.binding.choose_wna16_stream(*sizes, False, props)
        )
        out = x.new_empty(x.shape[0], weight.N)
        linear.launch_panels(x, weight, None, None, out, False, config)
        return out

    return Prepared(run, weight.tensors)
