"""The two machines that run the CUDA kernels in these tests: a GPU, or the emulator here, on the CPU.

The emulator compiles the sources of csrc, unchanged, with a C++ compiler (see emulator/cuda_runtime.h) and an
undefined-behaviour sanitizer that ends the process at a misaligned access. So the same tests check the same
kernels on a machine without a GPU; what only a GPU can show is marked `gpu` alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
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

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent / "emulator"
SANITIZERS = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-include", "cuda_runtime.h"]
FLAGS += [SANITIZERS, "-fno-sanitize-recover=all"]
DEFINITIONS = [
    f'-DQSUN_{name}="emulator"' for name in ("CUDA_ARCHS", "NVCC_VERSION", "HOST_COMPILER", "REVISION")
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def extension() -> Any:
    """The built binding; skips where it is not."""
    if not cuda.build_info():
        pytest.skip(f"needs the CUDA library: {cuda.unavailable()}")
    return cuda._C


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
def emulated_kernels(emulated_extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The launchers on the emulated binding, with tensors on the CPU."""
    monkeypatch.setattr(cuda, "_C", OnDevice(emulated_extension), raising=False)
    monkeypatch.setattr(cuda, "_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "_device_props", lambda index: emulated_extension.device_info(0))
    return Kernels(torch.device("cpu"), False)


class OnDevice:
    """The emulated binding, whose only device is 0; CPU tensors say -1."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        if name not in cuda.IMPLEMENTATIONS:
            return function
        return lambda *arguments: function(*arguments[:-2], 0, arguments[-1])


@pytest.fixture(scope="session")
def emulated_extension() -> Iterator[ModuleType]:
    """csrc as a Python module that runs on the CPU."""
    toolkit = toolkit_headers()
    if toolkit is None:
        pytest.skip("needs the headers of the CUDA toolkit (cuda_fp16.h)")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = build_emulator(toolkit)
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def toolkit_headers() -> Path | None:
    """The folder with the CUDA toolkit's headers."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    candidates = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in candidates if (folder / "cuda_fp16.h").exists()), None)


def build_emulator(toolkit: Path) -> Path:
    """Compile csrc for the emulator, once for every state of the sources, under build/."""
    import pybind11

    sources = sorted([*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.cpp"), EMULATOR / "emulator.cpp"])
    everything = [*sources, *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/**/*.h"), *EMULATOR.glob("*.h")]
    digest = hashlib.sha256(repr((FLAGS, str(toolkit), sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in sorted(everything):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    folder = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C.so"
    includes = [EMULATOR, ROOT / "csrc", ROOT / "csrc" / "include", toolkit]
    includes += [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
    flags = [*FLAGS, *DEFINITIONS, *(f"-I{path}" for path in includes)]

    def compiled(source: Path) -> str:
        output = folder / (source.relative_to(ROOT).as_posix().replace("/", ".") + ".o")
        run_compiler(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(output)])
        return str(output)

    with (folder / "lock").open("w") as lock:  # test workers are processes of their own
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                objects = list(pool.map(compiled, sources))
            unfinished = folder / "unfinished.so"
            run_compiler(["g++", SANITIZERS, "-static-libubsan", "-shared", "-o", str(unfinished), *objects])
            unfinished.rename(library)
    return library


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
