"""What ptxas says about every kernel: no spills, no local memory, registers as planned."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
# CI builds for sm_90a and reads those reports; for sm_80 it compiles one source a family of kernels, the one
# that is shortest of registers. `make test-exhaustive` compiles the others.
SM80_IN_CI = {"tiles_bf16_d128", "codes_int4", "stream_bf16_b4", "rows_b4", "tiles_sm80_bf16_b4"}
REPORTS = [
    pytest.param(
        *(source, arch),
        marks=[pytest.mark.exhaustive] if arch == "80" and source.stem not in SM80_IN_CI else [],
        id=f"{source.stem}-{arch}",
    )
    for source in SOURCES
    for arch in ("80", "90a")
]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
COMMAND = [
    "-cubin",
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xptxas=-v",
    f"-I{ROOT}/csrc",
    f"-I{ROOT}/csrc/include",
]


def load_compiler_report():
    """csrc/compiler_report.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("compiler_report", ROOT / "csrc" / "compiler_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


compiler_report = load_compiler_report()


def report_of(source: Path, arch: str) -> str:
    """ptxas' text for a file and an architecture: from a build that is up to date, else compiled."""
    for kept in built(source, ".o.ptxas.txt"):
        sections = part_of_arch(kept.read_text(), arch)
        if sections:
            return sections
    return compiled_report(source, headers(), arch)


def built(source: Path, suffix: str) -> list[Path]:
    """What builds that are newer than every source kept of a file."""
    newest = max(path.stat().st_mtime for path in (source, *headers(), ROOT / "CMakeLists.txt"))
    place = f"CMakeFiles/qsun.dir/{source.relative_to(ROOT)}{suffix}"
    kept = (ROOT / "build").glob(f"cmake-*/{place}")
    return [path for path in kept if path.stat().st_mtime > newest]


def headers() -> list[Path]:
    """Of all of csrc: any of them may be included."""
    return [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h")]


def part_of_arch(text: str, arch: str) -> str:
    """The lines about one architecture: ptxas names it where a kernel's lines begin."""
    kept: list[str] = []
    wanted = False
    for line in text.splitlines(keepends=True):
        named = re.search(r"Compiling entry function .* for '(\S+)'", line)
        wanted = named[1] == f"sm_{arch}" if named else wanted
        if wanted:
            kept.append(line)
    return "".join(kept)


def compiled_report(source: Path, included: list[Path], arch: str) -> str:
    """The same by a compilation of its own, unless nothing has changed since the last one."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((COMMAND[:5], version, arch)).encode())
    for path in (source, *sorted(included)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    kept = ROOT / "build" / "compiler_report" / f"{source.stem}.{arch}.{digest.hexdigest()[:16]}.txt"
    if kept.exists():
        return kept.read_text()
    kept.parent.mkdir(parents=True, exist_ok=True)
    target = kept.with_suffix(f".{os.getpid()}.cubin")
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, *COMMAND, gencode, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    target.unlink()
    kept.write_text(done.stderr)
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDACXX or PATH)")
@pytest.mark.parametrize(("source", "arch"), REPORTS)
def test_the_compiler_report_of(source, arch) -> None:
    text = report_of(source, arch)
    kernels = compiler_report.parse(text)
    assert kernels, f"no kernel in the report of {source.name}:\n{text}"
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}"}
    assert compiler_report.breaches(kernels) == []
    assert "warning" not in text, text


def test_the_sources_that_ci_compiles_for_sm_80_are_there() -> None:
    assert {source.stem for source in SOURCES} >= SM80_IN_CI


def test_the_part_of_an_architecture_is_found() -> None:
    text = LINES.format(name="a_kernel", frame=0, spilled=0, registers=1)
    both = text + text.replace("sm_80", "sm_90a").replace("Used 1", "Used 2")
    assert [k.registers for k in compiler_report.parse(part_of_arch(both, "90a"))] == [2]
    assert [k.registers for k in compiler_report.parse(part_of_arch(both, "80"))] == [1]
    assert part_of_arch(both, "86") == ""


TRITON = importlib.util.find_spec("triton")
TRITON_TOOLS = "" if TRITON is None else f"{Path(TRITON.origin or '').parent}/backends/nvidia/bin"
OBJDUMP = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=TRITON_TOOLS)


def machine_code(compiled: Path, arch: str) -> str:
    """An object's disassembly for an architecture; empty where it has none for it."""
    command = [OBJDUMP, "-sass", "-arch", f"sm_{arch}", str(compiled)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass if f"arch = sm_{arch}\n" in sass else ""


def compiled_object(source: Path, arch: str, folder: Path) -> Path:
    compiled = folder / f"{source.stem}.o"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, "-c", *COMMAND[1:], gencode, str(source), "-o", str(compiled)]
    subprocess.run(command, check=True, capture_output=True)
    return compiled


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or OBJDUMP is None, reason="no nvcc or no cuobjdump")
@pytest.mark.parametrize(
    "instance",
    (
        "wna16/instances/stream_bf16_b4.cu",
        "wna16/instances/tiles_sm80_bf16_b4.cu",
        "attention/instances/tiles_bf16_d128.cu",
        "attention/instances/codes_int4.cu",
    ),
)
def test_shared_addresses_of_asynchronous_copies_have_no_uniform_part(instance, tmp_path) -> None:
    """ptxas 13.0 may add a uniform register to the shared address of LDGSTS, in an encoding that traps."""
    source = ROOT / "csrc" / instance
    # An object of a build without the architecture holds no code for it.
    code = (machine_code(path, "90a") for path in built(source, ".o"))
    sass = next(filter(None, code), None) or machine_code(compiled_object(source, "90a", tmp_path), "90a")
    copies = [line for line in sass.splitlines() if "LDGSTS" in line]
    assert copies, f"{instance} has no asynchronous copy: this test looks at the wrong thing"
    assert [line for line in copies if re.search(r"\[R\d+\+UR\d+", line)] == []


def test_every_kernel_has_a_bound_and_every_bound_a_kernel() -> None:
    declaration = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\(")
    defined = {
        name for path in (ROOT / "csrc").rglob("*.cu*") for name in declaration.findall(path.read_text())
    }
    assert defined == set(compiler_report.REGISTER_BOUNDS)


LINES = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    {frame} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem, 448 bytes cmem[0]
"""
MANGLED = (
    "_ZN4qsun44_GLOBAL__N__62eaf300_11_rms_norm_cu_47f79b1e15rms_norm_kernelIfLi4EEEvNS_13RmsNormParamsE"
)


@pytest.mark.parametrize(
    ("name", "frame", "spilled", "registers", "expected"),
    [
        (MANGLED, 0, 0, 30, None),
        (MANGLED, 8, 0, 30, "8 bytes of local memory"),
        (MANGLED, 0, 4, 30, "spills 4 bytes"),
        (MANGLED, 0, 0, 99, "99 registers; expected at most"),
        ("_ZN4qsun12other_kernelEv", 0, 0, 3, "other_kernel has no entry"),
    ],
)
def test_a_breach_of_the_report_is_caught(name, frame, spilled, registers, expected) -> None:
    text = LINES.format(name=name, frame=frame, spilled=spilled, registers=registers)
    kernels = compiler_report.parse(text)
    assert len(kernels) == 1 and kernels[0].registers == registers
    found = compiler_report.breaches(kernels)
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]


def test_the_name_is_found_in_a_mangled_one() -> None:
    assert compiler_report.parse(LINES.format(name=MANGLED, frame=0, spilled=0, registers=1))[0].name == (
        "rms_norm_kernel"
    )


def test_check_reads_what_record_kept(tmp_path, capsys) -> None:
    assert compiler_report.main(["check", str(tmp_path)]) == 1  # nothing to check is no success
    (tmp_path / "x.o.ptxas.txt").write_text(LINES.format(name=MANGLED, frame=0, spilled=0, registers=30))
    assert compiler_report.main(["check", str(tmp_path)]) == 0
    assert "1 kernels in 1 files, 0 breaches" in capsys.readouterr().out
    (tmp_path / "y.o.ptxas.txt").write_text(LINES.format(name=MANGLED, frame=0, spilled=4, registers=30))
    assert compiler_report.main(["check", str(tmp_path)]) == 1


def test_record_keeps_the_report_and_passes_the_rest_on(tmp_path, capfd) -> None:
    script = "import sys; sys.stderr.write('ptxas info : x\\nwarning: y\\n'); sys.exit(int(sys.argv[1]))"
    output = tmp_path / "x.o"
    command = ["record", "--", "python3", "-c", script]
    assert compiler_report.main([*command, "0", "-o", str(output)]) == 0
    assert (tmp_path / "x.o.ptxas.txt").read_text() == "ptxas info : x\n"
    assert capfd.readouterr().err == "warning: y\n"
    assert compiler_report.main([*command, "3", "-o", str(output)]) == 3
