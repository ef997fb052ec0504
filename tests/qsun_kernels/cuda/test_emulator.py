"""The emulator itself: what it makes of each instruction, and that it notices misuse."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

HALVES = (torch.float16, torch.bfloat16)
CODES = {torch.float16: 1, torch.bfloat16: 2}
ORDERS = ("forward", "reverse", "1", "2")
MISUSES = ("none", "no first barrier", "no last barrier", "static", "no such rank", "half a warp", "foreign")
NOT_READ = 0xFF


@pytest.fixture
def call(emulated_instructions: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls an entry of instructions.cu by name; returns what went wrong."""
    monkeypatch.setenv("QSUN_EMULATOR_CAPABILITY", "9.0")

    def run(name: str, *arguments: Any) -> str:
        entry = getattr(emulated_instructions, name)
        entry.restype = ctypes.c_char_p
        passed = [pointer(one) if isinstance(one, torch.Tensor) else ctypes.c_int(one) for one in arguments]
        return bytes(entry(*passed)).decode()

    return run


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def aligned_bytes(count: int) -> torch.Tensor:
    """Random bytes that begin at a multiple of 16."""
    space = torch.randint(0, 255, (count + 16,), dtype=torch.uint8)  # never NOT_READ
    begin = -space.data_ptr() % 16
    return space[begin : begin + count]


