"""What launchers of this backend share: refusing a problem, picking the device, naming a failed launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import TracebackType

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from qsun_kernels.backends.problems import KV_SCALES, KvScales
from qsun_kernels.backends.triton.numerics import INTERPRETED, to_float32
from qsun_kernels.errors import KernelLaunchError

FLOATING_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

MINIMUM_CAPABILITY = (8, 0)

HOW_TO_INTERPRET = "set TRITON_INTERPRET=1 in the environment to run them on CPU tensors (slowly, for tests)"


def is_interpreted() -> bool:
    """Whether kernels run through Triton's interpreter instead of being compiled."""
    return bool(INTERPRETED.value)


def refuse_machine() -> str | None:
    """Why no kernel here can run on this machine; None when they can."""
    if is_interpreted() == isinstance(to_float32, JITFunction):
        # Half of the code would be interpreted, the other half compiled.
        return "TRITON_INTERPRET changed after triton was imported; set it before the process starts"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}; {HOW_TO_INTERPRET}"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, expected a CUDA build"
    return None


def refuse(device: torch.device, **dtypes: torch.dtype) -> str | None:
    """Why no kernel here runs on `device` with these dtypes (by argument name); None when they do."""
    for name, dtype in dtypes.items():
        if dtype not in FLOATING_DTYPES:
            return f"{name} is {dtype}, expected one of {', '.join(map(str, FLOATING_DTYPES))}"
    if device.type not in ("cuda", "cpu"):
        return f"device is {device}, expected a CUDA device"
    if is_interpreted():
        return None
    if device.type == "cpu":
        return f"device is cpu, and Triton kernels are compiled for CUDA devices; {HOW_TO_INTERPRET}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        major, minor = capability
        return f"{device} is sm_{major}{minor}, expected sm_80 or newer"
    return None


def refuse_cache(kv_dtype: torch.dtype, kv_scales: KvScales) -> str | None:
    """Why there is no KV cache of this dtype with these scales; None when there is."""
    if kv_dtype not in KV_SCALES:
        return f"kv_dtype is {kv_dtype}, expected one of {', '.join(map(str, KV_SCALES))}"
    if kv_scales not in KV_SCALES[kv_dtype]:
        return f"kv_scales is {kv_scales}, expected {' or '.join(KV_SCALES[kv_dtype])} for {kv_dtype}"
    return None


def converts_float8(device: torch.device) -> bool:
    """Whether the device has instructions that convert float8_e4m3fn."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the CPU, where programs run one after the other."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` (>= 1)."""
    return 1 << (size - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` (..., H) as (rows, H) whose rows are H contiguous values; a view wherever that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


class Launching:
    """Makes the tensors' device current for a launch, and turns what Triton raises into KernelLaunchError.

    operator: for the error. device: of the tensors. shapes: called only when the launch failed.
    Triton launches on the current device and its current stream: with another device current, the kernel
    would read the tensors from afar, or fail.
    """

    __slots__ = ("_device", "_guard", "_operator", "_shapes")

    def __init__(self, operator: str, device: torch.device, shapes: Callable[[], str]) -> None:
        self._operator = operator
        self._device = device
        self._shapes = shapes
        self._guard: torch.cuda.device | None = None

    def __enter__(self) -> None:
        if self._device.type == "cuda" and self._device.index != torch.cuda.current_device():
            self._guard = torch.cuda.device(self._device)
            self._guard.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._guard is not None:
            self._guard.__exit__(kind, error, traceback)
        if isinstance(error, Exception):
            reported = f"Triton {triton.__version__} reported {type(error).__name__}: {error}"
            raise KernelLaunchError(self._operator, self._shapes(), reported) from error
