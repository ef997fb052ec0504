"""Which kernel and which grid the library chooses, on any machine."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library, linear, pending_norm
from qsun_kernels.backends.problems import PendingNorm
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs


@pytest.mark.parametrize(
    ("M", "N", "tile_m", "warps", "grid_n", "grid_m"),
    [
        (1, 4096, 1, 8, 256, 1),
        (2, 4096, 2, 8, 256, 1),
        (3, 4096, 4, 8, 256, 1),
        (8, 28672, 8, 8, 1792, 1),
        (9, 4096, 8, 8, 256, 2),
        (1, 576, 1, 2, 144, 1),  # few rows: smaller blocks, more of them
        (1, 1, 1, 2, 1, 1),
        (64, 576, 8, 8, 36, 8),
        (10**7, 2, 8, 8, 1, 65535),  # a grid's second dimension ends there, the kernel takes more turns
    ],
)
def test_choose_wna16_linear(extension, h100, M, N, tile_m, warps, grid_n, grid_m) -> None:
    config = extension.choose_wna16_linear(M, N, h100)
    got = (config.tile_m, config.warps, config.grid_n, config.grid_m)
    assert got == (tile_m, warps, grid_n, grid_m), repr(config)
    assert repr(config) == (
        f"Wna16LinearConfig(tile_m={tile_m} warps={warps} grid_n={grid_n} grid_m={grid_m})"
    )


@pytest.mark.parametrize("N", (1, 15, 16, 17, 576, 4095, 2**31 - 1))
def test_every_weight_row_has_a_warp(extension, h100, N) -> None:
    for M in (1, 2, 4, 8, 100):
        config = extension.choose_wna16_linear(M, N, h100)
        assert config.grid_n * config.warps * 2 >= N > (config.grid_n - 1) * config.warps * 2
        assert config.tile_m * config.grid_m >= M


SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (8192, 28672), (16, 128), (77, 104), (5128, 576))
SM_86 = {"compute_major": 8, "compute_minor": 6, "sm_count": 82, "shared_memory_per_block": 99 * 1024}


def test_tiles_that_are_chosen_can_be_launched(extension, h100, a100) -> None:
    """Every tile fits the GPU, has columns for every split, and takes part in the one choice of kernels."""
    small = extension.DeviceProps(**SM_86, l2_bytes=6 << 20)
    for props in (a100, small, h100):
        for N, K in SHAPES:
            for M in (9, 16, 17, 33, 48, 64, 65, 200, 4096):
                for bits in (4, 8):
                    for groups, zeros in ((1, False), (4, True)):
                        sizes = (M, N, K, bits, groups, zeros)
                        c = extension.choose_wna16_tiles(*sizes, props)
                        assert c.token_tiles in (2, 4, 6, 8) and c.row_groups in (1, 2, 4)
                        assert c.column_groups in (2, 4, 8) and c.row_groups * c.column_groups <= 8
                        assert c.token_tiles * 8 >= min(M, 64) and 2 <= c.stages <= 6
                        chunks = -(-K // (c.column_groups * 64))
                        assert 1 <= c.split_k <= min(16, chunks)
                        assert c.overlaps_producer == (props is h100)
                        size = extension.wna16_panels_shared_bytes(*sizes, c)
                        assert size <= props.shared_memory_per_block
                        needed = c.split_k * M * -(-N // 64) * 64 * 4 if c.split_k > 1 else 0
                        assert extension.wna16_parts_bytes(M, N, K, c) == needed
                        if props is not h100 and M > 16:
                            assert extension.uses_wna16_tiles(*sizes, False, props)
                            scratch = extension.wna16_panels_scratch_bytes(*sizes, False, props)
                            assert scratch == needed
                            text = extension.describe_wna16_panels(*sizes, False, props)
                            assert text == f"tiles_sm80 {repr(c)[len('TilesConfig(') : -1]}"


def test_what_tiles_do_not_take_is_streamed(extension, a100) -> None:
    def kernel(M: int, K: int, bits: int, invariant: bool = False) -> str:
        text: str = extension.describe_wna16_panels(M, 4096, K, bits, 1, False, invariant, a100)
        return text.split(" ")[0]

    assert kernel(64, 4096, 4) == kernel(17, 4096, 8) == "tiles_sm80"
    for few_tokens in (1, 8, 16):
        assert kernel(few_tokens, 4096, 4) == "stream"
    for bits in (2, 3):
        assert kernel(64, 4096, bits) == "stream"
    assert kernel(64, 4100, 4) == "stream"  # rows of x that 16 bytes do not divide
    assert kernel(64, 4096, 4, invariant=True) == "stream"


LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def test_where_a_norm_may_be_left_to_the_next_product(extension, h100, a100) -> None:
    """Up to 16 tokens of bfloat16, where the streaming kernel is the choice in any case."""
    bfloat16, float16 = 2, 1
    answers = set()
    for props in (h100, a100):
        for N, K in (*LLAMA, *SHAPES):
            for M in (*range(1, 20), 64):
                for bits in (2, 3, 4, 8):
                    sizes = (M, N, K, bits, 1, bits == 3)
                    said = extension.describe_wna16_panels(*sizes, False, props, in_layer=True)
                    streams = said.startswith("stream ")
                    got = extension.may_pend_wna16_norm(*sizes, bfloat16, props)
                    assert got == (streams and M <= 16)
                    answers.add((got, streams, M <= 16))
                    assert not extension.may_pend_wna16_norm(*sizes, float16, props)
        # All products of a decode step of few rows
        for M in (1, 2, 4, 8):
            assert all(extension.may_pend_wna16_norm(M, N, K, 4, 1, False, bfloat16, props) for N, K in LLAMA)
    assert (False, False, True) in answers  # few tokens, but not streamed: this loop can fail


def test_whether_leaving_a_norm_pays_is_asked_of_the_library(extension, h100, monkeypatch) -> None:
    """With the sizes of both weights as the library has them: groups, zeros, columns that are gathered."""
    asked: list[tuple[object, ...]] = []

    class Recording:
        def may_pend_wna16_norm(self, *arguments: object) -> bool:
            asked.append(arguments[:-1])
            return bool(extension.may_pend_wna16_norm(*arguments))

    monkeypatch.setattr(library, "binding", Recording())
    monkeypatch.setattr(library, "device_props", lambda index: h100)
    monkeypatch.setattr(pending_norm, "_may_pend", pending_norm._may_pend.__wrapped__)

    def weight(N: int, K: int, spec: QuantSpec, act_order: bool = False, operator: str = "wna16_linear"):
        packed = inputs.packed_weight(inputs.generator(0), N, K, spec, act_order=act_order)
        prepare = cuda.IMPLEMENTATIONS[operator].prepare
        return prepare(packed.with_scales(torch.bfloat16), torch.bfloat16)

    plain, gate_up = QuantSpec(4, 128, True), "wna16_gate_up_silu"
    assert pending_norm.pays(1, weight(128, 256, plain), weight(512, 128, plain, operator=gate_up))
    assert asked == [(1, 128, 256, 4, 1, False, 2), (1, 512, 128, 4, 1, False, 2)]
    asked.clear()
    ordered = weight(128, 200, QuantSpec(4, 32, False), act_order=True)
    assert pending_norm.pays(8, ordered, weight(64, 128, QuantSpec(8, 64, True)))
    columns = len(ordered.tensors[1])
    assert columns > 200
    assert asked == [(8, 128, columns, 4, 4, True, 2), (8, 64, 128, 8, 2, False, 2)]
    asked.clear()
    assert not pending_norm.pays(17, ordered, ordered) and len(asked) == 1


def test_who_is_launched_as_in_a_layer(extension, h100, monkeypatch) -> None:
    """Calls that only layers make, and a product with a residual: it has the bits of the call with a norm."""
    told: list[tuple[bool, bool]] = []  # for scratch, for the launch

    class Recording:
        def wna16_panels_scratch_bytes(self, *arguments: Any) -> int:
            self.for_scratch = arguments[-1]
            return int(extension.wna16_panels_scratch_bytes(*arguments))

        def wna16_panels(self, *arguments: Any) -> None:
            told.append((self.for_scratch, arguments[-7]))

    monkeypatch.setattr(library, "binding", Recording())
    monkeypatch.setattr(library, "device_props", lambda index: h100)
    monkeypatch.setattr(library, "stream", lambda index: 0)
    monkeypatch.setattr(linear, "_scratch_bytes", linear._scratch_bytes.__wrapped__)
    packed = inputs.packed_weight(inputs.generator(0), 64, 128, QuantSpec(4, 128, True)).with_scales(
        torch.bfloat16
    )
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, torch.bfloat16)
    gate_up = cuda.IMPLEMENTATIONS["wna16_gate_up_silu"].prepare(packed, torch.bfloat16)
    x, rows, vector = (torch.zeros(size, dtype=torch.bfloat16) for size in ((2, 128), (2, 64), (64,)))
    linear.wna16_linear(x, weight, None, None, None)
    linear.wna16_linear(x, weight, vector, None, None)
    assert told == [(False, False)] * 2
    told.clear()
    linear.wna16_linear(x, weight, None, rows, None)
    linear.wna16_linear_rms_norm(x, weight, rows, vector, 1e-5, None, False)
    linear.wna16_gate_up_silu(x, gate_up, None)
    assert told == [(True, True)] * 3
    told.clear()
    pending_norm.leave(x, weight, rows, vector, 1e-5, None)
    pending_norm.take(PendingNorm(x, torch.ones(2, 8), 1e-5), weight, None, None, None)
    assert [launched for _, launched in told] == [True, True]  # they take no scratch


def test_products_that_are_split(extension, h100, a100) -> None:
    """Those of many tokens whose sums go through memory: not where a cluster adds them."""
    found = set()
    for props in (h100, a100):
        for M in (0, 1, 8, 16, 17, 32, 64, 128, 256):
            for N, K in LLAMA:
                sizes = (M, N, K, 4, 1, False)
                splits = extension.wna16_panels_splits(*sizes, props)
                text = extension.describe_wna16_panels(*sizes, False, props)
                split = re.search(r"split_k=(\d+)", text)
                added_elsewhere = split is not None and "adds_in_cluster=yes" not in text and M > 0
                assert splits == (int(split.group(1)) if added_elsewhere else 1), text
                bytes_needed = extension.wna16_panels_scratch_bytes(*sizes, False, props)
                assert bytes_needed == (splits * M * -(-N // 64) * 64 * 4 if splits > 1 else 0)
                found.add(splits)
    assert {1, 2, 4} <= found


def test_choose_rms_norm(extension, h100, a100) -> None:
    half = 1
    choose = extension.choose_rms_norm
    expected = "RmsNormConfig(width=8 threads=256 overlaps_producer=1)"
    assert repr(choose(4096, 4096, 4096, half, h100)) == expected
    assert choose(4096, 576, 576, half, h100).threads == 64
    assert choose(4096, 10**6, 10**6, half, h100).threads == 1024
    for unaligned in ((4098, 4096, 4096), (4096, 4095, 4096), (4096, 4096, 4097)):
        assert choose(*unaligned, half, h100).width == 1
    assert not choose(4096, 4096, 4096, half, a100).overlaps_producer


def test_choose_silu_and_mul(extension, h100, a100) -> None:
    half, choose = 1, extension.choose_silu_and_mul
    expected = "SiluAndMulConfig(width=8 blocks=14 overlaps_producer=1)"
    assert repr(choose(4096, 2, 14336, 28672, half, h100)) == expected
    assert choose(4096, 1, 1, 2, half, h100).blocks == 1
    for unaligned in ((4098, 2, 14336, 28672), (4096, 2, 14332, 28672), (4096, 2, 14336, 28673)):
        config = choose(*unaligned, half, h100)
        assert (config.width, config.blocks) == (1, 112)
    assert choose(4096, 2**40, 14336, 28672, half, h100).blocks == 2**31 - 1  # threads take more turns
    assert not choose(4096, 2, 14336, 28672, half, a100).overlaps_producer


def test_choose_apply_rope(extension, h100, a100) -> None:
    half, choose = 1, extension.choose_apply_rope
    expected = "ApplyRopeConfig(width=8 blocks=4 overlaps_producer=1)"
    assert repr(choose(4096, 3, 32, 8, 128, 4096, 1024, half, h100)) == expected
    assert choose(4096, 1, 1, 1, 2, 2, 2, half, h100).blocks == 1
    # An address, half a head, a stride that 16 bytes do not divide
    for q, head_dim, stride in ((4098, 128, 1024), (4096, 120, 1024), (4096, 128, 1025)):
        config = choose(q, 3, 32, 8, head_dim, 4096, stride, half, h100)
        assert (config.width, config.blocks) == (1, -(-3 * 40 * (head_dim // 2) // 256))
    assert choose(4096, 2**40, 32, 8, 128, 4096, 1024, half, h100).blocks == 2**31 - 1
    assert not choose(4096, 3, 32, 8, 128, 4096, 1024, half, a100).overlaps_producer


def test_choose_write_kv_cache(extension, h100, a100) -> None:
    half, int8 = 1, 4
    choose = extension.choose_write_kv_cache
    copy = choose(4096, 128, 0, 128, False, half, half, h100)
    assert repr(copy) == "WriteKvCacheConfig(copies=1 is_wide=1 lanes=0 overlaps_producer=1)"
    assert not choose(4096, 128, 0, 127, False, half, half, h100).is_wide
    for arguments in ((4, 128, True, half), (0, 128, True, half), (0, 128, False, int8)):
        config = choose(4096, 128, *arguments, half, h100)
        assert (config.copies, config.is_wide, config.lanes) == (False, True, 8)
    for dtype, lanes in (
        (half, {16: 1, 64: 4, 80: 8, 96: 8, 128: 8, 256: 16, 512: 32}),
        (0, {8: 1, 256: 32}),
    ):
        for head_dim, expected in lanes.items():
            assert choose(4096, 512, 4, head_dim, True, int8, dtype, h100).lanes == expected
    # A vector of each half: 16 elements of 16 bits; an address, a stride that 16 bytes do not divide
    for k, k_stride, head_dim in ((4096, 512, 24), (4098, 512, 128), (4096, 129, 128)):
        assert not choose(k, k_stride, 4, head_dim, True, int8, half, h100).is_wide
    assert not choose(4096, 128, 4, 128, True, half, half, a100).overlaps_producer


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "blocks", "staged"),
    [(1, 0, 1, True), (2048, 0, 1, True), (2049, 0, 2, True), (49152, 1, 8, True), (128256, 0, 8, True),
     (151936, 2, 8, True), (400_000, 0, 8, True), (600_000, 0, 8, False), (2**22, 2, 8, False)],
)  # fmt: skip
def test_choose_sample_tokens(extension, h100, vocabulary, dtype, blocks, staged) -> None:
    config = extension.choose_sample_tokens(vocabulary, dtype, h100)
    assert (config.blocks, config.staged, config.overlaps_producer) == (blocks, staged, True)
    assert config.shared_bytes <= h100.shared_memory_per_block
    if staged:  # the share of the row, wherever it begins, beside what the search needs
        assert config.shared_bytes > vocabulary * 4 / blocks


def test_choose_sample_tokens_without_clusters(extension, a100) -> None:
    config = extension.choose_sample_tokens(128256, 0, a100)
    assert (config.blocks, config.staged, config.overlaps_producer) == (1, False, False)
    assert extension.choose_sample_tokens(32000, 0, a100).staged
