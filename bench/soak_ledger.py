"""What a soak has seen: counts, what should not have been, and memory over time."""

from __future__ import annotations

import gc
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

_KEPT_VIOLATIONS = 10
_LEAST_SAMPLES = 12
_LEAST_SWAPPED = 30
_SLACK: Mapping[str, tuple[float, float]] = {
    "host": (32 << 20, 0.03),
    "device": (32 << 20, 0.03),
    "objects": (1000, 0.0),
}
"""What may come and go: so much, or such a share. An object that every request leaves behind is far more."""


@dataclass(slots=True)
class Ledger:
    """What was asked, what came of it, and what should not have.

    swapped_tokens: of answers that were also held against another model's reading of their prompt.
    found_tokens: those of them that are wrong by that, as nearly all should be.
    """

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_violations: int = 0
    checked_requests: int = 0
    checked_tokens: int = 0
    wrong_tokens: int = 0
    largest_gap: float = 0.0
    swapped_tokens: int = 0
    found_tokens: int = 0
    leaked_blocks: int = 0
    memory: list[Mapping[str, float]] = field(default_factory=list)

    def blame(self, what: str) -> None:
        """Note something that should not be."""
        self.num_violations += 1
        if len(self.violations) < _KEPT_VIOLATIONS:
            self.violations.append(what)

    def judge_the_check(self) -> None:
        """Whether a token that has read another model's KV would have been found."""
        if self.swapped_tokens >= _LEAST_SWAPPED and 2 * self.found_tokens < self.swapped_tokens:
            self.blame(
                f"the check is blind: of {self.swapped_tokens} tokens {self.found_tokens} would be wrong had"
                " they read another model's KV, expected at least half"
            )

    def sample_memory(self, seconds: float, device: torch.device) -> None:
        """Note what is in memory now. seconds: since the beginning."""
        gc.collect()
        self.memory.append(
            {
                "minute": round(seconds / 60, 2),
                "host": resident_bytes(),
                "device": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
                "objects": len(gc.get_objects()),
            }
        )

    def growth(self) -> Mapping[str, int | None]:
        """By how much memory has grown, in bytes and Python objects, None where it is too early to tell.

        What is more than may come and go is noted.
        """
        found: dict[str, int | None] = {}
        for name, (least, share) in _SLACK.items():
            grown = growth_of([sample[name] for sample in self.memory], least, share)
            found[name] = None if grown is None else round(grown[0])
            if grown is not None and grown[0] > grown[1]:
                unit = "objects" if name == "objects" else f"bytes of the {name}"
                self.blame(f"memory grew by {grown[0]:.0f} {unit}, expected at most {grown[1]:.0f}")
        return found


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth_of(samples: Sequence[float], least: float, share: float) -> tuple[float, float] | None:
    """(growth, slack): the median of the last third over that of the third before, and what may come and go.

    None of fewer than a dozen samples. The first third is left out: libraries keep a kernel for each shape
    that they meet, so the memory of a process grows until it has met them.
    """
    if len(samples) < _LEAST_SAMPLES:
        return None
    third = len(samples) // 3
    before, last = statistics.median(samples[-2 * third : -third]), statistics.median(samples[-third:])
    return last - before, max(least, share * before)
