"""Ways to launch the CUDA matmuls on panel weights: which are listed, and what the library makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from qsun_bench import panel_ways
from qsun_bench.panel_ways import Cell, Kernel, Machine, Way

TILES = (
    (16, 1),
    (32, 1),
    (16, 2),
    (32, 2),
    (48, 2),
    (64, 2),
    (96, 2),
    (128, 2),
    (128, 3),
    (128, 4),
    (256, 2),
)


def shared_bytes(kernel: Kernel, cell: Cell, way: Way) -> int:
    """What the library says: stages of codes and of x, or the sums, and barriers. For the streaming kernel
    about that.
    """
    if kernel == "gemm_sm90":
        token_tile, warp_groups, _, stages, _ = way
        ring = stages * (token_tile * 256 + warp_groups * (1024 * cell.bits + 128))
        return max(ring, warp_groups * token_tile * 68 * 4) + 16 * stages
    if kernel == "tiles_sm80":
        token_tiles, row_groups, column_groups, _, stages = way
        stage = column_groups // 2 * (row_groups * (1024 * cell.bits + 128) + token_tiles * 8 * 272)
        return max(stages * stage, column_groups * token_tiles * 8 * (row_groups * 64 + 4) * 4)
    token_tiles, row_tiles, warps, stages, *_ = way
    tile_bytes = 256 * cell.bits + 32
    return int(warps * stages * (row_tiles * tile_bytes + min(cell.M, 8 * token_tiles) * 272))


MACHINE = Machine(132, 227 << 10, TILES, shared_bytes, lambda cell: (4, 2, 2, 1, 2))
WEIGHTS = ((4096, 4096), (8192, 57344), (576, 1536))


@pytest.fixture
def extension() -> Any:
    """The binding, where it is built."""
    return pytest.importorskip("qsun_kernels._C")


def machine_of(extension: Any, sm_count: int) -> Machine:
    """An H100 with so many multiprocessors, as the library sees it."""
    from qsun_bench import tune_panels_device

    return tune_panels_device.machine_of(
        extension.DeviceProps(
            compute_major=9,
            compute_minor=0,
            sm_count=sm_count,
            shared_memory_per_block=227 << 10,
            l2_bytes=50 << 20,
        )
    )


@pytest.fixture
def machine(extension: Any) -> Machine:
    return machine_of(extension, 132)


@pytest.mark.parametrize("kernel", panel_ways.SM90_KERNELS)
def test_candidates_hold_what_the_table_holds(kernel: Kernel) -> None:
    for ((K, N), M), (way, _) in panel_ways.table().fastest_of(kernel).items():
        assert way in panel_ways.candidates(kernel, Cell(K, N, M), MACHINE), (kernel, K, N, M, way)


@pytest.mark.parametrize(
    ("kernel", "M"), [(kernel, M) for kernel in panel_ways.KERNELS for M in panel_ways.TOKENS[kernel]]
)
def test_candidates_are_distinct_and_fit(kernel: Kernel, M: int) -> None:
    for (K, N), bits in itertools.product(WEIGHTS, panel_ways.BITS[kernel]):
        cell = Cell(K, N, M, bits)
        found = panel_ways.candidates(kernel, cell, MACHINE)
        assert found or (K, kernel) == (576, "gemm_sm90")
        assert len(set(found)) == len(found)
        assert all(len(way) == len(panel_ways.fields(kernel)) for way in found)
        assert all(shared_bytes(kernel, cell, way) <= MACHINE.shared_memory for way in found)


@pytest.mark.parametrize("kernel", panel_ways.KERNELS)
def test_the_library_runs_what_is_listed(kernel: Kernel, machine: Machine) -> None:
    """Every candidate becomes a configuration of the library, and the library knows its memory."""
    from qsun_bench import tune_panels_device

    assert set(map(tuple, machine.tiles)) == set(TILES)
    for bits, M in itertools.product(panel_ways.BITS[kernel], panel_ways.TOKENS[kernel]):
        cell = Cell(4096, 4096, M, bits)
        found = panel_ways.candidates(kernel, cell, machine)
        assert found
        for way in found:
            assert 0 < machine.shared_bytes(kernel, cell, way) <= machine.shared_memory
            if kernel != "stream":
                assert machine.shared_bytes(kernel, cell, way) == shared_bytes(kernel, cell, way)
            made = tune_panels_device.config(kernel, cell, way, 132)
            assert all(
                getattr(made, {"in_cluster": "adds_in_cluster"}.get(name, name)) == value
                for name, value in zip(panel_ways.fields(kernel), way, strict=True)
                if name != "waves"
            )


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("M", panel_ways.TOKENS["tiles_sm80"])
def test_tiles_before_sm_90_are_launched_as_there(extension: Any, M: int, bits: int) -> None:
    """Without overlap, in the memory of an A100, and in the way that was estimated among others."""
    from qsun_bench import tune_panels_device

    # As many multiprocessors as were measured would have measured ways in the place of estimates.
    machine = machine_of(extension, 108)
    for K, N in ((4096, 4096), (4096, 28672), (8192, 57344)):
        cell = Cell(K, N, M, bits)
        found = panel_ways.candidates("tiles_sm80", cell, machine)
        assert machine.estimate(cell) in found
        for way in found:
            made = tune_panels_device.config("tiles_sm80", cell, way, 108)
            assert not made.overlaps_producer
            assert M <= made.token_tiles * 8 < M + 16, (
                "tokens read the weight once, none of a tile is padding"
            )
            assert made.row_groups * made.column_groups in (4, 8)
            assert machine.shared_bytes("tiles_sm80", cell, way) <= 163 << 10


def test_tiles_before_sm_90_share_a_multiprocessor(machine: Machine) -> None:
    cell = Cell(4096, 4096, 32)
    ways = panel_ways.candidates("tiles_sm80", cell, machine)
    halves = [way for way in ways if machine.shared_bytes("tiles_sm80", cell, way) <= 81 << 10]
    assert halves and len(halves) < len(ways)
    assert {way[3] for way in ways} >= {1, 2, 3, 4}


def test_narrow_weights_have_more_stages_in_flight() -> None:
    """As many bytes as W4, from the copy engine, and never more barriers than a block has."""

    def in_flight(bits: int) -> dict[Way, int]:
        ways = panel_ways.candidates("stream", Cell(4096, 28672, 1, bits), MACHINE)
        assert ways
        return {way: way[1] * way[2] * way[3] * 256 * bits for way in ways}

    most = max(in_flight(4).values())
    for bits in (2, 3):
        found = in_flight(bits)
        assert max(found.values()) >= 0.8 * most
        assert {way[3] for way in found} == {2, 3, 4, 5, 6, 8}
        assert all(way[2] * way[3] <= 64 and (way[4] or way[3] <= 4) for way in found)
        # Too few to wait for memory with, by the block alone or by as many as come together.
        assert (1, 2, 4, 2, 1, 1) not in found
    for bits in (4, 8):
        assert {way[3] for way in in_flight(bits)} == {2, 3, 4}


def test_the_library_counts_stages_of_the_width(machine: Machine) -> None:
    cell = Cell(4096, 28672, 1, 2)
    sizes = [machine.shared_bytes("stream", cell, (1, 2, 8, stages, 1, 1)) for stages in (2, 4, 6, 8)]
    # Codes, scales and x of a stage: of 8 warps with two row tiles and a token.
    assert {b - a for a, b in itertools.pairwise(sizes)} == {2 * 8 * (2 * 544 + 272)}


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_weights_are_prepared_with_the_width_of_the_cell(extension: Any, bits: int) -> None:
    from qsun_bench import tune_panels_device

    copies = tune_panels_device.weight_copies(Cell(128, 64, 1, bits), "wna16_linear", 2, torch.device("cpu"))
    # Four row tiles of 16 x 128 codes and 16 scales.
    assert [copy.nbytes for copy in copies] == [4 * (256 * bits + 32)] * 2
    assert torch.equal(copies[0].tensors[0], copies[1].tensors[0])


def test_sums_in_a_cluster_are_tried_where_they_can_be() -> None:
    ways = panel_ways.candidates("gemm_sm90", Cell(4096, 4096, 256), MACHINE)
    clusters = [way for way in ways if way[4]]
    assert clusters and all(way[0] >= 64 and 2 <= way[2] <= 8 for way in clusters)
    assert all((*way[:4], 0) in ways for way in clusters)


def test_waves_become_row_blocks() -> None:
    cell = Cell(4096, 6144, 1)  # 384 row tiles
    of = [
        panel_ways.settings("stream", cell, (1, 2, 8, 2, 1, waves), 132)["row_blocks"] for waves in range(4)
    ]
    assert of == [192, 132, 264, 384]
