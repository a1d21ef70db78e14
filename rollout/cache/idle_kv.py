"""KV that sessions keep between their turns: theirs until others need the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from engine.protocol import IntArray, KvPolicy, VersionSpan
from rollout.cache.radix_node import Node, common_prefix
from rollout.requests.version_spans import clip_spans


@dataclass(frozen=True, kw_only=True)
class IdleKv:
    """What one session holds.

    tokens: int32 [n], those whose KV it is. pages: int32 [ceil(n / page_size)], each with a
    reference of the session's own. node: its lock in the prefix tree, which covers the full pages
    that it shares there. spans: which version computed the KV of which tokens. pure: all of it is
    by the version that serves, as far as the tree may share it. kv_policy: what an update does to
    it; that of the last turn.
    """

    tokens: IntArray
    pages: IntArray
    node: Node | None
    spans: tuple[VersionSpan, ...]
    pure: bool
    kv_policy: KvPolicy


class IdleKvs:
    """By session, least recently used first.

    release: gives up references to pages and a lock. Taking KV out (`take`) hands both on.
    """

    def __init__(self, release: Callable[[IntArray, Node | None], None]) -> None:
        self._release = release
        self._held: dict[str, IdleKv] = {}

    @property
    def num_pages(self) -> int:
        """Pages held; one that several sessions share counts for each."""
        return sum(len(held.pages) for held in self._held.values())

    def num_tokens(self, session: str) -> int:
        """Tokens whose KV a session holds."""
        held = self._held.get(session)
        return 0 if held is None else len(held.tokens)

    def hold(self, session: str, held: IdleKv) -> None:
        """Keep the KV of a turn that ended, in place of what the session held before."""
        self.drop(session)
        self._held[session] = held

    def fit(
        self,
        session: str,
        tokens: IntArray,
        limit: int,
        *,
        kv_policy: KvPolicy,
        page_size: int,
        refcounts: IntArray,
    ) -> IdleKv | None:
        """What a session holds of the first `limit` of `tokens` (int32), those of its next turn.

        None if that is nothing, or if the prefix tree does better. KV by older weights is for
        turns whose `kv_policy` is keep. What the turn does not go on from is given up. refcounts:
        of all pages.
        """
        held = self._held.get(session)
        if held is None:
            return None
        size = min(common_prefix(held.tokens, tokens), limit)
        if not held.pure and kv_policy == "keep" and size < len(held.tokens):
            held = self._cut(session, held, size, page_size, refcounts)
        elif size < len(held.tokens) or not (held.pure or kv_policy == "keep"):
            # Pages of the tree are not to be written; it has their full ones.
            self.drop(session)
            return None
        if len(held.tokens) == 0:
            self.drop(session)
            return None
        return held

    def _cut(
        self, session: str, held: IdleKv, size: int, page_size: int, refcounts: IntArray
    ) -> IdleKv:
        """Keep the KV of the first `size` tokens, of which the last page will be written."""
        if size % page_size and refcounts[held.pages[size // page_size]] > 1:
            size -= size % page_size
        kept = -(-size // page_size)
        self._release(held.pages[kept:], None)
        spans = tuple(clip_spans(held.spans, size))
        held = replace(held, tokens=held.tokens[:size], pages=held.pages[:kept], spans=spans)
        self._held[session] = held
        return held

    def take(self, session: str) -> IdleKv:
        """Hand over what a session holds, with its references and its lock."""
        return self._held.pop(session)

    def drop(self, session: str) -> None:
        """Give up what a session holds, if anything."""
        held = self._held.pop(session, None)
        if held is not None:
            self._release(held.pages, held.node)

    def give_up(self, *, but: str = "") -> bool:
        """Give up the KV of the session that was used least recently, `but` one; False if there
        is none."""
        for session in self._held:
            if session != but:
                self.drop(session)
                return True
        return False

    def drop_all(self) -> None:
        """Give up everything."""
        while self.give_up():
            pass

    def forget(self) -> None:
        """Forget everything, nobody holding any page any more."""
        self._held.clear()

    def set_version(self) -> None:
        """Other weights serve: what the policies of the last turns keep is stale from now on."""
        for session, held in list(self._held.items()):
            if held.kv_policy == "keep":
                self._held[session] = replace(held, pure=False)
            else:
                self.drop(session)

    def pages(self) -> Iterator[IntArray]:
        """The pages of each session."""
        return (held.pages for held in self._held.values())
