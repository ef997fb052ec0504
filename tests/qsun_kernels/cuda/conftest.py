"""The two machines that run the CUDA kernels in these tests: a GPU, or the emulator here, on the CPU.

The emulator compiles the sources of csrc, unchanged, with a C++ compiler (see emulator/cuda_runtime.h) and an
undefined-behaviour sanitizer that ends the process at a misaligned access. So the same tests check the same
kernels on a machine without a GPU; what only a GPU can show is marked `gpu` alone.

The emulated GPU is of compute capability 9.0, or what QSUN_EMULATOR_CAPABILITY says (8.0); `emulated_kernels`
takes 1 as its parameter for a second device, which is always of 8.0.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import attention, library, linear, pending_norm, split_products

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent / "emulator"
# Folders of the project in which the emulator's build looks for headers, the emulator's stand-ins first.
HEADERS = (EMULATOR, ROOT / "csrc", ROOT / "csrc" / "include")
# On wgmma and tensor maps, which are not emulated: emulator/not_emulated.cpp stands in.
NOT_EMULATED = ("csrc/wna16/**/*sm90*.cu", "csrc/runtime/tensor_map.cpp")
SANITIZERS = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", SANITIZERS, "-fno-sanitize-recover=all"]
DEFINITIONS = [
    f'-DQSUN_{name}="emulator"' for name in ("CUDA_ARCHS", "NVCC_VERSION", "HOST_COMPILER", "REVISION")
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def extension() -> Any:
    """The built binding; skips where it is not."""
    if not cuda.build_info():
        pytest.skip(f"needs the CUDA library: {cuda.unavailable()}")
    return library.binding


@pytest.fixture
def h100(extension: Any) -> Any:
    """What choices depend on."""
    return extension.DeviceProps(
        compute_major=9, compute_minor=0, sm_count=132, shared_memory_per_block=227 * 1024, l2_bytes=50 << 20
    )


@pytest.fixture
def a100(extension: Any) -> Any:
    """No clusters, no overlapping launches, and less shared memory."""
    return extension.DeviceProps(
        compute_major=8, compute_minor=0, sm_count=108, shared_memory_per_block=163 * 1024, l2_bytes=40 << 20
    )


@dataclass(frozen=True)
class Kernels:
    """Where kernels run. `run` calls the launcher of an operator by name."""

    device: torch.device
    is_gpu: bool

    def run(self, operator: str, *arguments: Any) -> Any:
        return cuda.IMPLEMENTATIONS[operator].run(*arguments)

    def pick(self, on_gpu: Any, emulated: Any) -> Any:
        """A size for a GPU, or a smaller one for the emulator."""
        return on_gpu if self.is_gpu else emulated


@pytest.fixture(
    params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("emulator", marks=pytest.mark.slow)]
)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A GPU, and the emulator: a test that takes this runs on both."""
    if request.param == "gpu":
        reason = cuda.unavailable()
        # A GPU that the library was not built for is a failure of the build, not a reason to skip.
        assert reason is None, reason
        return Kernels(torch.device("cuda", torch.cuda.current_device()), True)
    return request.getfixturevalue("emulated_kernels")


