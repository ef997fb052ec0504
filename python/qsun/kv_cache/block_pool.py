"""Which blocks of the KV cache are free, held, or free but worth keeping.

A block is in one of three states:

    free -- allocate --> held by n >= 1 owners -- last release --> free
                            ^                          |
                            +-- share -- idle <--------+  (a block the prefix index knows)
                                          |
                                          +-- allocate, when nothing is free: least recently used first

Sharing copies nothing: a shared block is full, so none of its owners will write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qsun.errors import OutOfCacheBlocks

__all__ = ["BlockPool"]


class BlockPool:
    """Counts owners of `num_blocks` blocks and remembers which module's KV each of them holds.

    evicted: called with the id of an idle block before its content is lost; it has to `forget` the block.
    """

    def __init__(self, num_blocks: int, evicted: Callable[[int], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._evicted = evicted
        self._owners = [0] * num_blocks
        self._provenance: list[str | None] = [None] * num_blocks
        self._cached = [False] * num_blocks
        # Low ids first, so that a small load touches a small part of the cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Insertion order is the order of release.
        self._idle: dict[int, None] = {}
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can supply: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks without an owner whose content is kept for the prefix index."""
        return len(self._idle)

    def owners(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._owners[block]

    def provenance(self, block: int) -> str | None:
        """The fingerprint of the module whose sequence holds (or last held) a block."""
        return self._provenance[block]

    def is_cached(self, block: int) -> bool:
        """True while the prefix index knows the block."""
        return self._cached[block]

    def is_idle(self, block: int) -> bool:
        """True when nobody holds the block and its content is kept."""
        return block in self._idle

    def allocate(self, count: int, provenance: str) -> list[int]:
        """Hand out `count` blocks with one owner each, for KV of the module `provenance`.

        Raises OutOfCacheBlocks, changing nothing, when fewer are available.
        """
        if count > self.num_available:
            raise OutOfCacheBlocks(
                f"{count} cache blocks asked for, {self.num_available} of {self.num_blocks} available"
            )
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            assert self._owners[block] == 0 and not self._cached[block]
            self._owners[block] = 1
            self._provenance[block] = provenance
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block = next(iter(self._idle))
        if self._evicted is not None:
            # The listener forgets the block (and whatever hung on it), which frees it.
            self._evicted(block)
        else:
            self.forget(block)
        self.num_evictions += 1
        return self._free.pop()

    def share(self, blocks: Iterable[int], provenance: str) -> None:
        """Add an owner to blocks that hold KV of the module `provenance`.

        Raises ValueError, changing nothing, when a block holds another module's KV or nothing worth sharing.
        """
        blocks = list(blocks)
        for block in blocks:
            if self._owners[block] == 0 and block not in self._idle:
                raise ValueError(f"block {block} is free: there is nothing in it to share")
            if self._provenance[block] != provenance:
                raise ValueError(
                    f"block {block} holds KV of module {self._provenance[block]!r},"
                    f" it cannot be shared with module {provenance!r}"
                )
        for block in blocks:
            self._idle.pop(block, None)
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take one owner from each block.  Those released first are the first to be evicted."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} released more often than it was handed out"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self._cached[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """Note that the prefix index knows a held block: it will be idle, not free, once released."""
        assert self._owners[block] > 0, f"block {block} has no owner whose KV could be kept"
        self._cached[block] = True

    def forget(self, block: int) -> None:
        """Note that the prefix index no longer knows a block."""
        self._cached[block] = False
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance: every block is in exactly one state."""
        free, idle = set(self._free), set(self._idle)
        held = {block for block in range(self.num_blocks) if self._owners[block] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle and not free & held and not idle & held, "a block is in two states"
        assert len(free) + len(idle) + len(held) == self.num_blocks, "a block is lost"
        assert all(self._cached[block] for block in idle), "an idle block is not in the index"
        assert not any(self._cached[block] for block in free), "a free block is in the index"
        assert all(owners >= 0 for owners in self._owners), "a block has negative owners"
