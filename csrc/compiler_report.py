"""Keeps and checks what ptxas says about every kernel: registers, spills, stack frame, shared memory.

    python csrc/compiler_report.py record -- nvcc ... -o x.o     compile, keep the report in x.o.ptxas.txt
    python csrc/compiler_report.py check FOLDER                  check every report under FOLDER

A kernel that spills, or keeps an array in local memory because an index was not a compile-time constant,
still computes the right thing, several times slower: only this report tells.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["REGISTER_BOUNDS", "KernelReport", "breaches", "parse", "register_bound"]

REGISTER_BOUNDS = {
    "wna16_rows_kernel": 152,
    "wna16_stream_kernel": 255,
    "wna16_gemm_sm90_kernel": 168,
    "wna16_tiles_sm80_kernel": 255,
    "wna16_add_parts_kernel": 88,
    "wna16_norm_parts_kernel": 176,
    "gather_columns_kernel": 40,
    "dequantize_kernel": 40,
    "paged_attention_plan_kernel": 56,
    "paged_attention_order_kernel": 40,
    "paged_attention_compare_kernel": 40,
    "paged_attention_group_kernel": 64,
    "paged_attention_tiles_kernel": 255,
    "paged_attention_codes_kernel": 255,
    "paged_attention_split_kernel": 255,
    "paged_attention_combine_kernel": 48,
    "write_kv_cache_kernel": 40,
    "write_kv_heads_kernel": 72,
    "write_kv_sums_kernel": 112,
    "rms_norm_kernel": 56,
    "silu_and_mul_kernel": 40,
    "apply_rope_kernel": 48,
    "sample_tokens_kernel": 64,
}
"""Registers a thread may take, by kernel: what its occupancy was planned with, read off and rounded up."""

REPORT_SUFFIX = ".ptxas.txt"


@dataclass(frozen=True)
class KernelReport:
    """What ptxas reported of one kernel for one architecture; sizes in bytes."""

    kernel: str
    arch: str
    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int

    @property
    def name(self) -> str:
        """The kernel's own name, template arguments and namespaces left out of the mangled one."""
        parts = mangled_names(self.kernel)
        return next((part for part in parts if part.endswith("_kernel")), self.kernel)


def mangled_names(symbol: str) -> list[str]:
    """The identifiers in an Itanium-mangled symbol: each is written as its length, then itself."""
    names, at = [], 0
    while at < len(symbol):
        digits = re.match(r"\d+", symbol[at:])
        if digits is None:
            at += 1
            continue
        start = at + digits.end()
        length = int(digits.group())
        names.append(symbol[start : start + length])
        at = start + length
    return names


_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\S+)'")
_STACK = re.compile(
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")


def parse(report: str) -> list[KernelReport]:
    """The kernels in the text that `nvcc -Xptxas -v` prints."""
    found: list[KernelReport] = []
    entry: re.Match[str] | None = None
    stack: re.Match[str] | None = None
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            entry, stack = match, None
        elif entry is not None and stack is None and (match := _STACK.search(line)):
            stack = match
        elif entry is not None and stack is not None and (match := _USED.search(line)):
            numbers = (int(stack[group]) for group in ("frame", "stores", "loads"))
            found.append(KernelReport(entry["kernel"], entry["arch"], int(match["registers"]), *numbers))
            entry = stack = None
    return found


def register_bound(name: str) -> int | None:
    """The bound of the kernel called `name`; None for a kernel nobody gave one."""
    return REGISTER_BOUNDS.get(name)


def breaches(kernels: Iterable[KernelReport]) -> list[str]:
    """One line for every kernel that spills, uses local memory, or exceeds its register bound."""
    found = []
    for kernel in kernels:
        where = f"{kernel.kernel} for {kernel.arch}"
        if kernel.spill_stores or kernel.spill_loads:
            found.append(
                f"{where}: spills {kernel.spill_stores} bytes, reloads {kernel.spill_loads}; expected none"
            )
        if kernel.stack_frame:
            found.append(f"{where}: {kernel.stack_frame} bytes of local memory; expected none")
        bound = register_bound(kernel.name)
        if bound is None:
            found.append(f"{where}: {kernel.name} has no entry in REGISTER_BOUNDS of {Path(__file__).name}")
        elif kernel.registers > bound:
            found.append(f"{where}: {kernel.registers} registers; expected at most {bound}")
    return found


def record(command: Sequence[str]) -> int:
    """Run a compiler command; keep ptxas' lines beside its output file and pass every other line on."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)
    kept = [line for line in done.stderr.splitlines() if is_report_line(line)]
    sys.stderr.writelines(f"{line}\n" for line in done.stderr.splitlines() if not is_report_line(line))
    if done.returncode == 0 and "-o" in command:
        output = Path(command[command.index("-o") + 1])
        output.with_name(output.name + REPORT_SUFFIX).write_text("\n".join(kept) + "\n")
    return done.returncode


def is_report_line(line: str) -> bool:
    """Whether ptxas -v printed it (warnings of ptxas are none of these)."""
    return line.startswith("ptxas info") or _STACK.search(line) is not None


def main(arguments: Sequence[str]) -> int:
    """See the module's text. Exit status 1 when a kernel breaks a bound, 2 for a wrong call."""
    if len(arguments) > 2 and arguments[:2] == ["record", "--"]:
        return record(arguments[2:])
    if len(arguments) == 2 and arguments[0] == "check":
        files = sorted(Path(arguments[1]).rglob("*" + REPORT_SUFFIX))
        kernels = [kernel for file in files for kernel in parse(file.read_text())]
        found = breaches(kernels)
        print(*found, f"{len(kernels)} kernels in {len(files)} files, {len(found)} breaches", sep="\n")
        return 1 if found or not kernels else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
