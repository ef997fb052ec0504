"""Panels: every bit where the layout says, for every format; and that packing a large weight takes little."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends.panels import Panels, block_bytes, pack_panels, tile_bytes
from qsun_kernels.quant import PackedWeight, QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.oracles import exact_weight

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, "channel")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


# ---- the layout, one element at a time: shares nothing with the code that packs


def size_of_tile(bits: int, groups_per_block: int, has_zeros: bool) -> tuple[int, int, int]:
    """Bytes of a tile of a block: where its scales begin, where its zero points begin, and in all."""
    codes = {2: 512, 3: 512 + 256, 4: 1024, 8: 2048}[bits]
    scales = {1: 32, 2: 64, 4: 128}[groups_per_block]
    zeros = {1: 16, 2: 32, 4: 64}[groups_per_block] if has_zeros else 0
    return codes, codes + scales, codes + scales + zeros


def places_of(bits: int, row: int, column: int) -> list[int]:
    """Where the bits of the code at (row, column) of a tile are, as bit numbers, the lowest first."""
    s, column_of_step = divmod(column, 16)
    g, r_odd = row % 8, row // 8
    t, high = column_of_step % 8 // 2, column_of_step % 2
    r = r_odd + (2 if column_of_step >= 8 else 0)
    lane = 4 * g + t

    def places(byte: int, word: int, bits_of_half: list[int], turn: int) -> list[int]:
        """Of bits of a half word, in a word that is turned left."""
        return [8 * byte + 32 * word + (16 * high + bit + turn) % 32 for bit in bits_of_half]

    if bits == 4:
        return places((s // 4 * 32 + lane) * 16, s % 4, [4 * r + i for i in range(4)], 2)
    if bits == 8:
        byte_of_word = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}[(r % 2, high)]
        first = 8 * ((s // 2 * 32 + lane) * 16 + 4 * (2 * (s % 2) + r // 2) + byte_of_word)
        return list(range(first, first + 8))
    if bits == 2:
        return places(lane * 16, s // 2, [8 * (s % 2) + 2 * r + i for i in range(2)], 3)
    half, step = divmod(s, 4)
    found = []
    for i in range(3):
        word, bit = (step, 3 * r + i) if step < 3 else ((3 * r + i) // 4, 12 + (3 * r + i) % 4)
        begin = (lane * 16, 2 * half + word) if word < 2 else (512 + lane * 8, half)
        found += places(*begin, [bit], 1)
    return found


def index_of_group(row: int, column: int, groups_per_block: int) -> int:
    """Which scale and which zero point of a tile belong to (row, column)."""
    group = column // (128 // groups_per_block)
    return (row % 8 * groups_per_block + group) * 2 + row // 8


def stored_row(n: int, N: int, is_gate_up: bool) -> int:
    """Which stored row has row n of the weight."""
    if not is_gate_up:
        return n
    is_up, channel = divmod(n, N // 2)
    return 16 * (channel // 8) + 8 * is_up + channel % 8


def dense(panels: Panels) -> Tensor:
    """The float64 weight (N, K) that the panels stand for."""
    p = panels
    scales_begin, zeros_begin, size = size_of_tile(p.bits, p.groups_per_block, p.has_zeros)
    assert p.panels.shape[2] == 4 * size
    by_tile = p.panels.cpu().view(p.row_blocks, p.column_blocks, 4, size)
    tiles = [[[bytes(tile.tolist()) for tile in block] for block in row] for row in by_tile]
    scales = by_tile[..., scales_begin:zeros_begin].contiguous().view(p.dtype).double().tolist()
    columns = list(range(p.K)) if p.perm is None else p.perm.tolist()
    assert len(columns) == (p.K if p.perm is None else 128 * p.column_blocks)
    assert sorted(column for column in columns if column >= 0) == list(range(p.K))
    weight = torch.full((p.N, p.K), torch.nan, dtype=torch.float64)
    for n in range(p.N):
        row_block, row_of_block = divmod(stored_row(n, p.N, p.is_gate_up), 64)
        rt, row = divmod(row_of_block, 16)
        for stored, k in enumerate(columns):
            if k < 0:
                continue
            column_block, column = divmod(stored, 128)
            tile = tiles[row_block][column_block][rt]
            places = places_of(p.bits, row, column)
            code = sum((tile[place // 8] >> place % 8 & 1) << i for i, place in enumerate(places))
            index = index_of_group(row, column, p.groups_per_block)
            zero = tile[zeros_begin + index] if p.has_zeros else 2 ** (p.bits - 1)
            weight[n, k] = (code - zero) * scales[row_block][column_block][rt][index]
    return weight


def packed_weight(
    N: int,
    K: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    *,
    g_idx: str = "none",
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A random weight whose scales are of both signs. g_idx: how columns are dealt to groups."""
    source = inputs.generator(N * 1000 + K)
    packed = inputs.packed_weight(source, N, K, spec, act_order=g_idx == "balanced")
    signs = torch.randint(0, 2, packed.scales.shape, generator=source) * 2 - 1
    groups = packed.g_idx
    if g_idx == "uneven":
        groups = torch.randint(0, spec.num_groups(K), (K,), generator=source, dtype=torch.int32)
    packed = PackedWeight(spec, N, K, packed.qweight, packed.scales * signs, packed.qzeros, groups)
    return packed.with_scales(dtype).to(device)


