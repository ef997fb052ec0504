"""The clock: what it refuses, and that it tells a cost that is known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from qsun_kernels.testing import timing

CPU = torch.device("cpu")


def rotation(total: int, copies: int) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.randint(0, 100, (total // copies // 4 + 1,), dtype=torch.int32),) for _ in range(copies)]


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> int:
    """A last-level cache of 64 KiB, so that a rotation past it costs nothing."""
    size = 64 << 10
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: size)
    return size


def test_the_cache_of_this_machine_is_found() -> None:
    size = timing.last_level_cache_bytes(CPU)
    assert 1 << 18 <= size <= 1 << 33


def cache_entry(root: Path, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(text + "\n")


def test_last_level_is_counted_once_for_each_distinct_cache(tmp_path: Path) -> None:
    for cpu in range(4):
        cache_entry(tmp_path, cpu, 0, 1, "Data", "32K", str(cpu))
        cache_entry(tmp_path, cpu, 1, 1, "Instruction", "64K", str(cpu))
        cache_entry(tmp_path, cpu, 2, 3, "Unified", "16M", "0-1" if cpu < 2 else "2-3")
    assert timing._cpu_cache_bytes(tmp_path) == 2 * (16 << 20)
    assert timing._cpu_cache_bytes(tmp_path / "nothing") == 0


@pytest.mark.parametrize("share_of_cache", [1 / 1000, 1 / 7, 1, 50])
def test_enough_copies_really_exceed_the_cache(share_of_cache: float) -> None:
    cache = timing.last_level_cache_bytes(CPU)
    size = int(share_of_cache * cache)
    copies = timing.copies_to_overflow(size, CPU)
    assert copies >= 2
    assert copies * size >= timing.OVERFLOW * cache
    # One copy fewer would not do, unless two are enough.
    assert copies == 2 or (copies - 1) * size < timing.OVERFLOW * cache


def test_operands_too_small_to_leave_the_cache_are_refused(small_cache: int) -> None:
    with pytest.raises(ValueError, match=r"bytes_per_copy is 8: .* expected at most 8192"):
        timing.copies_to_overflow(8, CPU)
    with pytest.raises(ValueError, match="bytes_per_copy is 0, expected at least 1"):
        timing.copies_to_overflow(0, CPU)


def test_a_rotation_that_fits_the_cache_is_refused(small_cache: int) -> None:
    timing.check_rotation(rotation(3 * small_cache, 4), CPU)
    with pytest.raises(ValueError, match=r"distinct bytes in 4 copies.*warm cache"):
        timing.check_rotation(rotation(3 * small_cache - 4096, 4), CPU)


def test_copies_that_share_memory_do_not_count(small_cache: int) -> None:
    one = torch.randint(0, 100, (small_cache // 2,), dtype=torch.int32)
    aliases = [(one.view(-1),), (one[8:],), (one.view(torch.float32),)]
    assert timing.distinct_bytes(t for copy in aliases for t in copy) == one.nbytes
    with pytest.raises(ValueError, match="warm cache"):
        timing.check_rotation(aliases, CPU)


def test_one_copy_is_refused_however_large(small_cache: int) -> None:
    with pytest.raises(ValueError, match="streamed has 1 copies, expected at least 2"):
        timing.check_rotation(rotation(10 * small_cache, 1), CPU)


@pytest.mark.parametrize("value", [0, 7])
def test_constant_data_is_refused(small_cache: int, value: int) -> None:
    copies = rotation(4 * small_cache, 4)
    copies[2] = (torch.full((small_cache,), value, dtype=torch.int32),)
    with pytest.raises(ValueError, match=r"streamed\[2\].*one repeated value"):
        timing.check_rotation(copies, CPU)


def test_every_copy_is_called_equally_often_and_in_turn(small_cache: int) -> None:
    copies = rotation(4 * small_cache, 4)
    order: list[int] = []
    calls = [lambda i=i: (time.sleep(100e-6), order.append(i)) for i in range(4)]
    result = timing.time_calls(calls, copies, device=CPU, seconds=0.01)
    assert order == [i % 4 for i in range(len(order))]
    assert result.method == "cpu" and result.copies == 4 and result.samples >= 7


def test_a_known_cost_is_told(small_cache: int) -> None:
    calls = [lambda: time.sleep(2e-3)] * 4
    result = timing.time_calls(calls, rotation(4 * small_cache, 4), device=CPU, seconds=0.05)
    # Sleep never returns early; on a busy machine it may return late.
    assert 2000 <= result.us < 20000


def test_calls_and_operands_must_pair(small_cache: int) -> None:
    with pytest.raises(ValueError, match="calls has 3 entries, expected 4"):
        timing.time_calls([lambda: None] * 3, rotation(4 * small_cache, 4), device=CPU)


def test_steps_are_timed_by_the_wall_clock() -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        time.sleep(1e-3)

    result = timing.time_steps(step, device=CPU, count=5, warm_up=2)
    assert count == 7 and result.samples == 5 and result.us >= 1000
    with pytest.raises(ValueError, match="count is 0, expected at least 1"):
        timing.time_steps(step, device=CPU, count=0)


def test_read_bandwidth_of_the_cpu_is_plausible() -> None:
    speed = timing.read_bandwidth(CPU, probe_bytes=8 << 20)
    assert 1e8 < speed < 1e13


@pytest.mark.gpu
def test_read_bandwidth_of_the_gpu_reads_every_byte(device: torch.device) -> None:
    speed = timing.read_bandwidth(device)
    assert 1e11 < speed < 2e13


@pytest.mark.gpu
def test_graph_timing_reads_from_memory(device: torch.device) -> None:
    """A copy between rotating buffers cannot beat the read bandwidth; between two warm ones it can."""
    cache = timing.last_level_cache_bytes(device)
    copies = timing.copies_to_overflow(cache // 4, device)
    buffers = [torch.randn(cache // 16, device=device) for _ in range(copies)]
    out = torch.empty_like(buffers[0])
    calls = [lambda b=b: torch.add(b, 1.0, out=out) for b in buffers]
    result = timing.time_calls(calls, [(b,) for b in buffers], device=device, seconds=0.1)
    assert result.method == "cuda-graph" and result.calls % copies == 0
    assert buffers[0].nbytes / (result.us * 1e-6) < 1.05 * timing.read_bandwidth(device)


@pytest.mark.gpu
@pytest.mark.damaged
def test_stream_read_refuses_a_buffer_it_would_not_read_whole(device: torch.device) -> None:
    from qsun_kernels.testing.stream_read import PATTERNS, StreamRead, granule_bytes

    granule = granule_bytes(device)
    with pytest.raises(
        ValueError, match=f"buffer has {granule - 16} bytes, expected a positive multiple of {granule}"
    ):
        StreamRead(torch.zeros((granule - 16) // 4, dtype=torch.int32, device=device), PATTERNS[0])
    with pytest.raises(ValueError, match=r"buffer is torch\.float32"):
        StreamRead(torch.zeros(granule // 4, device=device), PATTERNS[0])