# ---- the tensor core


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_product(call, monkeypatch, dtype, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    expected = (a.double() @ b.double().T + c.double()).float()
    assert call("multiply", CODES[dtype], a, b, c, -1, 1) == ""
    # Sums of different orders in float64, rounded to float32: equal but for ties.
    torch.testing.assert_close(c, expected, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_product_of_special_values(call, dtype) -> None:
    a, b, c = torch.zeros(16, 16, dtype=dtype), torch.zeros(8, 16, dtype=dtype), torch.zeros(16, 8)
    tiny = torch.finfo(dtype).smallest_normal / 2**6  # not a normal number
    a[0, 3], a[1, 5], a[2, 7], a[3, 0] = torch.nan, torch.inf, tiny, torch.finfo(dtype).max
    b[:] = 1
    assert call("multiply", CODES[dtype], a, b, c, -1, 1) == ""
    assert c[0].isnan().all() and (c[1] == torch.inf).all() and (c[2] == float(a[2, 7])).all()
    assert (c[3] == float(a[3, 0])).all() and (c[4:] == 0).all()


def test_a_product_that_a_lane_misses(call) -> None:
    a, b, c = torch.zeros(16, 16).half(), torch.zeros(8, 16).half(), torch.zeros(16, 8)
    assert "wait for threads that will not come: 31 at" in call("multiply", 1, a, b, c, 7, 1)
    assert call("multiply", 1, a, b, c, -1, 1) == ""  # the next launch is none the worse


def test_load_matrices(call) -> None:
    source, r = aligned_bytes(2048), torch.zeros(4, 32, dtype=torch.int32)
    offsets = torch.randperm(128)[:32].int() * 16
    assert call("load", source, 2048, offsets, r, 0) == ""
    rows = source.view(128, 16).view(torch.int32)[offsets.long() // 16].view(4, 32)
    assert torch.equal(r, rows)  # word t of row g is lane 4g + t's


def test_load_matrices_transposed(call) -> None:
    source, r = aligned_bytes(2048), torch.zeros(4, 32, dtype=torch.int32)
    offsets = torch.randperm(128)[:32].int() * 16
    assert call("load", source, 2048, offsets, r, 1) == ""
    rows = source.view(128, 16).view(torch.int16)[offsets.long() // 16].view(4, 8, 8)
    # Lane 4g + t gets column g of rows 2t and 2t + 1.
    assert torch.equal(r.view(torch.int16).view(4, 8, 4, 2), rows.transpose(1, 2).reshape(4, 8, 4, 2))


@pytest.mark.parametrize("distance", (1, 5, 31))
def test_shuffle_up_and_atomic_addition(call, distance) -> None:
    from_below, before = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int32)
    counter = torch.tensor([7], dtype=torch.int32)
    assert call("count", distance, from_below, counter, before) == ""
    lanes = torch.arange(32)
    assert torch.equal(from_below >> 33, torch.where(lanes < distance, lanes, lanes - distance))
    assert int(counter) == 7 + 64 and sorted(before.tolist()) == list(range(7, 71, 2))


@pytest.mark.parametrize(
    ("offset", "message"),
    [(8, "a misaligned address"), (2048, "outside the block's shared"), (-16, "outside the block's shared")],
)
def test_load_matrices_of_a_wrong_address(call, offset, message) -> None:
    offsets = torch.zeros(32, dtype=torch.int32)
    offsets[9] = offset
    r = torch.zeros(4, 32, dtype=torch.int32)
    assert message in call("load", aligned_bytes(2048), 2048, offsets, r, 0)


def test_lanes_at_different_instructions(call) -> None:
    assert "different instructions" in call("mixed")


# ---- asynchronous copies


def copied(call, source, threads=64, waits=2, commits=2, finishes=1, shared=0, far=0, by=0, bytes=16):
    out = torch.zeros(32 * threads, dtype=torch.uint8)
    error = call("copy", source, out, threads, waits, commits, finishes, shared, by, bytes, far)
    return error, out.view(2, threads, 16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bytes", (16, 8, 2, 0))
@pytest.mark.parametrize("copies", ("late", "early"))
def test_copies_that_are_waited_for(call, monkeypatch, order, bytes, copies) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    source = aligned_bytes(32 * 64)
    error, out = copied(call, source, bytes=bytes)
    assert error == ""
    assert torch.equal(out[..., :bytes], source.view(2, 64, 16)[..., :bytes])
    assert (out[..., bytes:] == 0).all()


@pytest.mark.parametrize(
    ("waits", "commits", "finished"), [(0, 2, 0), (1, 2, 1), (2, 1, 1), (2, 0, 0), (1, 1, 0)]
)
def test_copies_that_are_not_waited_for(call, waits, commits, finished) -> None:
    """Groups not waited for, and copies in no group yet, are not there."""
    source = aligned_bytes(32 * 64)
    error, out = copied(call, source, waits=waits, commits=commits)
    assert error == ""
    assert torch.equal(out[:finished], source.view(2, 64, 16)[:finished])
    assert (out[finished:] == NOT_READ).all()


def test_copies_are_at_their_place_at_once_where_asked_for(call, monkeypatch) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", "early")
    source = aligned_bytes(32 * 64)
    error, out = copied(call, source, waits=0)
    assert error == "" and torch.equal(out.flatten(), source)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ({"waits": 0, "finishes": 0}, "ended before it waited"),
        ({"shared": 8}, "a misaligned address"),
        ({"by": 2}, "from a misaligned address"),
        ({"bytes": 17}, "more than 16 bytes"),
        ({"bytes": -1}, "less than 0"),
        ({"far": 2048}, "outside the block's shared memory"),
        ({"far": -16}, "outside the block's shared memory"),
    ],
)
def test_misused_copies(call, misuse, message) -> None:
    assert message in copied(call, aligned_bytes(32 * 64 + 16), **misuse)[0]


# ---- barriers and bulk copies

ACTIONS = (
    "init",
    "publish",
    "sync",
    "syncwarp",
    "arrive",
    "expect",
    "wait",
    "test",
    "bulk",
    "store",
    "read",
)
ALL = -1
"""Every thread."""
BAR, BAR2, BAR3 = 512, 520, 528
"""Bytes of the shared memory of a script, of 1024, where its barriers are."""


def does(thread: int, action: str, barrier: int = BAR, value: int = 0, place: int = 0, source: int = 0):
    """A step of a script: instructions.cu says what the numbers mean."""
    return [thread, ACTIONS.index(action), barrier, value, place, source]


def ready(*barriers: tuple[int, int]) -> list[list[int]]:
    """Thread 0 makes barriers of (place, arrivals), as kernels should."""
    made = [does(0, "init", place, arrivals) for place, arrivals in barriers or [(BAR, 1)]]
    return [*made, does(0, "publish"), does(ALL, "sync")]


@pytest.fixture
def run_script(call) -> Callable[..., tuple[str, torch.Tensor, torch.Tensor]]:
    """Runs a block by a script; returns what went wrong, the source and what was read."""

    def run(*steps: list[int], threads: int = 64, device: int = 0) -> tuple[str, torch.Tensor, torch.Tensor]:
        source, out = aligned_bytes(1024), torch.zeros(1024, dtype=torch.uint8)
        table = torch.tensor(steps, dtype=torch.int32)
        return call("script", table, len(steps), threads, device, source, out), source, out

    return run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copies", ("late", "early"))
@pytest.mark.parametrize(("clusters", "ranks"), [(3, 1), (2, 2)])
@pytest.mark.parametrize(("threads", "slots", "pieces"), [(64, 1, 5), (96, 3, 3), (160, 4, 41)])
def test_a_ring_of_bulk_copies(
    call, monkeypatch, order, copies, clusters, ranks, threads, slots, pieces
) -> None:
    """Barriers over many phases, every reader waiting for each."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    source = aligned_bytes(clusters * ranks * pieces * 48)
    out = torch.zeros_like(source)
    assert call("ring", source, out, clusters, ranks, threads, slots, pieces, 48, 1, 1) == ""
    assert torch.equal(out, source)


def test_a_ring_whose_readers_do_not_wait(call, monkeypatch) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", "late")
    for order in ORDERS:
        monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
        source = aligned_bytes(2 * 48)
        out = torch.zeros_like(source)
        error = call("ring", source, out, 1, 1, 64, 2, 2, 48, 0, 0)
        assert "byte 96 of the dynamic shared memory of block 0 has bulk copies that were not fin" in error
        assert (out == NOT_READ).all()


def test_a_ring_filled_again_too_early_shows(call, monkeypatch) -> None:
    """With early copies and the filling warp ahead: what it wrote last is read first, and no more comes."""
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", "early")
    source = aligned_bytes(6 * 48)
    out = torch.zeros_like(source)
    error = call("ring", source, out, 1, 1, 64, 2, 6, 48, 1, 0)
    assert "lacks 1 of 1 arrivals in phase 3" in error  # readers took the end of phase 2 for that of 0
    assert torch.equal(out.view(6, 48)[:2], source.view(6, 48)[4:])


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copies_come_as_late_as_they_may(run_script, monkeypatch, order) -> None:
    """Not while a thread can go on, not for a phase that lacks arrivals, and only of the phase waited for."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    for copies in ("late", "early"):
        monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
        error, source, out = run_script(
            *ready((BAR, 2), (BAR2, 1), (BAR3, 1)),
            does(0, "bulk", BAR, 32, place=64, source=0),
            does(0, "expect", BAR, 32),
            does(0, "expect", BAR2, 16),
            does(0, "bulk", BAR2, 16, place=128, source=32),
            does(0, "bulk", BAR3, 16, place=160, source=48),
            does(0, "expect", BAR3, 16),
            does(1, "wait", BAR),
            does(1, "read", value=32, place=64, source=0),
            does(1, "read", value=16, place=160, source=32),  # no thread has waited for that
            does(33, "wait", BAR2),
            does(33, "read", value=16, place=128, source=64),
            does(33, "read", value=32, place=64, source=96),  # thread 1 waits, but for this arrival
            does(33, "arrive", BAR),
            does(ALL, "sync"),
            does(40, "wait", BAR3),
            does(40, "read", value=16, place=160, source=128),
        )
        assert error == ""
        waited_for = torch.cat((out[:32], out[64:80], out[128:144]))
        assert torch.equal(waited_for, source[:64])
        not_waited_for = torch.cat((out[96:128], out[32:48]))
        there = torch.cat((source[:32], source[48:64]))
        assert torch.equal(not_waited_for, there if copies == "early" else torch.full_like(there, NOT_READ))


def test_phases_alternate(run_script) -> None:
    """A wait for the parity before the phase under way passes, first for 1; one for its own does not."""
    error, *_ = run_script(
        *ready((BAR, 1)),
        does(0, "wait", value=1),
        does(0, "arrive"),
        does(ALL, "sync"),
        does(ALL, "wait", value=0),
        does(ALL, "test", value=0),
        does(ALL, "sync"),
        does(0, "arrive"),
        does(ALL, "wait", value=1),
    )
    assert error == ""


@pytest.mark.parametrize("order", ORDERS)
def test_arrivals_of_many_threads(run_script, monkeypatch, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    steps = ready((BAR, 63))
    for phase in range(6):
        steps += [
            *(does(thread, "arrive") for thread in range(63)),
            does(ALL, "wait", value=phase % 2),
            does(ALL, "sync"),
        ]
    assert run_script(*steps)[0] == ""
    error = run_script(*ready((BAR, 64)), *steps[3 : 3 + 64])[0]
    assert "64 for the end of a phase" in error
    assert "byte 512 of the dynamic shared memory of block 0 lacks 1 of 64 arrivals in phase 0" in error


@pytest.mark.parametrize("copies", ("late", "early"))
@pytest.mark.parametrize("order", ("forward", "reverse"))
@pytest.mark.parametrize(
    ("announced", "copied", "lacks"),
    [
        (48, (32,), "lacks 0 of 1 arrivals and 16 bytes in phase 0"),
        (32, (), "lacks 0 of 1 arrivals and 32 bytes in phase 0"),
        (16, (32,), "lacks 0 of 1 arrivals and took 16 bytes not announced in phase 0"),
        (None, (32,), "lacks 1 of 1 arrivals"),
    ],
)
def test_a_wait_that_will_not_end(run_script, monkeypatch, order, copies, announced, copied, lacks) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    steps = [*ready()]
    if announced is not None:
        steps.append(does(0, "expect", value=announced))
    steps += [does(0, "bulk", value=size) for size in copied]
    error = run_script(*steps, does(5, "wait"), does(6, "test"))[0]
    assert "2 for the end of a phase, 62 ended; the barrier at byte 512 of the dynamic" in error
    assert lacks in error


def test_all_barriers_that_threads_wait_for_are_named(run_script) -> None:
    error = run_script(*ready((BAR, 1), (BAR2, 7)), does(3, "wait", BAR), does(9, "wait", BAR2))[0]
    assert "byte 512" in error and "byte 520" in error and "lacks 7 of 7 arrivals" in error
    assert run_script(*ready())[0] == ""  # the next launch is none the worse


@pytest.mark.parametrize(
    ("order", "message"), [("reverse", "ended a second phase before"), ("forward", "lacks 1 of 1 arrivals")]
)
def test_a_phase_whose_end_a_thread_misses(run_script, monkeypatch, order, message) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    assert message in run_script(*ready(), does(0, "arrive"), does(0, "arrive"), does(1, "wait"))[0]


LEFT_WRONG = {
    "not finished": ([does(0, "expect", value=16), does(0, "bulk", value=16)], {"late": "were not finished"}),
    "not announced": ([does(0, "bulk", value=16)], {"late": "were not finished", "early": "had announced"}),
    "not brought": ([does(0, "expect", value=16)], dict.fromkeys(("late", "early"), "that no copy brought")),
    # Bytes of which one phase has too few and the next too many.
    "shifted": (
        [
            does(0, "bulk", value=16),
            does(0, "bulk", value=16, place=16),
            does(0, "expect", value=16),
            does(0, "wait"),
        ],
        {"late": "were not finished"},
    ),
    "overwritten": (
        [does(3, "store", place=BAR + 4)],
        dict.fromkeys(("late", "early"), "was overwritten"),
    ),
    "overwritten by a copy": (
        [does(0, "expect", value=32), does(0, "bulk", value=32, place=BAR - 16), does(0, "wait")],
        dict.fromkeys(("late", "early"), "was overwritten"),
    ),
}
LEFT_WRONG["not finished"][1]["early"] = "for which no thread waited"
LEFT_WRONG["shifted"][1]["early"] = "lacks 0 of 1 arrivals and took 16 bytes not announced"


@pytest.mark.parametrize("copies", ("late", "early"))
@pytest.mark.parametrize("case", LEFT_WRONG)
def test_what_a_block_leaves_wrong(run_script, monkeypatch, case, copies) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    steps, messages = LEFT_WRONG[case]
    assert messages[copies] in run_script(*ready(), *steps)[0]


SENT = does(0, "expect", value=16)
"""Before a copy of 16 bytes."""


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([*ready(), SENT, does(0, "bulk", value=16, place=8)], "a misaligned address"),
        ([*ready(), SENT, does(0, "bulk", value=16, source=8)], "bulk copy from a misaligned address"),
        ([*ready(), SENT, does(0, "bulk", value=8)], "no positive multiple of 16"),
        ([*ready(), SENT, does(0, "bulk", value=0)], "no positive multiple of 16"),
        ([*ready(), SENT, does(0, "bulk", value=-16)], "no positive multiple of 16"),
        ([*ready(), SENT, does(0, "bulk", value=32, place=1008)], "outside the block's shared memory"),
        ([*ready(), SENT, does(0, "bulk", value=16, place=-16)], "outside the block's shared memory"),
        ([*ready(), SENT, does(0, "bulk", 1 << 20, value=16)], "outside the block's shared memory"),
        ([*ready(), does(1, "arrive", 1024)], "outside the block's shared memory"),
        ([*ready(), does(1, "wait", -8)], "outside the block's shared memory"),
        ([*ready(), does(1, "expect", BAR + 4)], "a misaligned address"),
        ([does(0, "init", 1020, 1)], "a misaligned address"),
        ([does(0, "init", 1024, 1)], "outside the block's shared memory"),
        ([does(0, "init", BAR, 0)], "byte 512 of the dynamic shared memory of block 0 is initialised for a"),
        ([does(0, "init", BAR, 1 << 20)], "wrong number of arrivals"),
        ([does(0, "init", BAR, 1), does(0, "init", BAR, 1)], "is initialised twice"),
        ([*ready(), does(1, "arrive", BAR2)], "byte 520 of the dynamic shared memory of block 0 is not init"),
        ([*ready(), does(1, "wait", BAR2)], "is not initialised"),
        ([*ready(), does(0, "bulk", BAR2, 16)], "is not initialised"),
        ([*ready(), does(0, "store", place=BAR), does(0, "arrive")], "was overwritten"),
        ([*ready(), does(0, "expect", value=-16)], "is announced less than 0 bytes"),
        ([*ready(), does(0, "expect", value=1 << 20)], "more bytes than it can count"),
        ([*ready(), SENT, does(0, "arrive")], "has an arrival more than a phase takes"),
        ([*ready(), does(0, "wait", value=2)], "a parity that is neither 0 nor 1"),
        ([does(0, "init", value=1), SENT, does(0, "bulk", value=16)], "without publish_barriers()"),
        (
            [does(0, "init", value=1), does(1, "publish"), does(ALL, "sync"), does(0, "bulk", value=16)],
            "without publish_barriers()",
        ),
        ([does(0, "init", value=1), does(32, "wait")], "used by another warp with no barrier of the block"),
        ([does(ALL, "sync"), does(0, "init", value=1), does(32, "arrive")], "used by another warp"),
    ],
)
def test_misused_barriers_and_bulk_copies(run_script, steps, message) -> None:
    assert message in run_script(*steps)[0]


def test_a_barrier_within_a_warp(run_script) -> None:
    made = [does(0, "init", value=1), does(0, "publish"), does(ALL, "syncwarp")]
    steps = [SENT, does(0, "bulk", value=16), does(ALL, "wait"), does(9, "read", value=16)]
    error, source, out = run_script(*made, *steps, threads=32)
    assert error == "" and torch.equal(out[:16], source[:16])


@pytest.mark.parametrize("action", ("init", "publish", "arrive", "wait", "bulk"))
def test_barriers_need_compute_capability_9(run_script, monkeypatch, action) -> None:
    assert "need sm_90" in run_script(does(0, action, value=1), device=1)[0]
    monkeypatch.setenv("QSUN_EMULATOR_CAPABILITY", "8.0")
    assert "need sm_90" in run_script(does(0, action, value=1))[0]


# ---- shared memory


def test_loads_and_stores_by_address(call) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    assert call("access", out, 12) == ""
    one = 0x3F800000  # 1.0
    assert out.tolist() == [1, one, 0xABCD0003 - 2**32, 4, 0xABCD, 4]
    assert "a misaligned address" in call("access", out, 2)
    assert "outside the block's shared memory" in call("access", out, 16)


def test_dynamic_shared_memory_is_filled_for_every_block(call) -> None:
    seen = torch.zeros(1000, dtype=torch.uint8)
    assert call("shared", seen, 1000, 999, -1) == ""
    assert (seen == NOT_READ).all()


@pytest.mark.parametrize(
    ("at", "message"), [(1000, "wrote past"), (1003, "wrote past"), (-1, "wrote before")]
)
def test_a_write_outside_dynamic_shared_memory(call, at, message) -> None:
    assert message in call("shared", torch.zeros(1000, dtype=torch.uint8), 1000, at, -1)


def test_much_dynamic_shared_memory_has_to_be_asked_for(call) -> None:
    most = 227 * 1024
    seen = torch.zeros(most, dtype=torch.uint8)
    assert call("shared", seen, 48 * 1024, 0, 48 * 1024) == ""
    assert "allowed 49152" in call("shared", seen, 48 * 1024 + 1, 0, -1)
    assert "more shared memory" in call("shared", seen, most, 0, most + 1)
    assert call("shared", seen, most, most - 1, most) == ""
    assert (seen == NOT_READ).all()
    assert call("shared", seen, 16, 0, 48 * 1024) == ""


# ---- clusters and overlap


def in_clusters(call, misuse="none", ranks=4, threads=64, device=0, grid_y=None):
    out = torch.zeros(2, ranks, threads)
    grid_y = ranks if grid_y is None else grid_y
    return call("cluster", out, device, 2, ranks, grid_y, threads, MISUSES.index(misuse)), out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("ranks", "threads"), [(1, 32), (2, 96), (4, 64), (8, 512)])
