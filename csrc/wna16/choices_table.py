"""Writes choices_table.h from the sweeps: the fastest way of each kernel for a matrix and a number of tokens.

    python csrc/wna16/choices_table.py          write it
    python csrc/wna16/choices_table.py --check  exit status 1 if it is not what would be written

A tile for many tokens serves fewer as well, in the same memory: an entry of gemm_sm90 and of tiles_sm80 is
the fastest of its own number of tokens and of all larger ones, so the time never falls when tokens are added.
A block of the streaming kernel takes less shared memory for fewer tokens, and so more of them come together:
what was measured holds for its own number alone.

KERNEL_sweep.txt is of W4, KERNEL_w2_sweep.txt of W2, and so on: times and ways are those of one width. Other
widths than W4 may be missing, or hold fewer matrices.

chain_sweep.txt, where it exists, holds the best way of each product of a decoder layer behind and before the
other products of the layer. What runs before a launch decides how much of its weight is read early, which
rows of one product do not show; so the chain's way counts for its matrix and number of tokens, where the call
tells that it is one of a layer's (in_layer). Its time is what the product adds to the chain. A product on its
own may take twice as long that way: its launches go by the sweeps.

The files are written by `qsun-bench tune wna16 --backend cuda`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "choices_table.h"
CHAIN = "chain_sweep.txt"
BITS = (2, 3, 4, 8)
MAIN_BITS = 4
"""The width whose sweeps hold every matrix, and that of the chain."""

# Of each kernel: what its way is made of, in the order of the sweep's columns.
WAYS = {
    "stream": ("token_tiles", "row_tiles", "warps", "stages", "copy_engine", "waves"),
    "gemm_sm90": ("token_tile", "warp_groups", "split_k", "stages", "in_cluster"),
    "tiles_sm80": ("token_tiles", "row_groups", "column_groups", "split_k", "stages"),
}
TYPES = {"stream": "StreamMeasured", "gemm_sm90": "GemmMeasured", "tiles_sm80": "TilesMeasured"}
IN_LAYERS = {"stream": "kStreamInLayers", "gemm_sm90": "kGemmInLayers"}
"""What the table calls the ways of kernels that layers are made of."""
SERVE_FEWER = ("gemm_sm90", "tiles_sm80")
"""Kernels whose tiles for many tokens serve fewer in the same memory."""

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


def sweep_name(kernel: str, bits: int = MAIN_BITS) -> str:
    """The file of a kernel's ways for weights of a width."""
    return f"{kernel}_sweep.txt" if bits == MAIN_BITS else f"{kernel}_w{bits}_sweep.txt"


def fastest_of(
    kernel: str, folder: Path = HERE, bits: int = MAIN_BITS
) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """fastest() of a kernel's own sweep; nothing without one."""
    path = folder / sweep_name(kernel, bits)
    return fastest(path.read_text(), serves_fewer=kernel in SERVE_FEWER) if path.exists() else {}


def in_chain(kernel: str, folder: Path = HERE) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """(K, N), M -> way, microseconds, of the products of a layer timed in the decode step.

    A line of the file: kernel K N M way us. Without the file nothing is known of chains.
    """
    path = folder / CHAIN
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    own = [line.removeprefix(kernel).strip() for line in lines if line.split()[:1] == [kernel]]
    return fastest("\n".join(own), serves_fewer=False)


def chosen(
    kernel: str, folder: Path = HERE, bits: int = MAIN_BITS
) -> dict[tuple[Matrix, int], tuple[Way, float]]:
    """What products of a layer go by: the chain's way where there is one, for so they are launched."""
    chain = in_chain(kernel, folder) if bits == MAIN_BITS else {}
    return {**fastest_of(kernel, folder, bits), **chain}


def rows(kernel: str, folder: Path, *, in_layers: bool) -> list[str]:
    ways = chosen if in_layers else fastest_of
    return [
        f"    {{{bits}, {K}, {N}, {M}, {us:.2f}f, {', '.join(map(str, way))}}},"
        for bits in BITS
        for ((K, N), M), (way, us) in sorted(ways(kernel, folder, bits).items())
    ]


def header(folder: Path = HERE) -> str:
    """The text of choices_table.h, from the files of `folder`."""
    lines = [
        "// Written by choices_table.py from the sweeps beside it: the fastest way of each kernel as",
        "// measured on an H100, and its microseconds.",
        "#pragma once",
        "",
        "#include <array>",
        "",
        "namespace qsun {",
    ]
    for kernel, fields in WAYS.items():
        lines += [
            "",
            f"struct {TYPES[kernel]} {{",
            "  int bits, K, N, M;",
            "  float us;",
            f"  int {', '.join(fields)};",
            "};",
        ]
        arrays = {f"k{TYPES[kernel]}": rows(kernel, folder, in_layers=False)}
        if kernel in IN_LAYERS:
            arrays[IN_LAYERS[kernel]] = rows(kernel, folder, in_layers=True)
        for name, measured in arrays.items():
            lines += [
                "",
                "// clang-format off",
                f"inline constexpr std::array<{TYPES[kernel]}, {len(measured)}> {name} = {{{{",
                *measured,
                "}};",
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
