"""Builds the wheel: three Python packages and, where nvcc is, the CUDA library.

Environment
    QSUN_CUDA        auto (default): build the CUDA library when nvcc is found; on: require it; off: leave it
                     out.
    QSUN_CUDA_ARCHS  architectures, separated by `;` or `,` (for example `80;90a`). Default: those of the
                     visible GPUs, else 80 and 90a.
    QSUN_BUILD_JOBS  parallel compiler processes. Default: the number of processors.

A compiler that is there and fails is an error: nobody should find out at run time that the kernels are
missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90a")
BUILD_RECORD = "_build_info.json"


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA library is built, and why (not). Kept in the package for the doctor."""

    build: bool
    reason: str
    nvcc: str | None
    archs: tuple[str, ...]


def runs(command: list[str]) -> str | None:
    """The output of `command`, or None when it is not there or fails (a stub on PATH does)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def find_nvcc() -> str | None:
    """An nvcc that runs: CUDACXX, then CUDA_HOME, PATH and the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((path for path in candidates if path and runs([path, "--version"])), None)


def visible_gpu_archs() -> tuple[str, ...]:
    """The compute capabilities of the GPUs that the driver shows, as architecture names."""
    listed = runs(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    capabilities = sorted({line.strip().replace(".", "") for line in listed.splitlines() if line.strip()})
    # Hopper's warpgroup instructions exist only in the architecture-specific target.
    return tuple("90a" if c == "90" else c for c in capabilities if c.isdigit() and int(c) >= 80)


def requested_archs() -> tuple[str, ...]:
    """QSUN_CUDA_ARCHS, the visible GPU's, or the default."""
    asked = os.environ.get("QSUN_CUDA_ARCHS", "").strip()
    if not asked:
        return visible_gpu_archs() or DEFAULT_ARCHS
    archs = tuple(part.strip() for part in re.split(r"[;, ]+", asked) if part.strip())
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            sys.exit(f"QSUN_CUDA_ARCHS: got {arch!r} in {asked!r}, expected names such as 80, 86, 89, 90a")
    return archs


def plan_cuda() -> CudaPlan:
    """Read the environment and look for the compiler."""
    mode = os.environ.get("QSUN_CUDA", "auto").strip().lower()
    if mode not in ("auto", "on", "off"):
        sys.exit(f"QSUN_CUDA: got {mode!r}, expected auto, on or off")
    if mode == "off":
        return CudaPlan(False, "built with QSUN_CUDA=off", None, ())
    nvcc = find_nvcc()
    if nvcc is None:
        if mode == "on":
            sys.exit("QSUN_CUDA=on, but no nvcc runs: looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")
        return CudaPlan(False, "no nvcc was found when the package was built", None, ())
    return CudaPlan(True, f"QSUN_CUDA={mode}", nvcc, requested_archs())


def revision() -> str:
    """The git commit this is built from, `-dirty` when the tree differs, or `unknown` outside a checkout."""
    commit = runs(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changed = runs(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("-dirty" if changed and changed.strip() else "")


class BuildCuda(build_ext):
    """Runs CMake in place of setuptools' own compiler and records what was done."""

    def run(self) -> None:
        plan = plan_cuda()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if inplace else Path(self.build_lib).resolve()) / "qsun_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in (*package.glob("_C*.so"), *package.glob("libqsun.so*")):
            stale.unlink()
        if plan.build:
            self._cmake(plan, package)
        record = asdict(plan) | {"revision": revision()}
        (package / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def _cmake(self, plan: CudaPlan, package: Path) -> None:
        # CMake's cache outlives the environment of an isolated build, so every path into one is given anew.
        # It cannot change its compiler, so each compiler has a folder of its own; so has each list of
        # architectures, whose objects and compiler reports another build then leaves as they are.
        compiler = f"{plan.nvcc}\n{runs([str(plan.nvcc), '--version'])}\n{plan.archs}"
        key = hashlib.sha256(compiler.encode()).hexdigest()[:8]
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{key}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_ninja()}",
            f"-DCMAKE_CUDA_COMPILER={plan.nvcc}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={kept_pybind11()}",
            f"-DQSUN_CUDA_ARCHS={';'.join(plan.archs)}",
            f"-DQSUN_REVISION={revision()}",
        ]  # fmt: skip
        jobs = os.environ.get("QSUN_BUILD_JOBS") or str(os.cpu_count() or 1)
        check_call(configure)
        check_call(["cmake", "--build", str(build), "--parallel", jobs])
        check_call(["cmake", "--install", str(build)])

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "qsun_kernels"
        return [
            str(path) for pattern in ("_C*.so", "libqsun.so*", BUILD_RECORD) for path in package.glob(pattern)
        ]

    def get_source_files(self) -> list[str]:
        return []


def kept_pybind11() -> str:
    """The CMake folder of a copy of pybind11 under build/.

    Every isolated build has a pybind11 of its own, in another place: all that includes it would be compiled
    again. One that does not keep CMake's files with it is the system's, which stays where it is.
    """
    import pybind11

    package, cmake = Path(pybind11.__file__).parent, Path(pybind11.get_cmake_dir())
    if package not in cmake.parents:
        return str(cmake)
    kept = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        unfinished = kept.with_name(f"{kept.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(package, unfinished)
        unfinished.rename(kept)
    return str(kept / cmake.relative_to(package))


def find_ninja() -> str:
    """The ninja of this environment: a cached path may point into one that was deleted."""
    path = shutil.which("ninja")
    if path is None or runs([path, "--version"]) is None:
        sys.exit("ninja: found none that runs; `pip install ninja`")
    return path


def check_call(command: list[str]) -> None:
    """Run a build step; its failure ends the build with the command that failed."""
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        sys.exit(
            f"building the CUDA library failed (exit {done.returncode}): {' '.join(command)}\n"
            "Set QSUN_CUDA=off to install without it."
        )


class PlatformDistribution(Distribution):
    """Every wheel is tagged with its platform: one without the library must not shadow one that has it."""

    def has_ext_modules(self) -> bool:
        return True


def build_tools() -> list[str]:
    """Build requirements that depend on the machine."""
    needs_cmake = plan_cuda().build and runs(["cmake", "--version"]) is None
    return ["cmake>=3.24"] if needs_cmake else []


bench_packages = ["qsun_bench", *(f"qsun_bench.{name}" for name in find_packages("bench"))]
setup(
    packages=[
        *find_packages(include=["qsun_kernels", "qsun_kernels.*"]),
        *find_packages("python", include=["qsun", "qsun.*"]),
        *bench_packages,
    ],
    package_dir={"qsun_kernels": "qsun_kernels", "qsun": "python/qsun", "qsun_bench": "bench"},
    package_data={"qsun_kernels": ["py.typed", "*.pyi"], "qsun": ["py.typed"], "qsun_bench": ["py.typed"]},
    ext_modules=[Extension("qsun_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildCuda},
    distclass=PlatformDistribution,
    setup_requires=build_tools(),
)