def require_same_weight(packed: PackedWeight, dtype: torch.dtype, *, gate_up: bool = False) -> Panels:
    """Pack, compare every weight with the definition, and return the panels."""
    with inputs.poisoned_outputs():
        panels = pack_panels(packed, dtype, gate_up=gate_up)
    assert panels.panels.dtype == torch.uint8 and panels.panels.is_contiguous()
    assert panels.panels.data_ptr() % 16 == 0
    assert torch.equal(dense(panels), exact_weight(packed.with_scales(dtype)).cpu())
    return panels


# ---- placement


@pytest.mark.parametrize("bits", BITS)
def test_the_places_of_a_tile_are_all_different(bits: int) -> None:
    """That the layout of this test is a layout at all: from the tile's begin to its scales."""
    places = [place for row in range(16) for column in range(128) for place in places_of(bits, row, column)]
    assert sorted(places) == list(range(8 * size_of_tile(bits, 1, False)[0]))
    for groups_per_block in (1, 2, 4):
        indices = {index_of_group(row, k, groups_per_block) for row in range(16) for k in range(128)}
        assert sorted(indices) == list(range(16 * groups_per_block))


# By hand from the layout, 4 bits in groups of 128, symmetric, so tiles of 1024 + 32 bytes: (row, column) of a
# block -> (byte, shift in it).
BY_HAND = [
    ((0, 0), (0, 2)),
    ((0, 1), (2, 2)),  # the odd column: 16 bits further
    ((8, 0), (0, 6)),  # r = 1
    ((0, 8), (1, 2)),  # r = 2
    ((8, 9), (3, 6)),  # r = 3, high: its upper two bits are the word's lowest
    ((1, 0), (64, 2)),  # g = 1: lane 4
    ((0, 2), (16, 2)),  # t = 1
    ((0, 16), (4, 2)),  # s = 1: the next word
    ((0, 64), (512, 2)),  # s = 4: h = 1
    ((16, 0), (1056, 2)),  # rt = 1
    ((63, 127), (4191, 6)),  # the last of rt = 3, 32 bytes before the end of 4224
]


