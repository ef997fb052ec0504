"""Which examples make a step, and how a step is cut into packs that fit the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qsun.training.batch import Example


@dataclass(frozen=True, slots=True)
class DataOrder:
    """Every epoch is a new permutation, a function of seed and epoch alone: a step can be found again.

    num_examples: of the data.  batch_size: examples a step; the last step of an epoch takes what is left.
    """

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen once."""
        return -(-self.num_examples // self.batch_size)

    def step(self, step: int) -> list[int]:
        """The examples of step 0, 1, 2, ..."""
        epoch, part = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.num_examples, generator=generator)
        return [int(i) for i in order[part * self.batch_size : (part + 1) * self.batch_size]]


def cut_into_packs(examples: Sequence[Example], pack_tokens: int) -> list[list[Example]]:
    """Examples in packs of at most `pack_tokens` positions; one that is longer has a pack of its own.

    Sorted by length, so that the examples of a pack are alike and little is padded in attention.
    """
    packs: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=lambda e: -e.num_positions):
        if not packs or example.num_positions > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(example)
        room -= example.num_positions
    return packs
