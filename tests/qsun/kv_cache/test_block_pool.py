"""The block pool against a model of it that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qsun.errors import OutOfCacheBlocks
from qsun.kv_cache.block_pool import BlockPool

NUM_BLOCKS = 7


def pool_of(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks)


def test_allocate_share_release() -> None:
    pool = pool_of(4)
    first = pool.allocate(3, "a")
    assert len(set(first)) == 3 and pool.num_available == 1
    pool.share(first[:2], "a")
    pool.release(first)
    assert [pool.owners(block) for block in first] == [1, 1, 0] and pool.num_available == 2
    pool.release(first[:2])
    assert pool.num_available == 4
    pool.check()


def test_cached_blocks_stay_until_they_are_needed_least_recent_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, lambda block: (evicted.append(block), pool.forget(block)))
    blocks = pool.allocate(4, "a")
    for block in blocks[:3]:
        pool.keep(block)
    pool.release([blocks[1], blocks[3], blocks[0], blocks[2]])
    assert pool.num_idle == 3 and pool.num_available == 4
    pool.share([blocks[1]], "a")
    pool.release([blocks[1]])  # used again, so now the most recent
    assert pool.allocate(1, "b") == [blocks[3]] and evicted == []
    assert pool.allocate(2, "b") == [blocks[0], blocks[2]] and evicted == [blocks[0], blocks[2]]
    assert pool.num_evictions == 2 and pool.is_cached(blocks[1])
    pool.check()


def test_a_refused_allocation_changes_nothing() -> None:
    pool = pool_of(3)
    held = pool.allocate(2, "a")
    with pytest.raises(OutOfCacheBlocks, match="2 cache blocks asked for, 1 of 3 available"):
        pool.allocate(2, "a")
    assert pool.num_available == 1
    pool.release(held)
    pool.check()


def test_provenance_guards_sharing() -> None:
    pool = pool_of(2)
    (block,) = pool.allocate(1, "alpha")
    with pytest.raises(ValueError, match=r"block 0 holds KV of module 'alpha'.*with module 'beta'"):
        pool.share([block], "beta")
    assert pool.owners(block) == 1
    with pytest.raises(ValueError, match="block 1 is free"):
        pool.share([1], "alpha")


def test_double_free_is_caught() -> None:
    pool = pool_of(2)
    blocks = pool.allocate(1, "a")
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


@pytest.mark.damaged
@pytest.mark.parametrize("num_blocks", [0, -3])
def test_an_empty_pool_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks must be at least 1, got {num_blocks}"):
        BlockPool(num_blocks)


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls; the expected state is a multiset of holdings and a set of kept blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[int] = set()
        self.pool = BlockPool(NUM_BLOCKS, self._evicted)
        self.holdings: list[tuple[str, list[int]]] = []

    def _evicted(self, block: int) -> None:
        assert block in self.kept and self.expected_owners(block) == 0
        self.kept.remove(block)
        self.pool.forget(block)

    def expected_owners(self, block: int) -> int:
        return sum(block in blocks for _, blocks in self.holdings)

    @rule(count=st.integers(0, 4), module=st.sampled_from("ab"))
    def allocate(self, count: int, module: str) -> None:
        unheld = sum(self.expected_owners(block) == 0 for block in range(NUM_BLOCKS))
        if count > unheld:
            with pytest.raises(OutOfCacheBlocks):
                self.pool.allocate(count, module)
            return
        blocks = self.pool.allocate(count, module)
        assert len(blocks) == count and all(self.expected_owners(block) == 0 for block in blocks)
        self.holdings.append((module, blocks))

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def share(self, data) -> None:
        module, blocks = data.draw(st.sampled_from(self.holdings))
        self.pool.share(blocks, module)
        self.holdings.append((module, list(blocks)))

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data) -> None:
        index = data.draw(st.integers(0, len(self.holdings) - 1))
        _, blocks = self.holdings.pop(index)
        self.pool.release(blocks)

    @precondition(lambda self: any(blocks for _, blocks in self.holdings))
    @rule(data=st.data())
    def keep(self, data) -> None:
        _, blocks = data.draw(st.sampled_from([h for h in self.holdings if h[1]]))
        block = data.draw(st.sampled_from(blocks))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share_idle(self, data) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        module = self.pool.provenance(block)
        self.pool.share([block], module)
        self.holdings.append((module, [block]))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        for block in range(NUM_BLOCKS):
            assert self.pool.owners(block) == self.expected_owners(block)
            assert self.pool.is_cached(block) == (block in self.kept)
        assert self.pool.num_available == sum(self.expected_owners(b) == 0 for b in range(NUM_BLOCKS))


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPoolMachine = PoolMachine.TestCase