@pytest.mark.parametrize(("where", "expected"), BY_HAND)
def test_a_single_code_of_four_bits_by_hand(where: tuple[int, int], expected: tuple[int, int]) -> None:
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[where] = 15
    packed = PackedWeight.from_codes(codes, torch.zeros(64, 1), QuantSpec(4, 128, True))
    block = pack_panels(packed, torch.bfloat16).panels[0, 0]
    byte, shift = expected
    assert block.shape == (4224,)
    word = block.view(torch.int32)[byte // 4]
    assert block.view(torch.int32).nonzero().flatten().tolist() == [byte // 4]
    at = byte % 4 * 8 + shift
    assert int(word) % 2**32 == (15 << at | 15 >> (32 - at)) % 2**32


# 3 bits in groups of 32 with zero points, so tiles of 768 + 128 + 64 = 960 bytes: what lies where.
BY_HAND_OF_3_BITS = [
    ("code", (0, 0), 0),
    ("code", (0, 16), 4),  # s = 1: the next word
    ("code", (0, 32), 512),  # s = 2: the word of the half piece
    ("code", (0, 64), 8),  # s = 4: the second half
    ("code", (0, 96), 516),
    ("code", (16, 0), 960),  # rt = 1
    ("code", (17, 32), 960 + 512 + 4 * 8),  # lane 4
    ("scale", (0, 0), 768),
    ("zero", (0, 0), 896),
    ("scale", (18, 32), 960 + 768 + (2 * 4 + 1) * 2 * 2),  # g = 2, the second group
    ("scale", (26, 32), 960 + 768 + (2 * 4 + 1) * 2 * 2 + 2),  # the row 8 further: beside it
    ("zero", (63, 127), 3839),  # the last byte of a block
]


def test_the_fourth_step_of_3_bits_by_hand() -> None:
    """Its codes r = 0 to 3 are bits 0-2, 3-5, 6-8, 9-11; of 4 bits a word, which end up as bits 13 to 16."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[0, 48], codes[8, 48], codes[0, 56], codes[8, 56] = 1, 3, 5, 7  # 0b111_101_011_001
    packed = PackedWeight.from_codes(codes, torch.zeros(64, 1), QuantSpec(3, 128, True))
    words = pack_panels(packed, torch.bfloat16).panels[0, 0].view(torch.int32)
    assert words.nonzero().flatten().tolist() == [0, 1, 128]
    assert [int(words[i]) for i in (0, 1, 128)] == [0b1001 << 13, 0b0101 << 13, 0b1111 << 13]


@pytest.mark.parametrize(("part", "where", "byte"), BY_HAND_OF_3_BITS)
def test_the_parts_of_a_tile_by_hand(part: str, where: tuple[int, int], byte: int) -> None:
    """A block of zeros but for one code, scale or zero point."""
    row, column = where
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    scales = torch.zeros(64, 4)
    zeros = torch.zeros(64, 4, dtype=torch.uint8)
    if part == "scale":
        scales[row, column // 32] = 1 + 2**-7  # both bytes of a bfloat16
    elif part == "zero":
        zeros[row, column // 32] = 1
    else:
        codes[row, column] = 1
    packed = PackedWeight.from_codes(codes, scales, QuantSpec(3, 32, False), zeros)
    block = pack_panels(packed, torch.bfloat16).panels[0, 0]
    assert block.shape == (3840,)
    assert block.nonzero().flatten().tolist() == ([byte, byte + 1] if part == "scale" else [byte])


@pytest.mark.parametrize("bits", BITS)
def test_every_single_bit_of_a_code_has_its_place(bits: int) -> None:
    """One-hot: a code with one bit set sets that one bit of that one block."""
    source = inputs.generator(bits)
    spec = QuantSpec(bits, 64, True)  # type: ignore[arg-type]
    scales = torch.zeros(130, 5)
    size = size_of_tile(bits, 2, False)[2]
    for _ in range(200):
        n, k, bit = (int(torch.randint(0, limit, (1,), generator=source)) for limit in (130, 300, bits))
        codes = torch.zeros(130, 300, dtype=torch.uint8)
        codes[n, k] = 1 << bit
        panels = pack_panels(PackedWeight.from_codes(codes, scales, spec), torch.float16).panels
        assert panels.shape == (3, 3, 4 * size)
        set_bytes = panels.nonzero().tolist()
        place = places_of(bits, n % 16, k % 128)[bit]
        assert set_bytes == [[n // 64, k // 128, n % 64 // 16 * size + place // 8]]
        assert int(panels[tuple(set_bytes[0])]) == 1 << place % 8


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_scale_and_zero_has_its_place(group_size: Any, has_zeros: bool) -> None:
    N, K = 70, 200
    spec = QuantSpec(4, group_size, not has_zeros)
    groups = spec.num_groups(K)
    # Integers up to 420 in float16: every scale another.
    scales = torch.arange(1, N * groups + 1, dtype=torch.float16).view(N, groups)
    zeros = (torch.arange(N * groups) % 15 + 1).to(torch.uint8).view(N, groups) if has_zeros else None
    codes = torch.zeros(N, K, dtype=torch.uint8)
    packed = PackedWeight.from_codes(codes, scales, spec, zeros)
    panels = pack_panels(packed, torch.float16)
    per_block = {32: 4, 64: 2, 128: 1, "channel": 1}[group_size]
    expected_scales = torch.zeros(2, 2, 4, 16 * per_block, dtype=torch.float16)
    expected_zeros = torch.zeros(2, 2, 4, 16 * per_block, dtype=torch.uint8)
    for n in range(N):
        for stored in range(2 * per_block):
            group = 0 if group_size == "channel" else stored
            if group >= groups:
                continue
            index = index_of_group(n % 16, stored % per_block * (128 // per_block), per_block)
            place = (n // 64, stored // per_block, n % 64 // 16, index)
            expected_scales[place] = scales[n, group]
            if zeros is not None:
                expected_zeros[place] = zeros[n, group]
    assert panels.groups_per_block == per_block
    tiles = panels.panels.view(2, 2, 4, 1024 + 16 * per_block * (3 if has_zeros else 2))
    stored_scales, stored_zeros = tiles[..., 1024:].tensor_split([32 * per_block], dim=-1)
    assert torch.equal(stored_scales.contiguous().view(torch.float16), expected_scales)
    if has_zeros:
        assert torch.equal(stored_zeros, expected_zeros)


# ---- whole weights


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_format(bits: Any, group_size: Any, symmetric: bool, device: torch.device) -> None:
    dtype = SIXTEEN_BITS[(BITS.index(bits) + GROUP_SIZES.index(group_size)) % 2]
    packed = packed_weight(75, 173, QuantSpec(bits, group_size, symmetric), dtype, device=device)
    panels = require_same_weight(packed, dtype)
    shape_of_block = (bits, panels.groups_per_block, not symmetric)
    assert tile_bytes(*shape_of_block) == size_of_tile(*shape_of_block)[2]
    assert panels.panels.shape == (2, 2, block_bytes(*shape_of_block))
    assert panels.panels.device == packed.device
    assert panels.layout == "cuda.panels" and panels.tensors == (panels.panels,)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 128), (63, 129), (65, 127), (2, 33), (129, 31)])
@pytest.mark.parametrize("bits", BITS)
def test_sizes(bits: Any, N: int, K: int) -> None:
    require_same_weight(packed_weight(N, K, QuantSpec(bits, 32, False), torch.float16), torch.float16)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_scales_are_rounded_to_the_activations(dtype: torch.dtype) -> None:
    require_same_weight(packed_weight(10, 40, QuantSpec(4, 32, True), torch.float32), dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (2, 128), (8, 128), (3, "channel")])
def test_groups_of_full_size_in_any_order(
    bits: Any, group_size: Any, symmetric: bool, device: torch.device
) -> None:
    packed = packed_weight(
        20, 301, QuantSpec(bits, group_size, symmetric), torch.float16, g_idx="balanced", device=device
    )
    panels = require_same_weight(packed, torch.float16)
    assert panels.layout == "cuda.panels" and panels.column_blocks == 3
    if group_size == "channel":
        assert panels.perm is None
        return
    assert panels.groups_per_block == 128 // group_size
    assert panels.perm is not None and panels.tensors == (panels.panels, panels.perm)
    assert panels.perm.dtype == torch.int32 and panels.perm.device == panels.panels.device
    assert panels.perm[301:].tolist() == [-1] * (384 - 301)
    assert packed.g_idx is not None
    assert torch.equal(panels.perm[:301].long(), packed.g_idx.argsort(stable=True))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (2, 128), (8, 128), (3, 64)])
def test_groups_of_uneven_size_are_stored_as_groups_of_32(
    bits: Any, group_size: Any, symmetric: bool, device: torch.device
) -> None:
    packed = packed_weight(
        20, 301, QuantSpec(bits, group_size, symmetric), torch.bfloat16, g_idx="uneven", device=device
    )
    panels = require_same_weight(packed, torch.bfloat16)
    assert panels.layout == "cuda.panels32" and panels.groups_per_block == 4
    assert packed.g_idx is not None and panels.perm is not None
    stored = sum(-(-int(count) // 32) * 32 for count in packed.g_idx.cpu().bincount())
    assert panels.column_blocks == -(-stored // 128)
    assert panels.perm.shape == (128 * panels.column_blocks,)
    # Stored columns of a group are in the order of the input, so that the gather walks forward.
    for run in panels.perm.cpu().view(-1, 32):
        kept = run[run >= 0]
        assert torch.equal(kept, kept.sort().values) and torch.equal(run[: len(kept)], kept)
        assert len(packed.g_idx.cpu()[kept.long()].unique()) <= 1


def test_a_group_without_columns_takes_no_place() -> None:
    spec = QuantSpec(4, 32, True)
    g_idx = torch.tensor([0] * 64 + [2] * 32, dtype=torch.int32)
    source = inputs.generator(0)
    packed = inputs.packed_weight(source, 5, 96, spec, scale_dtype=torch.float16)
    packed = PackedWeight(spec, 5, 96, packed.qweight, packed.scales, None, g_idx)
    panels = require_same_weight(packed, torch.float16)
    assert panels.layout == "cuda.panels32" and panels.perm is None and panels.column_blocks == 1


def test_a_g_idx_in_order_needs_no_gather() -> None:
    packed = packed_weight(5, 300, QuantSpec(4, 64, False), torch.float16)
    in_order = (torch.arange(300) // 64).to(torch.int32)
    given = PackedWeight(packed.spec, 5, 300, packed.qweight, packed.scales, packed.qzeros, in_order)
    panels = pack_panels(given, torch.float16)
    assert panels.perm is None and panels.layout == "cuda.panels"
    assert torch.equal(panels.panels, pack_panels(packed, torch.float16).panels)


@pytest.mark.parametrize("g_idx", ["none", "balanced", "uneven"])
@pytest.mark.parametrize("N", [2, 48, 64, 150])
@pytest.mark.parametrize("bits", BITS)
def test_gate_and_up_are_interleaved_by_eight(bits: Any, N: int, g_idx: str, device: torch.device) -> None:
    packed = packed_weight(N, 140, QuantSpec(bits, 64, bits > 3), torch.bfloat16, g_idx=g_idx, device=device)
    panels = require_same_weight(packed, torch.bfloat16, gate_up=True)
    assert panels.row_blocks == -(-N // 64)
    assert panels.layout == f"cuda.gate_up_panels{'32' if g_idx == 'uneven' else ''}"
    plain = pack_panels(packed, torch.bfloat16)
    codes = slice(0, 512)  # of the first tile, of every format
    assert N == 2 or not torch.equal(plain.panels[:, :, codes], panels.panels[:, :, codes])


@pytest.mark.parametrize(("N", "gate_up"), [(65, False), (66, True)])
def test_padding_is_zero(N: int, gate_up: bool) -> None:
    """Not only where no weight is: a scale or a zero point left behind would meet whatever x is there."""
    spec = QuantSpec(4, 32, False)
    codes = torch.full((N, 130), 15, dtype=torch.uint8)
    groups = (N, spec.num_groups(130))
    packed = PackedWeight.from_codes(
        codes, torch.ones(groups), spec, torch.full(groups, 15, dtype=torch.uint8)
    )
    with inputs.poisoned_outputs():
        panels = pack_panels(packed, torch.float16, gate_up=gate_up).panels
    ones = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8).count_nonzero()
    stored_codes, stored_scales, stored_zeros = panels.unflatten(2, (4, -1)).split([1024, 128, 64], dim=-1)
    assert sum(int((stored_codes >> i & 1).sum()) for i in range(8)) == 4 * N * 130
    assert stored_scales.count_nonzero() == ones * N * 5
    assert stored_zeros.count_nonzero() == N * 5


# ---- slices, memory, time


def test_slices_of_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for gate_up in (False, True):
        packed = packed_weight(450, 140, QuantSpec(3, 32, False), torch.float16, g_idx="balanced")
        whole = pack_panels(packed, torch.float16, gate_up=gate_up)
        monkeypatch.setattr("qsun_kernels.backends.panels._SLICE_WEIGHTS", 3 * 64 * 256)
        sliced = pack_panels(packed, torch.float16, gate_up=gate_up)
        monkeypatch.undo()
        assert whole.row_blocks == 8
        assert torch.equal(whole.panels, sliced.panels)


LARGE = (4096, 14336)
"""N and K: half of the largest matrix of an 8-billion-parameter Llama."""


@pytest.mark.parametrize("bits", BITS)
def test_memory_on_the_way_is_bounded(bits: Any) -> None:
    N, K = LARGE
    packed = inputs.packed_weight(inputs.generator(0), 512, K, QuantSpec(bits, 128, False), act_order=True)
    repeated = [None if t is None else t.repeat(N // 512, 1) for t in (packed.qweight, packed.scales)]
    assert packed.qzeros is not None
    packed = PackedWeight(
        packed.spec,
        N,
        K,
        *repeated,
        packed.qzeros.repeat(N // 512, 1),
        packed.g_idx,  # type: ignore[arg-type]
    ).with_scales(torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        panels = pack_panels(packed, torch.bfloat16)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert held >= panels.panels.nbytes, "the profiler missed the result"
    assert peak - panels.panels.nbytes < 60e6, "more than a matrix of 4096 x 28672 takes in four bits"


@pytest.mark.gpu
def test_packing_a_large_matrix_is_fast_and_small(device: torch.device) -> None:
    spec = QuantSpec(4, 128, True)
    N, K = 28672, 4096
    qweight = torch.randint(-(2**31), 2**31 - 1, (N, K // 8), dtype=torch.int32, device=device)
    scales = torch.rand(N, K // 128, device=device).to(torch.bfloat16)
    packed = PackedWeight(spec, N, K, qweight, scales)
    pack_panels(packed, torch.bfloat16)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    panels = pack_panels(packed, torch.bfloat16)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    assert torch.cuda.max_memory_allocated(device) - before - panels.panels.nbytes < 60e6
    # A model of 8 billion parameters has 60 times as many weights.
    assert seconds < 0.1, f"{seconds:.3f} s"


# ---- errors


@pytest.mark.damaged
def test_errors_name_the_argument() -> None:
    packed = packed_weight(5, 40, QuantSpec(4, 32, True), torch.float16)
    with pytest.raises(TypeError, match=r"dtype is torch.float32, expected torch.float16 or torch.bfloat16"):
        pack_panels(packed, torch.float32)
    with pytest.raises(ValueError, match=r"packed has N = 5 rows, expected an even number"):
        pack_panels(packed, torch.float16, gate_up=True)
    for bad in (-1, 2):
        g_idx = torch.zeros(40, dtype=torch.int32)
        g_idx[7] = bad
        broken = PackedWeight(packed.spec, 5, 40, packed.qweight, packed.scales, None, g_idx)
        with pytest.raises(ValueError, match=rf"g_idx\[7\] is {bad}, expected a group in 0..1"):
            pack_panels(broken, torch.float16)
