"""What a radix tree is made of: a run of tokens with the pages that hold their KV, and a match."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from engine.protocol import IntArray

EMPTY_PAGES: IntArray = np.empty(0, np.int32)


def common_prefix(left: IntArray, right: IntArray) -> int:
    """Number of equal leading tokens of two int32 arrays."""
    size = min(len(left), len(right))
    if size == 0:
        return 0
    left, right = left[:size], right[:size]
    if left.tobytes() == right.tobytes():
        return size
    differ = left != right
    first = int(differ.argmax())
    return first if differ[first] else size


class Node:
    """One edge of the tree and the node below it.

    tokens: int32 [n]; pages: int32 [ceil(n / page_size)].
    lock: sequences that use this node or one below it; only at 0 may it be evicted.
    step: the step that writes the KV of these tokens.
    attached: False once the node left the tree; sequences may still hold it.
    """

    __slots__ = (
        "attached",
        "children",
        "last_access",
        "lock",
        "pages",
        "parent",
        "step",
        "tokens",
    )

    def __init__(self, parent: Node | None, tokens: IntArray, pages: IntArray, step: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.step = step
        self.children: dict[bytes, Node] = {}
        self.lock = 0
        self.last_access = 0
        self.attached = True


def descendants(root: Node) -> Iterator[Node]:
    """`root` and every node below it, parents before their children."""
    pending = [root]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.children.values())


class Match(msgspec.Struct, frozen=True):
    """The longest cached prefix of some tokens.

    node: deepest node whose pages are used as they are; pages: int32, full pages to there.
    source: node whose first page begins with the next `num_copied` tokens; those can be had
        by copying that page.
    num_pending: as `num_tokens`, had the pages written by the current step been copyable.
    """

    node: Node
    pages: IntArray
    page_size: int
    source: Node | None = None
    num_copied: int = 0
    num_pending: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be computed."""
        return len(self.pages) * self.page_size + self.num_copied

    def without_copy(self) -> Match:
        """The same match, shared pages only."""
        return msgspec.structs.replace(self, source=None, num_copied=0)
