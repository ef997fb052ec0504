"""The table that kernel choices come from: made from the sweeps, and read as it should be."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "csrc" / "wna16"
MATRICES = (
    (4096, 4096),
    (4096, 6144),
    (4096, 28672),
    (14336, 4096),
    (8192, 10240),
    (8192, 57344),
    (28672, 8192),
)
H100 = {
    "compute_major": 9,
    "compute_minor": 0,
    "sm_count": 132,
    "shared_memory_per_block": 232448,
    "l2_bytes": 50 << 20,
}
TOKENS = {"stream": 5, "gemm_sm90": 9, "tiles_sm80": 2}  # numbers of them that were measured


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choices_table", FOLDER / "choices_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_header_is_what_the_sweeps_make() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "choices_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python csrc/wna16/choices_table.py"


@pytest.mark.parametrize("kernel", TOKENS)
def test_the_sweeps_are_whole(table, kernel) -> None:
    found = table.fastest_of(kernel)
    assert {matrix for matrix, _ in found} == set(MATRICES)
    for matrix in MATRICES:
        times = [us for (_, _), (_, us) in sorted(item for item in found.items() if item[0][0] == matrix)]
        assert len(times) == TOKENS[kernel]
        assert kernel == "stream" or times == sorted(times), "the time falls when tokens are added"


def test_the_fastest_of_more_tokens_serves_fewer(table) -> None:
    sweep = "# x\n64 64 16 16 2 1 5.0\n64 64 32 32 2 2 4.0\n64 64 32 32 2 1 4.5\n"
    own = {((64, 64), 16): ((16, 2, 1), 5.0), ((64, 64), 32): ((32, 2, 2), 4.0)}
    assert table.fastest(sweep, serves_fewer=False) == own
    shared = {**own, ((64, 64), 16): ((32, 2, 2), 4.0)}
    assert table.fastest(sweep, serves_fewer=True) == shared


def test_tiles_before_sm_90_are_in_the_table_once_they_are_measured(table, tmp_path) -> None:
    for kernel in ("stream", "gemm_sm90"):
        name = f"{kernel}_sweep.txt"
        (tmp_path / name).write_text((FOLDER / name).read_text())
    assert table.fastest_of("tiles_sm80", tmp_path) == {}
    assert "std::array<TilesMeasured, 0> kTilesMeasured" in table.header(tmp_path)
    sweep = "# x\n64 64 32 4 2 2 1 6 5.0\n64 64 32 4 1 4 1 6 4.5\n64 64 64 8 2 2 1 3 6.0\n"
    (tmp_path / "tiles_sm80_sweep.txt").write_text(sweep)
    text = table.header(tmp_path)
    assert "std::array<TilesMeasured, 2> kTilesMeasured" in text
    assert "{4, 64, 64, 32, 4.50f, 4, 1, 4, 1, 6},\n    {4, 64, 64, 64, 6.00f, 8, 2, 2, 1, 3},\n}};" in text


SWEEPS = {
    "stream_sweep.txt": "1024 1024 1 1 2 8 2 1 0 4.0\n1024 1024 16 2 2 8 2 1 0 9.0\n"
    "1024 4096 1 1 2 8 3 1 0 5.0\n1024 4096 16 2 2 8 3 1 0 9.0\n",
    "stream_w2_sweep.txt": "1024 1024 1 1 2 8 6 1 0 2.0\n1024 1024 16 1 2 8 6 1 0 5.0\n"
    "4096 4096 16 1 2 8 7 1 0 3.0\n",
    "stream_w3_sweep.txt": "1024 1024 16 1 2 8 5 1 0 1.0\n",
    "gemm_sm90_sweep.txt": "1024 1024 16 16 1 1 4 0 8.0\n1024 1024 64 64 1 1 4 0 8.5\n"
    "1024 4096 16 16 1 2 4 0 10.0\n",
    "gemm_sm90_w2_sweep.txt": "1024 1024 16 16 1 3 4 0 6.0\n2500 4096 16 16 1 5 4 0 1.0\n",
}
"""W4 of two matrices, W2 of the first of them and of one other with each kernel, W3 streamed at 16 tokens."""

PROGRAM = """
#include <iostream>
#include "wna16/choices.h"
using namespace qsun;
template <typename Entry>
void print(const Entry* entry, int second) {
  if (entry == nullptr) return void(std::cout << "none ");
  std::cout << entry->bits << "," << entry->K << "," << entry->N << "," << entry->M << "," << second << " ";
}
int main() {
  Wna16PanelsParams p;
  while (std::cin >> p.bits >> p.K >> p.N >> p.M) {
    const StreamMeasured* stream = most_similar(kStreamMeasured, p);
    const GemmMeasured* gemm = most_similar(kGemmMeasured, p);
    print(stream, stream == nullptr ? 0 : stream->stages);
    print(gemm, gemm == nullptr ? 0 : gemm->split_k);
    std::cout << (gemm_is_faster(kStreamMeasured, kGemmMeasured, p) ? "gemm" : "stream") << "\\n";
  }
}
"""


def similar(table: ModuleType, folder: Path, problems: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """What csrc/wna16/choices.h picks for problems (bits, K, N, M) from the sweeps of a folder: the entry of
    the streaming kernel with its stages, that of the kernel for many tokens with its split, the faster one.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "wna16").mkdir()
    (folder / "wna16" / "choices_table.h").write_text(table.header(folder))
    (folder / "similar.cpp").write_text(PROGRAM)
    root = FOLDER.parent
    headers = [f"-I{path}" for path in (folder, root, root / "include")]
    built = str(folder / "similar")
    subprocess.run(["g++", "-std=c++17", *headers, str(folder / "similar.cpp"), "-o", built], check=True)
    said = "\n".join(" ".join(map(str, problem)) for problem in problems)
    done = subprocess.run([built], input=said, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_a_width_takes_its_own_entries_or_those_of_w4(table, tmp_path) -> None:
    for name, text in SWEEPS.items():
        (tmp_path / name).write_text(text)
    header = table.header(tmp_path)
    assert "    {2, 4096, 4096, 16, 3.00f, 1, 2, 8, 7, 1, 0},\n    {3, 1024, 1024, 16, 1.00f," in header
    streamed, many = "4,1024,1024,1,2", "4,1024,1024,16,1"
    expected = {
        (4, 1024, 1024, 1): [streamed, many, "stream"],
        (8, 1024, 1024, 1): [streamed, many, "stream"],  # measured with neither kernel
        (2, 1024, 1024, 1): ["2,1024,1024,1,6", "2,1024,1024,16,3", "stream"],
        (2, 1024, 1500, 3): ["2,1024,1024,16,6", "2,1024,1024,16,3", "stream"],
        # Another width counts like a factor of two, and the middle of two matrices is where both are as far.
        (2, 1024, 4096, 1): ["4,1024,4096,1,3", "4,1024,4096,16,2", "stream"],
        (2, 1024, 2800, 1): ["2,1024,1024,1,6", "2,1024,1024,16,3", "stream"],
        (2, 1024, 2900, 1): ["4,1024,4096,1,3", "4,1024,4096,16,2", "stream"],
        # Behind the last number of tokens of its own width
        (2, 1024, 1024, 17): ["none", "4,1024,1024,64,1", "gemm"],
        # By W4's times the kernel for many tokens is faster with 16; W3's of one kernel are no argument.
        (4, 1024, 1024, 16): ["4,1024,1024,16,2", many, "gemm"],
        (2, 1024, 1024, 16): ["2,1024,1024,16,6", "2,1024,1024,16,3", "stream"],
        (3, 1024, 1024, 16): ["3,1024,1024,16,5", many, "gemm"],
        (3, 1024, 4096, 16): ["4,1024,4096,16,3", "4,1024,4096,16,2", "stream"],
        # Nor are times of two matrices, though both are of the width.
        (2, 3200, 4096, 16): ["2,4096,4096,16,7", "2,2500,4096,16,5", "stream"],
        (4, 1024, 1024, 65): ["none", "none", "gemm"],
    }
    assert dict(zip(expected, similar(table, tmp_path, list(expected)), strict=True)) == expected


@pytest.mark.parametrize("in_layer", (False, True), ids=("alone", "in a layer"))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_choices_on_an_h100(extension, table, bits, in_layer) -> None:
    """The faster kernel launched the measured way where one was measured, something that fits everywhere.

    Up to 16 tokens alone by the sweeps, in a layer by what was measured there.
    """
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(**H100)

    def chosen(M: int, N: int, K: int) -> str:
        return extension.describe_wna16_panels(M, N, K, bits, 1, False, False, props, in_layer)

    ways = table.chosen if in_layer else table.fastest_of
    gemm, stream = (ways(kernel, bits=bits) for kernel in ("gemm_sm90", "stream"))
    four = {kernel: ways(kernel) for kernel in ("gemm_sm90", "stream")}
    all_gemm = gemm

    def times(K: int, N: int, M: int) -> tuple[float, float]:
        """Of the streaming kernel and the one for many tokens, of the same width."""
        is_own = all((K, N) in {matrix for matrix, _ in own} for own in (stream, all_gemm))
        both = (stream, all_gemm) if is_own else (four["stream"], four["gemm_sm90"])
        of_stream, of_gemm = (
            [us for ((matrix, tokens), (_, us)) in sorted(own.items()) if matrix == (K, N) and tokens >= M]
            for own in both
        )
        return (of_stream or [float("inf")])[0], of_gemm[0]

    if not in_layer:  # others are as in a layer
        gemm = {key: entry for key, entry in gemm.items() if key[1] <= 16}
    for ((K, N), M), ((tile, groups, split, stages, in_cluster), _) in gemm.items():
        if times(K, N, M)[0] > times(K, N, M)[1]:
            assert chosen(M, N, K) == (
                f"gemm_sm90 token_tile={tile} warp_groups={groups} split_k={split} stages={stages} "
                f"adds_in_cluster={'yes' if in_cluster else 'no'}"
            )
    streamed = 0
    for ((K, N), M), ((token_tiles, row_tiles, warps, stages, engine, _), _) in stream.items():
        if times(K, N, M)[0] <= times(K, N, M)[1]:
            streamed += 1
            assert re.match(
                rf"stream token_tiles={token_tiles} row_tiles={row_tiles} row_blocks=\d+ warps={warps} "
                rf"stages={stages} copy_engine={'yes' if engine else 'no'} ",
                chosen(M, N, K),
            ), chosen(M, N, K)
    assert streamed > len(MATRICES) or bits != 4
    for M in (8, 9, 12, 16, 64):
        assert all(chosen(M, N, K).startswith(("stream ", "gemm_sm90 ")) for K, N in MATRICES)
    for N, K in ((16, 128), (77, 100), (576, 576), (1536, 576), (152064, 5120), (100, 100_000)):
        for M in (17, 64, 100, 257, 5000):
            if not chosen(M, N, K).startswith("gemm_sm90"):
                assert K % 8
                continue
            split = int(re.search(r"split_k=(\d+)", chosen(M, N, K))[1])
            stages = int(re.search(r"stages=(\d+)", chosen(M, N, K))[1])
            assert 1 <= split <= -(-K // 128) and 1 <= stages <= 8


@pytest.mark.parametrize("bits", (4, 8))
def test_choices_before_sm_90(extension, table, bits) -> None:
    """The measured way on as many multiprocessors as were measured, whatever was measured on others."""
    entries = table.chosen("tiles_sm80", bits=bits)
    if not entries:
        pytest.skip(f"W{bits} was not measured")
    own = {"compute_major": 8, "shared_memory_per_block": 163 << 10}
    measured, others = (extension.DeviceProps(**{**H100, **own, "sm_count": count}) for count in (132, 108))
    same = 0
    for ((K, N), M), (way, _) in entries.items():
        names = ("token_tiles", "row_groups", "column_groups", "split_k", "stages")
        said = " ".join(f"{name}={value}" for name, value in zip(names, way, strict=True))
        wanted = f"tiles_sm80 {said} overlaps_producer=no"
        assert extension.describe_wna16_panels(M, N, K, bits, 1, False, False, measured) == wanted
        same += extension.describe_wna16_panels(M, N, K, bits, 1, False, False, others) == wanted
    assert same < len(entries)


def test_scratch_is_asked_for_where_columns_are_split(extension) -> None:
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(**H100)
    for N, K in ((4096, 4096), (77, 4096), (57344, 8192), (28672, 4096)):
        for M in (0, 1, 64, 300):
            text = extension.describe_wna16_panels(M, N, K, 4, 1, False, False, props) if M else ""
            split = int(re.search(r"split_k=(\d+)", text)[1]) if "split_k" in text else 1
            rows = -(-N // 64) * 64
            needed = extension.wna16_panels_scratch_bytes(M, N, K, 4, 1, False, False, props)
            leaves_sums = split > 1 and "adds_in_cluster=no" in text
            assert needed == (split * M * rows * 4 if leaves_sums else 0)


def test_stages_of_other_formats_leave_the_room_that_the_measured_ones_did(extension, table) -> None:
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(**H100)
    formats = ((2, 1, False), (2, 4, True), (3, 4, True), (4, 4, True), (8, 1, False), (8, 4, True))
    for (K, N), M in table.chosen("gemm_sm90"):
        for bits, groups, zeros in formats:
            # The width with whose entry it is launched
            is_own = any(
                matrix == (K, N) and tokens >= M for matrix, tokens in table.chosen("gemm_sm90", bits=bits)
            )
            own_bits = bits if is_own else 4
            measured = extension.choose_wna16_gemm(M, N, K, own_bits, 1, False, props)
            config = extension.choose_wna16_gemm(M, N, K, bits, groups, zeros, props)
            same = ("token_tile", "warp_groups", "split_k", "adds_in_cluster")
            assert all(getattr(config, name) == getattr(measured, name) for name in same)
            assert 2 <= config.stages <= 8 or config.split_k >= -(-K // 128)
            size = extension.wna16_panels_shared_bytes(M, N, K, bits, groups, zeros, config)
            own = extension.wna16_panels_shared_bytes(M, N, K, own_bits, 1, False, measured)
            room, tile = H100["shared_memory_per_block"] + 1024, config.token_tile
            of_registers = 1 if tile > 96 or config.warp_groups > 2 else 2 if tile > 32 else 3
            assert room // (size + 1024) >= min(room // (own + 1024), of_registers)
            assert (bits, groups) != (2, 1) or config.stages <= measured.stages
