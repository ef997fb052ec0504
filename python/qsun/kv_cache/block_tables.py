"""The blocks of sequences: what a sequence needs, what it can share, what it gives back.

Every change of a sequence's block list goes through `BlockTables`, so pool and prefix index stay in step.
"""

from __future__ import annotations

from qsun.core import Sequence
from qsun.kv_cache.block_pool import BlockPool
from qsun.kv_cache.prefix_index import PrefixIndex, PrefixNode

__all__ = ["BlockTables", "blocks_for", "slots_for"]


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)


def slots_for(block_ids: list[int], start: int, length: int, block_size: int) -> list[int]:
    """Slots (block * block_size + offset) of positions [start, start + length) of a sequence."""
    return [
        block_ids[position // block_size] * block_size + position % block_size
        for position in range(start, start + length)
    ]


class BlockTables:
    """A block pool, its prefix index, and the rules by which sequences use both.

    prefix_reuse: False keeps the index empty.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_reuse: bool = True) -> None:
        self.block_size = block_size
        self.prefix_reuse = prefix_reuse
        self.index = PrefixIndex(block_size)
        self.pool = BlockPool(num_blocks, self._drop)

    def _drop(self, block: int) -> None:
        for dropped in self.index.drop_block(block):
            self.pool.forget(dropped)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return blocks_for(num_tokens, self.block_size)

    def _matching(self, sequence: Sequence) -> list[PrefixNode]:
        if not self.prefix_reuse or sequence.given:
            return []
        usable = sequence.prefill_length
        if sequence.awaits_prefill_logits:
            # Its logits are asked for, so at least the last prompt token has to be computed.
            usable -= 1
        return self.index.match(sequence.tokens, sequence.fingerprint, usable)

    def missing_for_admission(self, sequence: Sequence) -> int:
        """Available blocks that `admit` would take: those to allocate and the idle ones to share."""
        matched = self._matching(sequence)
        to_allocate = self.blocks_for(len(sequence.tokens)) - len(matched)
        return to_allocate + sum(self.pool.is_idle(node.block) for node in matched)

    def admit(self, sequence: Sequence) -> None:
        """Give a queued sequence blocks for all its tokens, sharing what the index has of its prompt.

        Raises OutOfCacheBlocks, changing nothing, when they are not there.
        """
        assert not sequence.block_ids and sequence.num_computed == 0
        matched = self._matching(sequence)
        shared = [node.block for node in matched]
        # Shared first: as owned blocks they cannot be evicted by the allocation.
        self.pool.share(shared, sequence.fingerprint)
        try:
            fresh = self.pool.allocate(
                self.blocks_for(len(sequence.tokens)) - len(shared), sequence.fingerprint
            )
        except BaseException:
            self.pool.release(reversed(shared))
            raise
        sequence.block_ids = shared + fresh
        sequence.num_computed = len(shared) * self.block_size
        sequence.num_prefix_hits += sequence.num_computed
        sequence.num_indexed = len(shared)
        sequence.index_node = matched[-1] if matched else None

    def missing_for_next(self, sequence: Sequence) -> int:
        """Blocks to allocate before the last token's KV can be written: 0 or 1."""
        return max(0, self.blocks_for(len(sequence.tokens)) - len(sequence.block_ids))

    def grow(self, sequence: Sequence) -> None:
        """Allocate what `missing_for_next` counts.  Raises OutOfCacheBlocks, changing nothing."""
        missing = self.missing_for_next(sequence)
        if missing:
            sequence.block_ids += self.pool.allocate(missing, sequence.fingerprint)

    def extend(self, sequence: Sequence) -> None:
        """Allocate one block more than `grow` would, for a token that is not known yet.

        Raises OutOfCacheBlocks, changing nothing.
        """
        sequence.block_ids += self.pool.allocate(1, sequence.fingerprint)

    def reserve(self, sequence: Sequence) -> None:
        """Give a sequence without blocks fresh ones for all its tokens, to be filled from host memory.

        Raises OutOfCacheBlocks, changing nothing.
        """
        assert not sequence.block_ids
        sequence.block_ids = self.pool.allocate(self.blocks_for(len(sequence.tokens)), sequence.fingerprint)

    def register(self, sequence: Sequence) -> None:
        """Index the sequence's full blocks that its prefill module has written to the last position."""
        if not self.prefix_reuse or sequence.given:
            return
        written = min(sequence.num_computed, sequence.prefill_length)
        if sequence.index_node is not None and not sequence.index_node.live:
            sequence.num_indexed, sequence.index_node = 0, None
        while (sequence.num_indexed + 1) * self.block_size <= written:
            start = sequence.num_indexed * self.block_size
            tokens = tuple(sequence.tokens[start : start + self.block_size])
            block = sequence.block_ids[sequence.num_indexed]
            node = self.index.insert(sequence.index_node, tokens, sequence.fingerprint, block)
            if node.block == block:
                self.pool.keep(block)
            sequence.index_node = node
            sequence.num_indexed += 1

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence."""
        # The end of a chain goes first, so that eviction shortens chains instead of cutting their roots.
        self.pool.release(reversed(sequence.block_ids))
        sequence.block_ids = []
        sequence.num_indexed, sequence.index_node = 0, None

    def check(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the blocks that `sequences` hold."""
        self.pool.check()
        self.index.check()
        held: dict[int, int] = {}
        for sequence in sequences:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids), "a sequence holds a block twice"
            for block in sequence.block_ids:
                held[block] = held.get(block, 0) + 1
                assert self.pool.provenance(block) == sequence.fingerprint, "a block of two provenances"
        for block in range(self.pool.num_blocks):
            assert self.pool.owners(block) == held.get(block, 0), f"block {block} leaked or lost"
            assert self.pool.is_cached(block) == (block in self.index), (
                f"block {block}: index and pool differ"
            )
