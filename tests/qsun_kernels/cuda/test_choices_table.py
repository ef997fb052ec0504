"""The table that kernel choices come from: made from the sweeps, and read as it should be."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
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
TOKENS = {"stream": 5, "gemm_sm90": 9}  # numbers of them that were measured


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
    for kernel in TOKENS:
        name = f"{kernel}_sweep.txt"
        (tmp_path / name).write_text((FOLDER / name).read_text())
    assert table.fastest_of("tiles_sm80", tmp_path) == {}
    assert "std::array<TilesMeasured, 0> kTilesMeasured" in table.header(tmp_path)
    sweep = "# x\n64 64 32 4 2 2 1 6 5.0\n64 64 32 4 1 4 1 6 4.5\n64 64 64 8 2 2 1 3 6.0\n"
    (tmp_path / "tiles_sm80_sweep.txt").write_text(sweep)
    text = table.header(tmp_path)
    assert "std::array<TilesMeasured, 2> kTilesMeasured" in text
    assert "{64, 64, 32, 4.50f, 4, 1, 4, 1, 6},\n    {64, 64, 64, 6.00f, 8, 2, 2, 1, 3},\n}};" in text


def test_choices_on_an_h100(extension, table) -> None:
    """The faster kernel launched the measured way where one was measured, something that fits everywhere."""
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(**H100)

    def chosen(M: int, N: int, K: int) -> str:
        return extension.describe_wna16_panels(M, N, K, 4, 1, False, False, props)

    gemm, stream = (table.chosen(kernel) for kernel in ("gemm_sm90", "stream"))
    for ((K, N), M), ((tile, groups, split, stages, in_cluster), us) in gemm.items():
        if us < stream.get(((K, N), M), ((), float("inf")))[1]:
            assert chosen(M, N, K) == (
                f"gemm_sm90 token_tile={tile} warp_groups={groups} split_k={split} stages={stages} "
                f"adds_in_cluster={'yes' if in_cluster else 'no'}"
            )
    streamed = 0
    for ((K, N), M), ((token_tiles, row_tiles, warps, stages, engine, _), us) in stream.items():
        # The kernel for many tokens was measured from 16 on.
        if us < min(
            time for ((matrix, tokens), (_, time)) in gemm.items() if matrix == (K, N) and tokens >= M
        ):
            streamed += 1
            assert re.match(
                rf"stream token_tiles={token_tiles} row_tiles={row_tiles} row_blocks=\d+ warps={warps} "
                rf"stages={stages} copy_engine={'yes' if engine else 'no'} ",
                chosen(M, N, K),
            ), chosen(M, N, K)
    assert streamed > len(MATRICES)
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
    for (K, N), M in table.chosen("gemm_sm90"):
        measured = extension.choose_wna16_gemm(M, N, K, 4, 1, False, props)
        for bits, groups, zeros in ((2, 1, False), (3, 4, True), (4, 4, True), (8, 1, False), (8, 4, True)):
            config = extension.choose_wna16_gemm(M, N, K, bits, groups, zeros, props)
            same = ("token_tile", "warp_groups", "split_k", "adds_in_cluster")
            assert all(getattr(config, name) == getattr(measured, name) for name in same)
            assert 2 <= config.stages <= 8 or config.split_k >= -(-K // 128)
            size = extension.wna16_panels_shared_bytes(M, N, K, bits, groups, zeros, config)
            own = extension.wna16_panels_shared_bytes(M, N, K, 4, 1, False, measured)
            room, tile = H100["shared_memory_per_block"] + 1024, config.token_tile
            of_registers = 1 if tile > 96 or config.warp_groups > 2 else 2 if tile > 32 else 3
            assert room // (size + 1024) >= min(room // (own + 1024), of_registers)
            assert bits > 2 or config.stages <= measured.stages
