"""Writes gemm_sm90_table.h from gemm_sm90_sweep.txt: for each matrix and number of tokens the fastest way.

    python csrc/wna16/gemm_sm90_table.py          write it
    python csrc/wna16/gemm_sm90_table.py --check  exit status 1 if it is not what would be written

A way that was measured with more tokens serves fewer as well, so an entry is the fastest of its own number of
tokens and of all larger ones: the time never falls when tokens are added.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SWEEP, TABLE = HERE / "gemm_sm90_sweep.txt", HERE / "gemm_sm90_table.h"

Matrix = tuple[int, int]
Way = tuple[int, int, int]


def fastest(sweep: str) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """(K, N), M -> (token_tile, warp_groups, split_k), microseconds."""
    times: dict[tuple[Matrix, int], list[tuple[float, Way]]] = {}
    for line in sweep.splitlines():
        if line.startswith("#"):
            continue
        K, N, M, bits, tile, groups, split = map(int, line.split()[:7])
        assert bits == 4, line
        times.setdefault(((K, N), M), []).append((float(line.split()[7]), (tile, groups, split)))
    found = {}
    for (matrix, M), _ in times.items():
        us, way = min(min(t) for (other, m), t in times.items() if other == matrix and m >= M)
        found[matrix, M] = (way, us)
    return found


def header(sweep: str) -> str:
    """The text of gemm_sm90_table.h."""
    rows = [
        f"    {{{K}, {N}, {M}, {tile}, {groups}, {split}}},  // {us:.1f} us"
        for ((K, N), M), ((tile, groups, split), us) in sorted(fastest(sweep).items())
    ]
    return "\n".join(
        [
            "// Written by gemm_sm90_table.py from gemm_sm90_sweep.txt: the fastest way measured on an H100.",
            "#pragma once",
            "",
            "namespace qsun {",
            "",
            "struct GemmMeasured {",
            "  int K, N, M;",
            "  int token_tile, warp_groups, split_k;",
            "};",
            "",
            "// clang-format off",
            "constexpr GemmMeasured kGemmMeasured[] = {",
            *rows,
            "};",
            "// clang-format on",
            "",
            "}  // namespace qsun",
            "",
        ]
    )


def main() -> int:
    text = header(SWEEP.read_text())
    if "--check" in sys.argv[1:]:
        return int(TABLE.read_text() != text)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