def test_blocks_of_a_cluster_read_one_another(call, monkeypatch, order, ranks, threads) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    error, out = in_clusters(call, ranks=ranks, threads=threads)
    assert error == ""
    sums = [sum(rank + 1 + 100 * cluster for rank in range(ranks)) for cluster in range(2)]
    assert (out == torch.tensor(sums).view(2, 1, 1)).all()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("no last barrier", "no cluster barrier follows"),
        ("static", r"static __shared__"),
        ("no such rank", "not in the cluster"),
        ("half a warp", "some lanes of a warp"),
        ("foreign", "outside the block's shared memory"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_misused_clusters(call, monkeypatch, misuse, message, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    assert message in in_clusters(call, misuse)[0]


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_cluster_barrier_shows(call, monkeypatch, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    error, out = in_clusters(call, "no first barrier")
    assert error == "" and out.isnan().any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("none", ""),
        ("no first barrier", "no cluster barrier before"),
        ("no last barrier", "no cluster barrier follows"),
    ],
)
def test_blocks_of_a_cluster_send_to_one_another(call, monkeypatch, misuse, message, order) -> None:
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    out = torch.zeros(4, 64)
    error = call("sending", out, 4, 64, MISUSES.index(misuse))
    if message:
        assert message in error
    else:
        assert error == "" and (out == 1 + 2 + 3 + 4).all()


def test_refused_clusters(call) -> None:
    assert "a cluster of 9 blocks" in in_clusters(call, ranks=9)[0]
    assert "whole number of clusters" in in_clusters(call, ranks=4, grid_y=6)[0]
    assert "need sm_90" in in_clusters(call, ranks=2, device=1)[0]
    assert in_clusters(call, ranks=1, device=1)[0] == ""


def test_a_kernel_that_overlaps_its_producer_waits_for_it(call) -> None:
    assert call("dependent", 1, -1) == ""
    assert call("dependent", 1, 1) == "", "one block is enough"
    assert call("dependent", 0, 5) == ""
    assert "without wait_for_producers()" in call("dependent", 1, 5)


def test_devices(call, monkeypatch) -> None:
    major, shared = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for setting, device, expected in (("9.0", 0, 9), ("8.0", 0, 8), ("9.0", 1, 8)):
        monkeypatch.setenv("QSUN_EMULATOR_CAPABILITY", setting)
        assert call("device_props_of", device, major, shared) == ""
        assert (int(major), int(shared)) == (expected, {9: 232_448, 8: 166_912}[expected])


# ---- arithmetic on pairs


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """value rounded to the nearest of dtype, ties to even."""
    info = torch.finfo(dtype)
    mantissa, lowest = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}[dtype]
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), lowest)
    exponent += exponent > lowest and Fraction(2) ** exponent > size
    while exponent > lowest and Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (exponent - mantissa)
    rounded = round(size / step) * step
    result = float(rounded) if rounded <= Fraction(info.max) else float("inf")
    return result if value > 0 else -result


