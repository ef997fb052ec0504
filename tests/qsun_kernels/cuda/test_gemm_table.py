"""The table that kernel choices for many tokens come from: made from the sweep, and read as it should be."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

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


def load_table():
    spec = importlib.util.spec_from_file_location("gemm_sm90_table", FOLDER / "gemm_sm90_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_header_is_what_the_sweep_makes() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "gemm_sm90_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python csrc/wna16/gemm_sm90_table.py"


def test_times_never_fall_when_tokens_are_added() -> None:
    table = load_table()
    found = table.fastest((FOLDER / "gemm_sm90_sweep.txt").read_text())
    assert {matrix for matrix, _ in found} == set(MATRICES)
    for matrix in MATRICES:
        times = [us for (_, _), (_, us) in sorted(item for item in found.items() if item[0][0] == matrix)]
        assert len(times) == 9 and times == sorted(times)


def test_the_fastest_of_more_tokens_serves_fewer() -> None:
    table = load_table()
    sweep = "# x\n64 64 16 4 16 2 1 5.0\n64 64 32 4 32 2 2 4.0\n64 64 32 4 32 2 1 4.5\n"
    assert table.fastest(sweep) == {((64, 64), 16): ((32, 2, 2), 4.0), ((64, 64), 32): ((32, 2, 2), 4.0)}


def test_choices_on_an_h100(extension) -> None:
    """The measured way where one was measured, something that fits everywhere."""
    if "90a" not in extension.build_info()["archs"]:
        return
    props = extension.DeviceProps(**H100)

    def chosen(M: int, N: int, K: int) -> str:
        return extension.describe_wna16_panels(M, N, K, 4, 1, False, False, props)

    table = load_table().fastest((FOLDER / "gemm_sm90_sweep.txt").read_text())
    for ((K, N), M), ((tile, groups, split), _) in table.items():
        assert re.match(
            rf"gemm_sm90 token_tile={tile} warp_groups={groups} split_k={split} ", chosen(M, N, K)
        ), chosen(M, N, K)
    for N, K in ((16, 128), (77, 100), (576, 576), (1536, 576), (152064, 5120), (100, 100_000)):
        for M in (9, 64, 100, 257, 5000):
            split = int(re.search(r"split_k=(\d+)", chosen(M, N, K))[1])
            stages = int(re.search(r"stages=(\d+)", chosen(M, N, K))[1])
            assert 1 <= split <= -(-K // 128) and 1 <= stages <= 8
    assert chosen(8, 4096, 4096).startswith("stream ")
