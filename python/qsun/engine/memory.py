"""How much memory the KV cache gets, and how much host memory preempted requests may take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["MemoryPlan", "format_bytes", "parse_memory", "plan_memory", "refuse_fraction"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# Without a word from the caller: of the device memory that is free once all modules are loaded.
_DEFAULT_FRACTION = 0.9
# The same on a CPU, where the memory is everybody's.
_DEFAULT_CPU_BYTES = 2**30
# Where the system does not tell what is free.
_ASSUMED_BYTES = 4 * _DEFAULT_CPU_BYTES
_DEFAULT_SWAP_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}
_MOST_OF_HOST = 0.25


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the cache and of the swap space, in blocks of `block_size` tokens, and how they were found."""

    num_blocks: int
    swap_blocks: int
    block_size: int
    bytes_per_block: int
    origin: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        return self.num_blocks * self.bytes_per_block

    @property
    def swap_bytes(self) -> int:
        """Most host bytes that preempted requests take."""
        return self.swap_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        return (
            f"KV cache {format_bytes(self.kv_bytes)} = {self.num_blocks} blocks of {self.block_size} tokens,"
            f" {format_bytes(self.bytes_per_block)} each ({self.origin});"
            f" swap space {format_bytes(self.swap_bytes)} = {self.swap_blocks} blocks"
        )


def format_bytes(count: int) -> str:
    """A number of bytes for a reader: "1.50 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def parse_memory(value: int | float | str, name: str) -> int | float:
    """Bytes as an int, or a fraction in (0, 1] as a float.

    value: bytes (int), "2GiB" or "500 MB" (str), or a fraction (float).
    Raises ValueError naming the argument.
    """
    expected = f'{name} must be bytes (int), a size such as "2GiB" (str), or a fraction in (0, 1] (float)'
    if isinstance(value, bool):
        raise ValueError(f"{expected}, got {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{expected}, got {value!r}")
        return value
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(f"{expected}, got {value!r}")
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2].upper() in _UNITS:
            size = float(match[1]) * _UNITS[match[2].upper()]
            if math.isfinite(size):
                return int(size)
    raise ValueError(f"{expected}, got {value!r}")


def refuse_fraction(memory: int | float | str, device: torch.device) -> None:
    """Raise ValueError when `memory` is a fraction: only a GPU's memory is the engine's to take."""
    if isinstance(parse_memory(memory, "memory"), float):
        raise ValueError(
            f'memory is the fraction {memory!r} on {device}, expected bytes or a size such as "2GiB":'
            " fractions are of a GPU's free memory"
        )


def plan_memory(
    memory: int | float | str | None,
    swap_memory: int | str | None,
    *,
    bytes_per_block: int,
    block_size: int,
    useful_tokens: int,
    device: torch.device,
    reserve: int = 0,
) -> MemoryPlan:
    """Decide on the cache.

    memory: bytes of the KV cache, or the fraction of free device memory to give it; None for a default.
    swap_memory: most host bytes for preempted requests, 0 for none; None for a default.
    useful_tokens: what the largest batch of the longest requests would fill; a default takes no more.
    reserve: device bytes that a step needs beside the cache; a fraction leaves them free.
    Raises ValueError, with the numbers, when not a single block fits, or more is asked for than is free.
    """
    free = _free_bytes(device)
    available = _ASSUMED_BYTES if free is None else free
    useful_bytes = -(-useful_tokens // block_size) * bytes_per_block
    size = None if memory is None else parse_memory(memory, "memory")
    if isinstance(size, int):
        kv_bytes, origin = size, f"memory={memory!r}"
        if free is not None and size > free:
            # A CPU's memory is promised freely and then missed in the middle of an answer.
            raise ValueError(
                f"memory={memory!r} is {size} bytes for the KV cache, expected at most {free}:"
                f" {format_bytes(free)} are free on {device}"
            )
    elif device.type == "cuda":
        fraction = _DEFAULT_FRACTION if size is None else size
        kv_bytes = int(available * fraction) - reserve
        origin = (
            f"{fraction:.0%} of {format_bytes(available)} free on {device}"
            f" less {format_bytes(reserve)} for a step"
        )
        if size is None and kv_bytes > useful_bytes:
            kv_bytes, origin = useful_bytes, "the largest batch of the longest requests"
    elif size is None:
        kv_bytes, origin = min(
            (_DEFAULT_CPU_BYTES, f"default on {device.type}"),
            (int(available * _MOST_OF_HOST), f"{_MOST_OF_HOST:.0%} of {format_bytes(available)} free"),
            (useful_bytes, "the largest batch of the longest requests"),
        )
    else:
        raise AssertionError("a fraction without a GPU is refused when the engine is made")
    num_blocks = kv_bytes // bytes_per_block
    if num_blocks < 1:
        raise ValueError(
            f"memory leaves {max(kv_bytes, 0)} bytes for the KV cache ({origin}), expected at least"
            f" {bytes_per_block}: one block of {block_size} tokens"
        )
    return MemoryPlan(
        num_blocks,
        _swap_bytes(swap_memory, num_blocks * bytes_per_block, device) // bytes_per_block,
        block_size,
        bytes_per_block,
        origin,
    )


def _swap_bytes(swap_memory: int | str | None, kv_bytes: int, device: torch.device) -> int:
    if swap_memory is None:
        free = _free_bytes(torch.device("cpu"))
        host = int((_ASSUMED_BYTES if free is None else free) * _MOST_OF_HOST)
        # More than the cache itself could hold is of no use.
        return min(_DEFAULT_SWAP_BYTES.get(device.type, 0), kv_bytes, host)
    size = parse_memory(swap_memory, "swap_memory")
    if isinstance(size, float):
        raise ValueError(f'swap_memory must be bytes (int) or a size such as "2GiB" (str), got {size!r}')
    return size


def _free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device or in host memory; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        # What could be had without swapping: free pages alone would leave out the file cache.
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
