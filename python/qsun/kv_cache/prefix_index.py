"""Finding KV that is already there: a trie of full blocks over (parent, tokens, module fingerprint).

Two requests of one model with a common prefix share its blocks; two models never do, whatever their prompts,
because the module that wrote the KV is part of the key at every level.

Only blocks whose every position was written by the prefill module belong in here.  In the "decode" convention
the decode module writes the last prompt token, and it writes every response token: such blocks hold another
module's KV and would answer for the wrong model.

The whole key is stored and compared, and a parent is identified by a number that is never used again, so
there is no hash whose collision could return KV of another text.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import count

__all__ = ["BlockKey", "PrefixIndex", "PrefixNode", "block_key"]

# (number of the parent node, token ids of the block, fingerprint of the prefill module)
BlockKey = tuple[int, tuple[int, ...], str]
ROOT = 0


def block_key(parent: int, tokens: tuple[int, ...], fingerprint: str) -> BlockKey:
    """What two blocks must agree in to be interchangeable."""
    return (parent, tokens, fingerprint)


@dataclass(slots=True, eq=False)
class PrefixNode:
    """One indexed block.  `live` turns False when it is dropped, so that holders of the node can tell."""

    number: int
    key: BlockKey
    block: int
    parent: PrefixNode | None
    live: bool = True
    children: dict[BlockKey, PrefixNode] = field(default_factory=dict)


class PrefixIndex:
    """The indexed blocks of one pool."""

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._nodes: dict[BlockKey, PrefixNode] = {}
        self._by_block: dict[int, PrefixNode] = {}
        self._numbers = count(ROOT + 1)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def match(self, tokens: Items[int], fingerprint: str, max_tokens: int) -> list[PrefixNode]:
        """The longest chain of indexed blocks that holds the beginning of `tokens`.

        max_tokens: positions that may be taken from the index; blocks reaching beyond are not looked up.
        """
        found: list[PrefixNode] = []
        parent = ROOT
        for start in range(0, max_tokens - self.block_size + 1, self.block_size):
            block_tokens = tuple(tokens[start : start + self.block_size])
            node = self._nodes.get(block_key(parent, block_tokens, fingerprint))
            if node is None:
                break
            found.append(node)
            parent = node.number
        return found

    def insert(
        self, parent: PrefixNode | None, tokens: tuple[int, ...], fingerprint: str, block: int
    ) -> PrefixNode:
        """Index a full block below `parent` (None: the beginning of a text).

        Returns the node of this key: an older one with another block where the same KV is indexed already.
        """
        assert len(tokens) == self.block_size, "only full blocks are indexed"
        assert parent is None or parent.live, "the parent was dropped: its number means nothing any more"
        key = block_key(ROOT if parent is None else parent.number, tokens, fingerprint)
        node = self._nodes.get(key)
        if node is not None:
            return node
        assert block not in self._by_block, f"block {block} is indexed under another key"
        node = PrefixNode(next(self._numbers), key, block, parent)
        self._nodes[key] = node
        self._by_block[block] = node
        if parent is not None:
            parent.children[key] = node
        return node

    def drop_block(self, block: int) -> list[int]:
        """Remove a block and all that hangs below it, which nothing could reach any more.

        Returns the blocks removed, this one first.
        """
        node = self._by_block.get(block)
        if node is None:
            return []
        if node.parent is not None:
            del node.parent.children[node.key]
        dropped = []
        pending = [node]
        while pending:
            node = pending.pop()
            node.live = False
            del self._nodes[node.key]
            del self._by_block[node.block]
            dropped.append(node.block)
            pending.extend(node.children.values())
            node.children.clear()
        return dropped

    def check(self) -> None:
        """Raise AssertionError unless every node is live, reachable, and the only one of its block."""
        assert len(self._nodes) == len(self._by_block)
        for key, node in self._nodes.items():
            assert node.live and node.key == key and self._by_block[node.block] is node
            if node.parent is None:
                assert key[0] == ROOT
            else:
                assert node.parent.live and node.parent.number == key[0] and node.parent.children[key] is node
