"""The binding of libqsun, why it may be missing, and what launchers share.

The only module that imports `_C`. It imports without `_C` and without a GPU; `unavailable` then says what is
missing.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun_kernels.backends.problems import KvScales

try:
    import qsun_kernels._C as binding
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

__all__ = [
    "CACHE_DTYPE_CODES",
    "DTYPE_CODES",
    "SCALES_CODES",
    "address",
    "always",
    "binding",
    "build_info",
    "covers",
    "device_props",
    "refuse",
    "row_stride",
    "rows",
    "stream",
    "unavailable",
]

DTYPE_CODES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""qsun::DType in csrc/include/qsun/types.h, of values."""

CACHE_DTYPE_CODES: Mapping[torch.dtype, int] = {
    **DTYPE_CODES,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
    torch.uint8: 5,
}
"""The same, of KV caches; torch.uint8 holds pairs of 4-bit codes."""

SCALES_CODES: Mapping[KvScales, int] = {"none": 0, "tensor": 1, "token": 2}
"""qsun::KvScales in csrc/include/qsun/types.h."""

_BUILD_RECORD = Path(__file__).parents[2] / "_build_info.json"


def build_info() -> Mapping[str, object]:
    """How the library was built (archs, nvcc, host_compiler, revision, cuda_runtime); empty if it was not."""
    return {} if _import_error is not None else binding.build_info()


def _why_not_built() -> str:
    if not isinstance(_import_error, ModuleNotFoundError) or _import_error.name != "qsun_kernels._C":
        return f"the CUDA library does not load ({_import_error})"
    if not _BUILD_RECORD.exists():
        return "the CUDA library is not built (no build record: run `pip install .`)"
    record = json.loads(_BUILD_RECORD.read_text())
    if record["build"]:
        return f"the CUDA library was built, but not for Python {platform.python_version()}: reinstall"
    return f"the CUDA library is not built ({record['reason']})"


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether machine code for one of `archs` runs on a GPU of compute capability (major, minor).

    "80" runs on every 8.x; "90a" (architecture-specific) on 9.0 alone; "100f" (family-specific) on 10.x.
    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "Feature Set Compiler Targets".
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built == capability or (match[3] != "a" and built[0] == capability[0] and built < capability):
            return True
    return False


def _refuse_capability(capability: tuple[int, int]) -> str | None:
    archs = binding.build_info()["archs"]
    if covers(archs, capability):
        return None
    built = ", ".join(f"sm_{arch}" for arch in archs)
    name = f"{capability[0]}{capability[1]}"
    return (
        f"the CUDA library is built for {built}, and this GPU is sm_{name}: "
        f"reinstall with QSUN_CUDA_ARCHS={'90a' if name == '90' else name}"
    )


def unavailable() -> str | None:
    """Why no kernel here can run on this machine; None when they can."""
    if _import_error is not None:
        return _why_not_built()
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, expected a CUDA build"
    refusals = [
        _refuse_capability(torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    ]
    return None if None in refusals else refusals[0]


def refuse(device: torch.device, **dtypes: torch.dtype) -> str | None:
    """Why no kernel here runs on `device` with these dtypes (by argument name); None when they do."""
    if device.type != "cuda":
        return f"device is {device}, expected a CUDA device"
    for name, dtype in dtypes.items():
        if dtype not in DTYPE_CODES:
            return f"{name} is {dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}"
    return _refuse_capability(torch.cuda.get_device_capability(device))


# ---- what launchers share


@lru_cache(maxsize=64)
def device_props(index: int) -> binding.DeviceProps:
    return binding.device_info(index)


def stream(index: int) -> int:
    """The handle of torch's current stream on device `index`."""
    # torch.cuda.current_stream() makes a Stream object of the same number, which costs more than a launch.
    return torch._C._cuda_getCurrentRawStream(index)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x (..., H) as (rows, H), its rows contiguous: a view where the strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def always(text: str) -> Callable[[Any], str]:
    """A `describe` for an operator that has one kernel."""
    return lambda problem: text
