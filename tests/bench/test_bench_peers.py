"""Other people's kernels: who says he cannot run what, and the layouts that are made for them here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from qsun_bench.cases.wna16 import Wna16Case
from qsun_bench.peers import _packages, bitsandbytes, gemlite, humming, machete, marlin
from qsun_kernels.quant import QuantSpec
from qsun_kernels.quant.packing import unpack_codes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PEERS = (bitsandbytes, gemlite, humming, machete, marlin)
GOOD = QuantSpec(4, 128, True)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that no kernel is run on, and none of the packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _packages.missing.cache_clear()
    _packages.missing_vllm.cache_clear()
    yield
    _packages.missing.cache_clear()
    _packages.missing_vllm.cache_clear()


def case(
    spec: QuantSpec = GOOD,
    N: int = 256,
    K: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
) -> Wna16Case:
    return Wna16Case("m", 1, N, K, spec, dtype, act_order)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.NAME)
def test_without_a_gpu_it_is_the_device(peer) -> None:  # type: ignore[no-untyped-def]
    assert peer.available(case(), CPU) == "a CUDA kernel, device is cpu"


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (bitsandbytes, "bitsandbytes is not installed"),
        (gemlite, "gemlite is not installed"),
        (humming, "humming is not installed"),
        (machete, "no vllm/_C_stable_libtorch.abi3.so on the path"),
        (marlin, "no vllm/_C_stable_libtorch.abi3.so on the path"),
    ],
    ids=lambda value: getattr(value, "NAME", None),
)
def test_without_its_package_it_is_the_package(peer, says: str, hopper: None) -> None:  # type: ignore[no-untyped-def]
    assert peer.available(case(), CUDA) == says


@pytest.mark.parametrize(
    ("peer", "problem", "says"),
    [
        (humming, case(dtype=torch.float32), "bfloat16 and float16 only, got torch.float32"),
        (humming, case(act_order=True), "no act-order"),
        (humming, case(QuantSpec(8, 128, False)), "zero points with up to 7 bits only"),
        (humming, case(N=100), "N must be a multiple of 64, got 100"),
        (gemlite, case(QuantSpec(3, 128, True)), "2 and 4 and 8 bits only, got 3"),
        (gemlite, case(QuantSpec(4, "channel", True)), "group sizes 32, 64, 128 only, got channel"),
        (machete, case(QuantSpec(4, 32, True)), "group sizes 64, 128, channel only, got 32"),
        (machete, case(N=192), "N must be a multiple of 128, got 192"),
        (marlin, case(QuantSpec(2, 128, True)), "4 and 8 bits only, got 2"),
        (marlin, case(QuantSpec(8, 128, False)), "zero points with 4 bits only, got 8"),
        (marlin, case(QuantSpec(4, 128, False), act_order=True), "zero points without act-order only"),
        (marlin, case(K=576), "K must be a multiple of the group size and of 128, got 576"),
        (bitsandbytes, case(QuantSpec(4, 128, False)), "no zero points"),
        (bitsandbytes, case(QuantSpec(4, 32, True)), "group sizes 64, 128 only, got 32"),
    ],
)
def test_what_a_format_cannot_hold_is_told_without_its_package(  # type: ignore[no-untyped-def]
    peer, problem: Wna16Case, says: str, hopper: None
) -> None:
    assert peer.available(problem, CUDA) == says


def test_an_older_gpu_is_told(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert machete.available(case(), CUDA) == "needs compute capability 9.0, cuda has 8.0"


def test_a_package_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open\nsecond line")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(importlib, "import_module", broken)
    _packages.missing.cache_clear()
    assert _packages.missing("gemlite.core") == (
        "gemlite.core does not import (OSError: libcudart.so.12: cannot open"
    )
    _packages.missing.cache_clear()


def test_vllm_numbers_its_types() -> None:
    """As its `scalar_types` prints them: uint4b8, uint8b128, uint4."""
    assert _packages.vllm_scalar_type(4, 8) == 1125899907892224
    assert _packages.vllm_scalar_type(8, 128) == 1125899923621888
    assert _packages.vllm_scalar_type(4, 0) == 1125899906843648


def test_marlin_scales_in_the_order_of_its_lanes() -> None:
    """The permutations as the formats that Marlin reads define them, one index at a time."""
    scales = torch.randn(128, 3)
    tiled = marlin._tile_scales(scales, one_a_row=False)
    for group in range(3):
        for place in range(128):
            i, j = place % 64 // 8, place % 8
            assert tiled[group, place] == scales[place // 64 * 64 + i + 8 * j, group]
    single = marlin._tile_scales(scales[:, :1].contiguous(), one_a_row=True)
    for place in range(128):
        i, j = place % 32 // 8, place % 8
        column = 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]
        assert single[0, place] == scales[place // 32 * 32 + column, 0]


def test_marlin_zero_points_are_tiled_and_interleaved() -> None:
    zeros = torch.randint(0, 16, (128, 3), dtype=torch.uint8)
    packed = marlin._tile_zeros(zeros)
    assert packed.dtype == torch.int32 and packed.shape == (3, 16)
    tiled = marlin._tile_scales(zeros, one_a_row=False)
    expected = tiled.reshape(3, 16, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(3, 128)
    assert torch.equal(unpack_codes(packed, 4, 128), expected)


def test_columns_in_the_order_of_their_groups() -> None:
    operands = case(act_order=True).operands(CPU)
    order, groups = _packages.sorted_columns(operands)
    assert order.dtype == groups.dtype == torch.int32
    assert torch.equal(groups, torch.arange(512, dtype=torch.int32) // 128)
    assert torch.equal(operands.weight.column_groups()[order.long()].int(), groups)


def test_humming_compiles_only_what_the_cases_meet() -> None:
    intervals = [[0, 8, {"a": 1}], [8, 16, {"a": 2}], [16, 24, {"a": 3}], [24, 1 << 30, {"a": 4}]]
    kept = json.loads(humming._covering(intervals, (1, 8, 17)))
    assert kept == [intervals[0], intervals[2]]


def test_gemlite_runs_what_it_has_a_configuration_for(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(
        DType=SimpleNamespace(FP16=SimpleNamespace(value=1)),
        get_matmul_type=lambda M, bits: "GEMV_REVSPLITK" if M <= 4 else "GEMM_SPLITK",
        GEMLITE_TRITON_CONFIG_CACHE={
            "GEMV_REVSPLITK": {"(1, 4096, 4096, 128, 8, 104)": {}},
            "GEMM_SPLITK": {"(2, 4096, 4096, 128, 8, 104)": {}, "(32, 4096, 4096, 128, 8, 104)": {}},
        },
    )
    utils = SimpleNamespace(get_closest_m=lambda M: 1 << (M - 1).bit_length())
    monkeypatch.setattr(_packages, "load", lambda name: core if name == "gemlite.core" else utils)
    assert gemlite._kernel(1, 4096, 4096, 4, 128) == "GEMV_REVSPLITK"
    assert gemlite._kernel(2, 4096, 4096, 4, 128) == "GEMM_SPLITK"
    assert gemlite._kernel(17, 4096, 4096, 4, 128) == "GEMM_SPLITK"
    assert gemlite._kernel(8, 4096, 4096, 4, 128) is None
    assert gemlite._kernel(1, 4096, 4096, 4, 64) is None
