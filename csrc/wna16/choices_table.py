"""Writes choices_table.h from the sweeps: the fastest way of each kernel for a matrix and a number of tokens.

    python csrc/wna16/choices_table.py          write it
    python csrc/wna16/choices_table.py --check  exit status 1 if it is not what would be written

A tile for many tokens serves fewer as well, in the same memory: an entry of gemm_sm90 is the fastest of its
own number of tokens and of all larger ones, so the time never falls when tokens are added. A block of the
streaming kernel takes less shared memory for fewer tokens, and so more of them come together: what was
measured holds for its own number alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "choices_table.h"
# Of each kernel: what its way is made of, in the order of the sweep's columns.
WAYS = {
    "stream": ("token_tiles", "row_tiles", "warps", "stages", "copy_engine", "waves"),
    "gemm_sm90": ("token_tile", "warp_groups", "split_k"),
}
TYPES = {"stream": "StreamMeasured", "gemm_sm90": "GemmMeasured"}

Matrix = tuple[int, int]
Way = tuple[int, ...]


def fastest(sweep: str, *, serves_fewer: bool) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """(K, N), M -> way, microseconds. A line of the sweep: K N M way us.

    serves_fewer: a way measured with more tokens counts as well.
    """
    times: dict[tuple[Matrix, int], list[tuple[float, Way]]] = {}
    for line in sweep.splitlines():
        if line.startswith("#"):
            continue
        *sizes, us = line.split()
        K, N, M, *way = map(int, sizes)
        times.setdefault(((K, N), M), []).append((float(us), tuple(way)))
    found = {}
    for (matrix, M), _ in times.items():
        us, way = min(
            min(t)
            for (other, m), t in times.items()
            if other == matrix and (m == M or (serves_fewer and m > M))
        )
        found[matrix, M] = (way, us)
    return found


def fastest_of(kernel: str) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """fastest() of a kernel's own sweep."""
    return fastest((HERE / f"{kernel}_sweep.txt").read_text(), serves_fewer=kernel == "gemm_sm90")


def rows(kernel: str) -> list[str]:
    return [
        f"    {{{K}, {N}, {M}, {us:.2f}f, {', '.join(map(str, way))}}},"
        for ((K, N), M), (way, us) in sorted(fastest_of(kernel).items())
    ]


def header() -> str:
    """The text of choices_table.h."""
    lines = [
        "// Written by choices_table.py from stream_sweep.txt and gemm_sm90_sweep.txt: the fastest way of",
        "// each kernel as measured on an H100, and its microseconds.",
        "#pragma once",
        "",
        "namespace qsun {",
    ]
    for kernel, fields in WAYS.items():
        lines += [
            "",
            f"struct {TYPES[kernel]} {{",
            "  int K, N, M;",
            "  float us;",
            f"  int {', '.join(fields)};",
            "};",
            "",
            "// clang-format off",
            f"constexpr {TYPES[kernel]} k{TYPES[kernel]}[] = {{",
            *rows(kernel),
            "};",
            "// clang-format on",
        ]
    return "\n".join([*lines, "", "}  // namespace qsun", ""])


def main() -> int:
    text = header()
    if "--check" in sys.argv[1:]:
        return int(TABLE.read_text() != text)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