@pytest.fixture
def emulated_kernels(
    request: pytest.FixtureRequest, emulated_extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Kernels:
    """The launchers on the emulated binding, with tensors on the CPU. Parameter: the device, 0 or 1."""
    device = getattr(request, "param", 0)
    monkeypatch.setattr(library, "binding", OnDevice(emulated_extension, device), raising=False)
    monkeypatch.setattr(library, "stream", lambda index: 0)
    # Both devices have index -1 there
    attention._launch_of.cache_clear()
    linear._scratch_bytes.cache_clear()
    pending_norm._may_pend.cache_clear()
    split_products._splits.cache_clear()
    monkeypatch.setattr(library, "device_props", lambda index: emulated_extension.device_info(device))
    return Kernels(torch.device("cpu"), False)


class OnDevice:
    """The emulated binding on one of its devices; CPU tensors say -1."""

    def __init__(self, module: ModuleType, device: int) -> None:
        self._module = module
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        if name not in (*cuda.IMPLEMENTATIONS, "wna16_panels", "plan_paged_attention", "gather_columns"):
            return function
        return lambda *arguments: function(*arguments[:-2], self._device, arguments[-1])


@pytest.fixture(scope="session")
def emulated_extension() -> Iterator[ModuleType]:
    """csrc as a Python module that runs on the CPU."""
    sources = {path for pattern in ("*.cu", "*.cpp") for path in ROOT.glob(f"csrc/**/{pattern}")}
    sources -= {path for pattern in NOT_EMULATED for path in ROOT.glob(pattern)}
    sources.add(EMULATOR / "add_parts.cu")
    built = build_emulated("_C", sources)
    spec = importlib.util.spec_from_file_location("_C", built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture(scope="session")
def emulated_instructions() -> ctypes.CDLL:
    """emulator/instructions.cu: small kernels that test the emulator itself."""
    sources = {EMULATOR / "instructions.cu", ROOT / "csrc" / "runtime" / "launch.cpp"}
    return ctypes.CDLL(str(build_emulated("instructions", sources)))


@pytest.fixture
def guard(emulated_extension) -> Iterator[Callable[[torch.Tensor], None]]:
    """Names memory that the launch in front writes."""
    emulator = ctypes.CDLL(emulated_extension.__file__)
    guarded = []  # kept until the emulator forgets them

    def one(memory: torch.Tensor) -> None:
        assert memory.is_contiguous()
        guarded.append(memory)
        emulator.guard_produced(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.nbytes))

    yield one
    emulator.forget_produced()


def toolkit_headers() -> Path | None:
    """The folder with the CUDA toolkit's headers."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    candidates = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in candidates if (folder / "cuda_fp16.h").exists()), None)


def build_emulated(name: str, sources: set[Path]) -> Path:
    """Compile sources with the emulator into a library under build/: what changed since the last time."""
    import pybind11

    toolkit = toolkit_headers()
    if toolkit is None:
        pytest.skip("needs the headers of the CUDA toolkit (cuda_fp16.h)")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    outside = (toolkit, Path(sysconfig.get_path("include")), Path(pybind11.get_include()))
    flags = [*FLAGS, *DEFINITIONS, *(f"-I{path}" for path in (*HEADERS, *outside))]
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        output = folder / f"{source.stem}-{digest_of(source, flags)}.o"
        if not output.exists():
            make(output, [*flags, "-include", str(first), "-x", "c++", "-c", str(source)])
        return output

    with (folder / "lock").open("w") as lock:  # test workers are processes of their own
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = precompiled_runtime(folder, flags)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sorted({*sources, *EMULATOR.glob("*.cpp")})))
        digest = hashlib.sha256(repr([path.name for path in objects]).encode()).hexdigest()[:16]
        built = folder / digest / f"{name}.so"
        if not built.exists():
            built.parent.mkdir(exist_ok=True)
            make(built, [SANITIZERS, "-static-libubsan", "-shared", *map(str, objects)])
    return built


def precompiled_runtime(folder: Path, flags: list[str]) -> Path:
    """A header that includes the emulator's cuda_runtime.h, which every source begins with: compiled once.

    g++ takes what was compiled from the file of that name beside it.
    """
    runtime = EMULATOR / "cuda_runtime.h"
    header = folder / f"{runtime.stem}-{digest_of(runtime, flags)}.h"
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        header.write_text(f'#include "{runtime.name}"\n')
        make(compiled, [*flags, "-x", "c++-header", str(header)])
    return header


def digest_of(source: Path, flags: list[str]) -> str:
    """Changes when the flags change, or the source, or a header of the project that it includes."""
    digest = hashlib.sha256(repr((flags, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    found = {source, EMULATOR / "cuda_runtime.h"}
    unread = sorted(found)
    while unread:
        path = unread.pop()
        text = path.read_bytes()
        digest.update(path.relative_to(ROOT).as_posix().encode() + text)
        for name in re.findall(rb'#include "([^"]+)"', text):
            folders = (path.parent, *HEADERS)
            header = next((at for at in (folder / name.decode() for folder in folders) if at.exists()), None)
            if header is not None and header not in found:
                found.add(header)
                unread.append(header)
    return digest.hexdigest()[:16]


def make(output: Path, arguments: list[str]) -> None:
    """Run the compiler; the output is there whole, or not at all."""
    unfinished = output.with_suffix(".unfinished")
    command = ["g++", *arguments, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    unfinished.rename(output)