def test_nearest() -> None:
    for dtype in HALVES:
        values = torch.cat((torch.randn(500), torch.randn(500) * torch.finfo(dtype).smallest_normal / 8))
        for value in values.tolist():
            assert nearest(Fraction(value), dtype) == float(torch.tensor(value).to(dtype))


def halves(count: int, dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """Finite values of every exponent, and of a few: sums of near numbers cancel, far ones round hard."""
    everything = torch.randint(0, 2**16, (count // 2,), generator=source).to(torch.uint16).view(dtype)
    near = torch.randn(count - count // 2, generator=source).to(dtype)
    return torch.cat((torch.where(everything.isfinite(), everything, near[: count // 2]), near))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pairs_are_rounded_once(call, dtype) -> None:
    source = torch.Generator().manual_seed(1)
    n = 20_000
    a, b, c = (halves(2 * n, dtype, source)[torch.randperm(2 * n, generator=source)] for _ in range(3))
    # Products one step beside a tie, and a c that decides it.
    a[:2000], c[:2000] = 1 + 2.0**-5, 2.0 ** torch.randint(-24, -10, (2000,), generator=source).double()
    out = torch.zeros(5, 2 * n, dtype=dtype)
    assert call("pairs", CODES[dtype], a, b, c, out, n) == ""
    for i, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        x, y, z = Fraction(x), Fraction(y), Fraction(z)
        expected = (nearest(x * y + z, dtype), nearest(x + y, dtype), nearest(x * y, dtype))
        assert tuple(out[:3, i].tolist()) == expected, (x, y, z)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pairs_of_special_values(call, dtype) -> None:
    infinity, nan = float("inf"), float("nan")
    a = torch.tensor([infinity, infinity, nan, -0.0, 0.0, torch.finfo(dtype).max], dtype=dtype)
    b = torch.tensor([1, 0, 1, 1, -1, 2], dtype=dtype)
    c = torch.tensor([-infinity, 1, 1, -0.0, 0, 0], dtype=dtype)
    out = torch.zeros(5, 6, dtype=dtype)
    assert call("pairs", CODES[dtype], a, b, c, out, 3) == ""
    expected = torch.stack(
        (torch.addcmul(c.double(), a.double(), b.double()), (a + b).double(), (a * b).double())
    )
    assert torch.equal(out[:3].double().nan_to_num(7), expected.to(dtype).double().nan_to_num(7))
    assert out[2, 3:5].signbit().all() and out[0, 3].signbit()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_of_float32_pairs(call, dtype) -> None:
    source = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (2, 50_000), generator=source).int()
    values = bits.view(torch.float32)
    values[:, :20_000] = torch.randn(2, 20_000, generator=source)
    out = torch.zeros(5, 50_000, 2, dtype=dtype)
    nothing = torch.zeros(50_000, dtype=torch.int32)
    assert (
        call("pairs", CODES[dtype], values[0].contiguous(), values[1].contiguous(), nothing, out, 50_000)
        == ""
    )
    expected = values.T.to(dtype)
    assert torch.equal(out[3].isnan(), expected.isnan())
    assert torch.equal(out[3].nan_to_num(1), expected.nan_to_num(1))


def test_byte_permutation(call) -> None:
    low, high, selector = 0x83_02_01_80, 0x07_86_05_04, np.array([0x3210, 0x7654, 0x0426, 0xB8F1], np.uint32)
    a, b, c = (torch.from_numpy(np.full(4, one, np.uint32).view(np.int32)) for one in (low, high, 0))
    c[:] = torch.from_numpy(selector.view(np.int32))
    out = torch.zeros(5, 4, dtype=torch.int32)
    assert call("pairs", 1, a, b, c, out, 4) == ""
    # With the nibble's high bit, a byte's sign eight times.
    assert out[4].numpy().view(np.uint32).tolist() == [low, high, 0x80_04_02_86, 0xFF_FF_00_01]


# ---- codes of a panel block


def word_and_bits(bits: int, step: int, r: int, high: int) -> list[tuple[int, int]]:
    """Where the bits of an element's code are in half a block: (word of the lane, bit), the lowest first."""
    turn = {2: 3, 3: 1, 4: 2, 8: 0}[bits]
    if bits == 8:
        return [(2 * step + r // 2, 8 * (r % 2 * 2 + high) + i) for i in range(8)]
    if bits == 3:
        of_step = [(3 * r + i) for i in range(3)]
        places = [(step, bit) if step < 3 else (bit // 4, 12 + bit % 4) for bit in of_step]
    elif bits == 4:
        places = [(step, 4 * r + i) for i in range(4)]
    else:
        places = [(step // 2, 8 * (step % 2) + 2 * r + i) for i in range(2)]
    return [(word, (16 * high + bit + turn) % 32) for word, bit in places]


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_of_a_panel(call, dtype, bits) -> None:
    """(code - zero), exact; (code - zero) * scale, rounded once; base + code, and what takes its base off."""
    generator = np.random.default_rng(bits)
    is_half = dtype == torch.float16
    shift = 0 if is_half or bits < 8 else 15
    for zero in {0, 1, 2 ** (bits - 1), 2**bits - 1}:
        words = generator.integers(0, 2**32, 2 * bits, dtype=np.uint32)
        codes = torch.zeros(8, 4, 2, dtype=torch.float64)
        for step, r, high in np.ndindex(8, 4, 2):
            for i, (word, bit) in enumerate(word_and_bits(bits, step % 4, r, high)):
                codes[step, r, high] += (int(words[step // 4 * bits + word]) >> bit) % 2 << i
        scale = torch.randn(1).to(dtype)
        exact, scaled, bare = (torch.zeros(8, 4, 2, dtype=dtype) for _ in range(3))
        factors = torch.zeros(2, 2, dtype=torch.float32)  # of rows g, g + 8: base, what stands for one
        ones = torch.zeros(2, 2, 2, dtype=dtype)  # of the same: -1 and -(base + 2^(bits - 1)), as bare floats
        lane_words = torch.from_numpy(words.view(np.int32))
        scale_bits = int(scale.view(torch.uint16))
        outputs = (exact, scaled, bare, factors, ones)
        assert call("codes", CODES[dtype], bits, lane_words, zero, scale_bits, *outputs) == ""
        assert torch.equal(exact.double() * 2.0**shift, codes - zero)
        assert torch.equal(scaled, ((codes - zero) * scale.double()).to(dtype))
        if bits == 8:
            continue
        base, one = factors.double().unbind(1)
        assert torch.equal(bare.double() / one[[0, 1, 0, 1], None] - base[[0, 1, 0, 1], None], codes)
        assert torch.equal(base, base * 0) if is_half else bool((base >= 2**bits).all())
        minus = torch.stack((-one, -(base + 2 ** (bits - 1)) * one), dim=1)
        assert torch.equal(ones.double(), minus[..., None].expand(2, 2, 2))
