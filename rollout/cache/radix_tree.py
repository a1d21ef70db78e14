"""A radix tree from token prefixes to the KV pages that hold them.

The idea is RadixAttention's (Zheng et al., SGLang, arXiv 2312.07104): finished and running
sequences share one tree of prefixes, leaves are evicted least recently used first. This one
works in whole pages. Every edge is a run of full pages; below any node there may also be
leaves of one partly filled page, whose tokens can only be used by copying that page.

The tree does not count references: it reports the pages it adopts and gives up, and its
owner keeps the counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from engine.protocol import IntArray
from rollout.cache.radix_node import EMPTY_PAGES, Match, Node, common_prefix, descendants

COPY_CANDIDATES = 32
"""Siblings examined for a partial match: a bound on host time, never on correctness."""


class RadixTree:
    """Prefixes by (version, salt); one root for each pair."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable = 0
        self.generation = 0
        """Changes whenever a match might come out differently."""
        self._roots: dict[tuple[int, str], Node] = {}
        self._partial_of_page: dict[int, Node] = {}
        self._heap: list[tuple[int, int, Node]] = []
        self._clock = 0
        self._prune_at = 64

    def root(self, version: int, salt: str) -> Node:
        """The root of a pair; made when missing."""
        node = self._roots.get((version, salt))
        if node is None:
            self._prune_roots()
            node = Node(None, EMPTY_PAGES, EMPTY_PAGES, -1)
            self._roots[(version, salt)] = node
        return node

    def match(self, root: Node, tokens: IntArray, limit: int, step: int) -> Match:
        """Longest cached prefix of at most `limit` of `tokens` (int32 [n]).

        Splits a node that matches only in part. A page may be shared whatever step writes
        it, but copied only if that step came before `step`.
        """
        node, pages, done = root, [], 0
        num_full = limit // self.page_size
        self._touch(node)
        while done < num_full:
            child = self._child(node, tokens, done)
            if child is None:
                break
            shared = self._shared_pages(child, tokens, done, num_full)
            node = child if shared == len(child.pages) else self._split(child, shared)
            self._touch(node)
            pages.append(node.pages)
            done += shared
        shared_pages = np.concatenate(pages) if pages else EMPTY_PAGES
        return self._with_copy(node, shared_pages, tokens, limit, step)

    def match_length(self, root: Node, tokens: IntArray, limit: int) -> int:
        """Tokens that `match` would share without a copy; changes nothing."""
        node, done, num_full = root, 0, limit // self.page_size
        while done < num_full:
            child = self._child(node, tokens, done)
            if child is None:
                break
            shared = self._shared_pages(child, tokens, done, num_full)
            done += shared
            if shared < len(child.pages):
                break
            node = child
        return done * self.page_size

    def insert(
        self, root: Node, tokens: IntArray, pages: IntArray, step: int, *, own: bool
    ) -> tuple[Node, IntArray]:
        """Add `tokens` (int32 [n]) held by `pages` (int32 [ceil(n / page_size)]).

        Where the tree already has a prefix, its pages stay. own: stop at the first page of
        the tree that is not the caller's own, so that the caller's lock on the result
        covers exactly the caller's pages.

        Returns the deepest node reached and the pages the tree newly holds.
        """
        node, done, num_full = root, 0, len(tokens) // self.page_size
        self._touch(node)
        while done < num_full:
            child = self._child(node, tokens, done)
            if child is None:
                adopted = self._add(
                    node,
                    tokens[done * self.page_size : num_full * self.page_size],
                    pages[done:num_full],
                    step,
                )
                return self._insert_tail(adopted[0], tokens, pages, step, adopted[1])
            shared = self._shared_pages(child, tokens, done, num_full)
            mine = pages[done : done + shared]
            if own and child.pages[:shared].tobytes() != mine.tobytes():
                return node, EMPTY_PAGES
            node = child if shared == len(child.pages) else self._split(child, shared)
            self._touch(node)
            done += shared
        return self._insert_tail(node, tokens, pages, step, EMPTY_PAGES)

    def withdraw(self, page: int) -> IntArray:
        """Forget the leaf that a partly filled page is, which nobody may hold: its owner goes on
        writing the page later, in the middle of a plan that may copy it. Returns the page given up,
        nothing if the tree has no such leaf."""
        leaf = self._partial_of_page.get(page)
        if leaf is None:
            return EMPTY_PAGES
        assert leaf.lock == 0, "a leaf was withdrawn that is held"
        self._unlink(leaf)
        return leaf.pages

    def lock(self, node: Node) -> None:
        """Keep `node` and all above it from eviction until `unlock`."""
        current: Node | None = node
        while current is not None:
            if current.lock == 0 and current.attached:
                self.num_evictable -= len(current.pages)
            current.lock += 1
            current = current.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`. The node may have left the tree meanwhile."""
        current: Node | None = node
        while current is not None:
            current.lock -= 1
            assert current.lock >= 0, "unlocked a node that was not locked"
            if current.lock == 0 and current.attached:
                self.num_evictable += len(current.pages)
                self._offer(current)
            current = current.parent

    def evict(self, count: int) -> IntArray:
        """Give up `count` pages or all that can be, least recently used leaves first.

        A long leaf is shortened from its end. Returns the pages given up.
        """
        freed: list[IntArray] = []
        while count > 0 and self._heap:
            access, _, node = heapq.heappop(self._heap)
            if not node.attached or node.lock or node.children or node.parent is None:
                continue
            if access != node.last_access:
                self._offer(node)
                continue
            taken = self._shorten(node, min(count, len(node.pages)))
            freed.append(taken)
            count -= len(taken)
        return np.concatenate(freed) if freed else EMPTY_PAGES

    def drop(self) -> IntArray:
        """Forget everything, locked or not; returns the pages held."""
        freed: list[IntArray] = []
        for node in list(self.nodes()):
            freed.append(node.pages)
            self._forget(node)
        self._roots.clear()
        self._heap.clear()
        return np.concatenate(freed) if freed else EMPTY_PAGES

    def cut(self, node: Node) -> IntArray:
        """Forget the prefixes that begin as the one `node` ends, from the root's child down,
        locked or not; returns the pages held. Nothing if `node` has left the tree already.

        For KV that is not to be trusted: every prefix given up was computed from it or to it.
        """
        if not node.attached or node.parent is None:
            return EMPTY_PAGES
        top, above = node, node.parent
        while above.parent is not None:
            top, above = above, above.parent
        del above.children[top.tokens[: self.page_size].tobytes()]
        freed: list[IntArray] = []
        for gone in list(descendants(top)):
            freed.append(gone.pages)
            self._forget(gone)
        return np.concatenate(freed)

    def nodes(self) -> Iterator[Node]:
        """Every node in the tree, roots included."""
        for root in self._roots.values():
            yield from descendants(root)

    def check_integrity(self) -> None:
        """Assert structure, counters and that locks grow towards the root."""
        num_pages = num_evictable = 0
        for node in self.nodes():
            num_pages += len(node.pages)
            num_evictable += len(node.pages) if node.lock == 0 else 0
            self._check_node(node)
        assert num_pages == self.num_pages, f"{num_pages} pages held, {self.num_pages} counted"
        assert num_evictable == self.num_evictable, (
            f"{num_evictable} pages evictable, {self.num_evictable} counted"
        )

    def _check_node(self, node: Node) -> None:
        size = self.page_size
        assert node.attached, "a detached node is still in the tree"
        assert len(node.pages) == -(-len(node.tokens) // size), "pages do not hold the tokens"
        partial = len(node.tokens) % size != 0
        assert not (partial and (node.children or len(node.pages) != 1)), "bad partial leaf"
        below = sum(child.lock for child in node.children.values())
        assert node.lock >= below, f"lock {node.lock} above children's {below}"
        for key, child in node.children.items():
            assert child.parent is node, "child names another parent"
            assert key == child.tokens[:size].tobytes(), "child filed under another key"

    def _child(self, node: Node, tokens: IntArray, done: int) -> Node | None:
        size = self.page_size
        return node.children.get(tokens[done * size : (done + 1) * size].tobytes())

    def _shared_pages(self, child: Node, tokens: IntArray, done: int, num_full: int) -> int:
        if len(child.pages) == 1:
            # The page that it was found by.
            return 1
        rest = tokens[done * self.page_size : num_full * self.page_size]
        return common_prefix(child.tokens, rest) // self.page_size

    def _with_copy(
        self, node: Node, pages: IntArray, tokens: IntArray, limit: int, step: int
    ) -> Match:
        start = len(pages) * self.page_size
        wanted = tokens[start : min(limit, start + self.page_size)]
        best: Node | None = None
        copied = pending = 0
        for child in self._copy_candidates(node, tokens[start:]) if len(wanted) else ():
            shared = common_prefix(child.tokens[: self.page_size], wanted)
            if shared > copied and child.step < step:
                best, copied = child, shared
            pending = max(pending, shared)
            if copied == len(wanted):
                break
        if best is not None:
            self._touch(best)
        return Match(node, pages, self.page_size, best, copied, start + pending)

    def _copy_candidates(self, node: Node, rest: IntArray) -> Iterator[Node]:
        exact = node.children.get(rest.tobytes()) if len(rest) < self.page_size else None
        if exact is not None:
            yield exact
        for index, child in enumerate(reversed(node.children.values())):
            if index == COPY_CANDIDATES:
                return
            yield child

    def _insert_tail(
        self, node: Node, tokens: IntArray, pages: IntArray, step: int, adopted: IntArray
    ) -> tuple[Node, IntArray]:
        tail = tokens[len(tokens) // self.page_size * self.page_size :]
        if len(tail) == 0:
            return node, adopted
        existing = node.children.get(tail.tobytes())
        if existing is not None:
            same = existing.pages[0] == pages[-1]
            return (existing if same else node), adopted
        leaf, more = self._add(node, tail, pages[-1:], step)
        return leaf, np.concatenate((adopted, more))

    def _add(
        self, parent: Node, tokens: IntArray, pages: IntArray, step: int
    ) -> tuple[Node, IntArray]:
        """A new child; takes the place of the leaf that held the same page half filled."""
        adopted = pages
        shorter = self._partial_of_page.get(int(pages[0]))
        if shorter is not None:
            assert shorter.lock == 0 and shorter.parent is parent, "partial page moved"
            self._unlink(shorter)
            adopted = pages[1:]
        node = Node(parent, tokens.copy(), pages.copy(), step)
        parent.children[tokens[: self.page_size].tobytes()] = node
        if len(tokens) < self.page_size:
            self._partial_of_page[int(pages[0])] = node
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._touch(node)
        self._offer(node)
        self.generation += 1
        return node, adopted

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut `node` after `num_pages`; returns the new upper part, `node` is the lower."""
        cut = num_pages * self.page_size
        parent = node.parent
        assert parent is not None and 0 < num_pages < len(node.pages)
        upper = Node(parent, node.tokens[:cut], node.pages[:num_pages], node.step)
        upper.lock, upper.last_access = node.lock, node.last_access
        parent.children[upper.tokens[: self.page_size].tobytes()] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], node.pages[num_pages:]
        upper.children[node.tokens[: self.page_size].tobytes()] = node
        return upper

    def _shorten(self, node: Node, count: int) -> IntArray:
        """Give up the last `count` pages of an unlocked leaf."""
        self.generation += 1
        keep = len(node.pages) - count
        taken = node.pages[keep:]
        if keep == 0:
            self._unlink(node)
            return taken
        node.pages, node.tokens = node.pages[:keep], node.tokens[: keep * self.page_size]
        self.num_pages -= count
        self.num_evictable -= count
        self._offer(node)
        return taken

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[: self.page_size].tobytes()]
        self._forget(node)
        self._offer(parent)

    def _forget(self, node: Node) -> None:
        """Count `node` out of the tree; links are the caller's business."""
        node.attached = False
        self.generation += 1
        self.num_pages -= len(node.pages)
        self.num_evictable -= len(node.pages) if node.lock == 0 else 0
        if 0 < len(node.tokens) < self.page_size:
            self._partial_of_page.pop(int(node.pages[0]), None)

    def _prune_roots(self) -> None:
        """Forget roots without a tree, once as many were made as were kept last time."""
        if len(self._roots) < self._prune_at:
            return
        for key in [k for k, root in self._roots.items() if not (root.children or root.lock)]:
            self._roots.pop(key).attached = False
        self._prune_at = max(64, 2 * len(self._roots))

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_access = self._clock

    def _offer(self, node: Node) -> None:
        """Make an unlocked leaf a candidate for eviction. Stale entries are skipped later."""
        if node.lock or node.children or node.parent is None or not node.attached:
            return
        self._clock += 1
        heapq.heappush(self._heap, (node.last_access, self._clock, node))
        if len(self._heap) > 4 * self.num_pages + 1024:
            self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        leaves = [n for n in self.nodes() if not (n.lock or n.children or n.parent is None)]
        self._heap = [(leaf.last_access, index, leaf) for index, leaf in enumerate(leaves)]
        heapq.heapify(self._heap)
