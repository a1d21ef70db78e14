"""KV pages and the prefixes they hold, for the scheduler: match, acquire, allocate, commit,
release.

A sequence holds one reference to each of its pages and one lock on the deepest tree node
whose pages are its own; so a page in the tree that a sequence uses is never evicted, and an
unlocked node's pages have no holder but the tree. A session holds the same between its turns
(`idle_kv`), until pages are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine.errors import SlipstreamError
from engine.protocol import IntArray, KvPolicy, VersionSpan
from rollout.cache.idle_kv import IdleKv, IdleKvs
from rollout.cache.pages import PagePool
from rollout.cache.radix_node import Match, Node
from rollout.cache.radix_tree import RadixTree


class CacheManager:
    """The KV pages of one replica and the tree of cached prefixes over them."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        """num_pages: pages of the pool; page_size: tokens a page holds; prefix_cache: False
        makes every match empty and every release free its pages."""
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, need at least 1")
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(page_size)
        self.idle = IdleKvs(lambda pages, node: self.release(pages, node))

    def reset(self) -> None:
        """Forget every page and prefix, whoever holds them: nobody may use theirs any more."""
        self.idle.forget()
        self.pool = PagePool(self.pool.num_pages)
        self.tree = RadixTree(self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pool.num_pages

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self.pool.num_free

    @property
    def num_cached(self) -> int:
        """Pages the tree holds, shared with running sequences or not."""
        return self.tree.num_pages

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return self.pool.num_free + self.tree.num_evictable

    def can_have(self, count: int, *, but: str = "") -> bool:
        """Whether `allocate` can hand out `count` pages, the KV of idle sessions having been given
        up for them as far as needed, that of the session `but` excepted."""
        while count > self.num_available:
            if not self.idle.give_up(but=but):
                return False
        return True

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def match(
        self, tokens: IntArray, limit: int, *, version: int, salt: str, step: int
    ) -> Match | None:
        """Longest prefix of int32 `tokens` with KV of `version`, at most `limit` tokens.

        step: the step being planned; pages written by it may be shared but not copied.
        Valid until the next call that changes the cache; `acquire` makes it lasting.
        None without a prefix cache.
        """
        if not self.prefix_cache:
            return None
        return self.tree.match(self.tree.root(version, salt), tokens, limit, step)

    def match_length(self, tokens: IntArray, limit: int, *, version: int, salt: str) -> int:
        """Tokens of full pages that `match` would find; changes nothing."""
        if not self.prefix_cache:
            return 0
        return self.tree.match_length(self.tree.root(version, salt), tokens, limit)

    def acquire(self, match: Match) -> None:
        """Hold what was matched: a reference to each page, a lock on the node and source."""
        self.tree.lock(match.node)
        if match.source is not None:
            self.tree.lock(match.source)
        self.pool.retain(match.pages)

    def release_source(self, match: Match) -> None:
        """Let go of the page to copy from, once the copy is planned or given up."""
        if match.source is not None:
            self.tree.unlock(match.source)

    def allocate(self, count: int) -> IntArray | None:
        """`count` fresh pages (int32), evicting cached prefixes as needed; None if that
        does not suffice, and then nothing was evicted."""
        missing = count - self.pool.num_free
        if missing > self.tree.num_evictable:
            return None
        if missing > 0:
            self.pool.release(self.tree.evict(missing))
        return self.pool.allocate(count)

    def commit(
        self,
        tokens: IntArray,
        pages: IntArray,
        node: Node | None,
        *,
        version: int,
        salt: str,
        step: int,
    ) -> Node | None:
        """Share a running sequence's prefix, whose KV `step` completes.

        tokens: int32 [n]; pages: int32 [ceil(n / page_size)], its own. node: its lock so
        far; returns its lock from now on. A partly filled last page is shared for copying.
        """
        if not self.prefix_cache:
            return None
        root = self.tree.root(version, salt)
        deepest, adopted = self.tree.insert(root, tokens, pages, step, own=True)
        self.pool.retain(adopted)
        self.tree.lock(deepest)
        if node is not None:
            self.tree.unlock(node)
        return deepest

    def release(
        self,
        pages: IntArray,
        node: Node | None,
        *,
        tokens: IntArray | None = None,
        version: int = 0,
        salt: str = "",
        step: int = 0,
    ) -> None:
        """Give up a sequence's pages and its lock.

        tokens: int32, the tokens whose KV is worth keeping: their full pages go to the
        tree. None keeps nothing beyond what was committed before.
        """
        if node is not None:
            self.tree.unlock(node)
        if tokens is not None and self.prefix_cache:
            num_full = len(tokens) // self.page_size
            root = self.tree.root(version, salt)
            _, adopted = self.tree.insert(
                root, tokens[: num_full * self.page_size], pages[:num_full], step, own=False
            )
            self.pool.retain(adopted)
        self.pool.release(pages)

    def hold(
        self,
        session: str,
        tokens: IntArray,
        pages: IntArray,
        node: Node | None,
        *,
        spans: Sequence[VersionSpan],
        kv_policy: KvPolicy,
        pure: bool,
        version: int,
        salt: str,
        step: int,
    ) -> None:
        """Hand a sequence's pages and lock over to its session, until the next turn or until others
        need them. tokens: int32, those that have KV, which `step` completed.

        Full pages of KV that is pure are shared by the tree. The page behind them is the session's
        alone, since its next turn goes on writing there.
        """
        kept, full = self.pages_for(len(tokens)), len(tokens) // self.page_size
        if node is not None:
            self.tree.unlock(node)
            node = None
        if pure:
            for page in pages[full:kept].tolist():
                self.pool.release(self.tree.withdraw(page))
            node = self.commit(
                tokens[: full * self.page_size],
                pages[:full],
                None,
                version=version,
                salt=salt,
                step=step,
            )
        self.pool.release(pages[kept:])
        held = IdleKv(
            tokens=tokens.copy(),
            pages=pages[:kept].copy(),
            node=node,
            spans=tuple(spans),
            pure=pure,
            kv_policy=kv_policy,
        )
        self.idle.hold(session, held)

    def release_many(self, pages: Sequence[IntArray], nodes: Iterable[Node | None]) -> None:
        """Give up the pages and locks of many sequences, keeping nothing."""
        for node in nodes:
            if node is not None:
                self.tree.unlock(node)
        if pages:
            self.pool.release_many(np.concatenate(pages))

    def distrust(self, node: Node | None) -> None:
        """Forget every prefix that shares its beginning with the one a sequence holds by `node`:
        what it attended to gave no finite logits. Sequences keep the pages they hold; idle
        sessions, whose KV may be part of it, do not."""
        self.idle.drop_all()
        if node is not None:
            self.pool.release(self.tree.cut(node))

    def clear(self) -> None:
        """Forget every prefix. Sequences keep the pages they hold."""
        self.pool.release(self.tree.drop())

    def flush(self) -> None:
        """Forget every prefix, those of idle sessions too, and have all pages free; raises while a
        sequence holds any."""
        self.idle.drop_all()
        held = self.num_pages - self.num_free - self.tree.num_evictable
        if held:
            raise SlipstreamError(
                f"flush refused: running requests hold {held} of {self.num_pages} KV pages; "
                "wait for them, abort them or pause with mode 'retract'",
                field="flush_cache",
            )
        self.clear()

    def check_integrity(self, held: Iterable[IntArray] = ()) -> None:
        """Assert free + held + cached = total, given the pages each sequence holds; idle sessions
        hold theirs."""
        self.pool.check_integrity()
        self.tree.check_integrity()
        expected = np.zeros(self.num_pages, np.int32)
        nodes = (node.pages for node in self.tree.nodes())
        for pages in (*held, *self.idle.pages(), *nodes):
            expected[pages] += 1
        wrong = np.flatnonzero(expected != self.pool.refcounts)
        assert len(wrong) == 0, (
            f"page {wrong[0]}: {expected[wrong[0]]} holders, "
            f"refcount {self.pool.refcounts[wrong[0]]} ({len(wrong)} pages differ)"
        )
        in_use = int((expected > 0).sum())
        assert in_use + self.num_free == self.num_pages, (
            f"{in_use} pages in use + {self.num_free} free != {self.num_pages}"
        )
