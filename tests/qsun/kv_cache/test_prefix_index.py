"""The prefix index: what is found, what must not be, and what becomes of orphans."""

from __future__ import annotations

import pytest

from qsun.core import Request, SamplingParams, Sequence
from qsun.kv_cache.block_tables import BlockTables, blocks_for, slots_for
from qsun.kv_cache.prefix_index import PrefixIndex


def chain(index: PrefixIndex, tokens: list[int], fingerprint: str, first_block: int):
    node = None
    size = index.block_size
    for number in range(len(tokens) // size):
        part = tuple(tokens[number * size : (number + 1) * size])
        node = index.insert(node, part, fingerprint, first_block + number)
    return node


def found(index: PrefixIndex, tokens: list[int], fingerprint: str, usable: int | None = None) -> list[int]:
    return [n.block for n in index.match(tokens, fingerprint, len(tokens) if usable is None else usable)]


def test_the_longest_common_chain_is_found() -> None:
    index = PrefixIndex(2)
    chain(index, [1, 2, 3, 4, 5, 6], "a", 10)
    assert found(index, [1, 2, 3, 4, 5, 6, 7], "a") == [10, 11, 12]
    assert found(index, [1, 2, 3, 4, 9, 9], "a") == [10, 11]
    assert found(index, [1, 2, 3], "a") == [10]
    assert found(index, [9, 2, 3, 4], "a") == []
    assert found(index, [1, 2, 3, 4], "a", usable=3) == [10]
    index.check()


def test_equal_blocks_behind_different_beginnings_differ() -> None:
    index = PrefixIndex(2)
    chain(index, [1, 2, 7, 7], "a", 10)
    assert found(index, [3, 4, 7, 7], "a") == []
    chain(index, [3, 4, 7, 7], "a", 20)
    assert found(index, [3, 4, 7, 7], "a") == [20, 21]


def test_two_models_never_share() -> None:
    index = PrefixIndex(2)
    chain(index, [1, 2, 3, 4], "a", 10)
    assert found(index, [1, 2, 3, 4], "b") == []
    chain(index, [1, 2, 3, 4], "b", 20)
    assert found(index, [1, 2, 3, 4], "a") == [10, 11] and found(index, [1, 2, 3, 4], "b") == [20, 21]


def test_equal_hashes_are_not_equal_keys() -> None:
    """Python hashes -1 and -2 alike, so these two keys do collide; the stored key tells them apart."""
    assert hash(-1) == hash(-2)
    index = PrefixIndex(1)
    assert hash((0, (-1,), "a")) == hash((0, (-2,), "a"))
    index.insert(None, (-1,), "a", 10)
    assert found(index, [-2], "a") == [] and found(index, [-1], "a") == [10]


def test_a_second_copy_is_not_indexed() -> None:
    index = PrefixIndex(2)
    first = index.insert(None, (1, 2), "a", 10)
    assert index.insert(None, (1, 2), "a", 11) is first
    assert 11 not in index and len(index) == 1


def test_dropping_a_block_drops_what_hangs_below_it() -> None:
    index = PrefixIndex(2)
    tail = chain(index, [1, 2, 3, 4, 5, 6], "a", 10)
    chain(index, [1, 2, 8, 8], "a", 20)  # shares block 10, adds 21
    assert index.drop_block(99) == []
    assert sorted(index.drop_block(10)) == [10, 11, 12, 21]
    assert len(index) == 0 and not tail.live
    index.check()


def test_a_number_is_never_used_again() -> None:
    """A new node must not inherit the children of a dropped one."""
    index = PrefixIndex(1)
    old = index.insert(None, (1,), "a", 10)
    index.insert(old, (2,), "a", 11)
    index.drop_block(10)
    new = index.insert(None, (5,), "a", 12)
    assert new.number > old.number and found(index, [5, 2], "a") == [12]


def test_slots_and_counts() -> None:
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert slots_for([7, 2], 2, 4, 4) == [30, 31, 8, 9]


@pytest.mark.damaged
@pytest.mark.parametrize("block_size", [0, -1])
def test_an_absurd_block_size_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        PrefixIndex(block_size)


def sequence_of(tokens: list[int], name: str = "r", arrival: int = 0) -> Sequence:
    request = Request(name, "m", tuple(tokens), SamplingParams(), arrival, 0, 8)
    return Sequence(request, "m", len(tokens) - 1, list(tokens))


def computed(tables: BlockTables, sequence: Sequence, upto: int | None = None) -> None:
    sequence.num_computed = sequence.prefill_length if upto is None else upto
    tables.register(sequence)


def test_two_sequences_at_the_same_prompt_and_the_eviction_of_one() -> None:
    """The later one's copy hangs below the earlier one's node, whose eviction must lose and leak nothing."""
    tables = BlockTables(7, 2)
    first, second = sequence_of([1, 2, 3, 4, 5, 6, 7]), sequence_of([1, 2, 3, 4, 5, 6, 7], "s", 1)
    tables.admit(first)
    computed(tables, first, 2)
    tables.release(first)  # block 0 is indexed and idle
    first = sequence_of([1, 2, 9], "t", 2)
    tables.admit(first)
    tables.admit(second)
    assert second.num_prefix_hits == 2 and second.block_ids[0] == first.block_ids[0]
    computed(tables, second)
    tables.check([first, second])
    tables.release(second)
    tables.release(first)
    tables.check([])
    assert tables.pool.num_idle == 3
    # Everything is evictable, the end of the chain first.
    other = sequence_of([8] * 13, "u", 3)
    tables.admit(other)
    assert len(tables.index) == 0
    tables.check([other])


def test_a_chain_whose_root_was_evicted_is_indexed_anew() -> None:
    tables = BlockTables(8, 2)
    first, second = sequence_of([1, 2, 3, 4, 5]), sequence_of([1, 2, 3, 4, 5], "s", 1)
    tables.admit(first)
    tables.admit(second)
    computed(tables, first, 2)
    computed(tables, second, 2)  # a second copy: its chain goes through first's node
    assert second.index_node.block == first.block_ids[0] != second.block_ids[0]
    root = first.block_ids[0]
    tables.release(first)
    filler = sequence_of([9] * 10, "f", 2)
    tables.admit(filler)  # takes the last free blocks, evicting the root
    assert root not in tables.index and not second.index_node.live
    computed(tables, second)
    tables.check([second, filler])
    assert found(tables.index, [1, 2, 3, 4], "m") == second.block_ids[:2]


def test_prefix_reuse_can_be_off() -> None:
    tables = BlockTables(8, 2, prefix_reuse=False)
    sequence = sequence_of([1, 2, 3, 4, 5])
    tables.admit(sequence)
    computed(tables, sequence)
    assert len(tables.index) == 0
    tables.release(sequence)
    assert tables.pool.num_idle == 0
