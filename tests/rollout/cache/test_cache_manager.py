"""Pages and prefixes together, against a model of what each page holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import SlipstreamError
from rollout.cache.manager import CacheManager
from rollout.cache.radix_node import Node

SIZE = 3


@dataclass
class Holder:
    """A sequence: its tokens, pages and lock."""

    tokens: list[int]
    pages: np.ndarray
    node: Node | None
    version: int
    salt: str


def test_without_prefix_cache_nothing_is_kept():
    cache = CacheManager(4, SIZE, prefix_cache=False)
    tokens = np.arange(6, dtype=np.int32)
    pages = cache.allocate(2)
    assert cache.commit(tokens, pages, None, version=0, salt="", step=0) is None
    cache.release(pages, None, tokens=tokens)
    assert cache.match(tokens, 5, version=0, salt="", step=1) is None
    assert cache.num_free == 4
    cache.check_integrity()


def test_allocate_evicts_only_if_that_suffices():
    cache = CacheManager(4, SIZE)
    pages = cache.allocate(3)
    cache.release(pages, None, tokens=np.arange(9, dtype=np.int32))
    assert (cache.num_free, cache.num_cached, cache.num_available) == (1, 3, 4)
    assert cache.allocate(5) is None
    assert cache.num_cached == 3
    assert len(cache.allocate(2)) == 2
    assert cache.num_cached == 2


def test_flush_is_refused_while_pages_are_held():
    cache = CacheManager(4, SIZE)
    pages = cache.allocate(1)
    with pytest.raises(SlipstreamError, match="hold 1 of 4 KV pages") as caught:
        cache.flush()
    assert caught.value.field == "flush_cache"
    cache.release(pages, None)
    cache.flush()
    assert cache.num_free == 4


def test_integrity_check_notices_a_leak():
    cache = CacheManager(4, SIZE)
    cache.allocate(1)
    with pytest.raises(AssertionError, match="0 holders, refcount 1"):
        cache.check_integrity()


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, share, and go. `content` says what each page in use holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = CacheManager(14, SIZE)
        self.version = 0
        self.step = 0
        self.holders: list[Holder] = []
        self.content: dict[int, tuple[int, str, list[int]]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16), salt=st.sampled_from(["", "s"])
    )
    def admit(self, tokens: list[int], salt: str) -> None:
        array = np.array(tokens, np.int32)
        self.step += 1
        match = self.cache.match(
            array, len(tokens) - 1, version=self.version, salt=salt, step=self.step
        )
        assert match is not None
        self._check_match(match.pages.tolist(), tokens, salt)
        self.cache.acquire(match)
        if match.source is not None:
            held = self.content[int(match.source.pages[0])]
            assert held[:2] == (self.version, salt)
            assert held[2][: match.num_tokens] == tokens[: match.num_tokens]
        fresh = self.cache.allocate(self.cache.pages_for(len(tokens)) - len(match.pages))
        self.cache.release_source(match)
        if fresh is None:
            self.cache.release(match.pages, match.node)
            return
        pages = np.concatenate((match.pages, fresh))
        self._fill(pages, len(match.pages), tokens, salt)
        node = self.cache.commit(
            array, pages, match.node, version=self.version, salt=salt, step=self.step
        )
        self.holders.append(Holder(tokens, pages, node, self.version, salt))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=6), keep=st.booleans())
    def finish(self, data: st.DataObject, more: list[int], keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        holder = self.holders[index]
        tokens = holder.tokens + more
        extra = self.cache.allocate(self.cache.pages_for(len(tokens)) - len(holder.pages))
        if extra is None:
            return
        del self.holders[index]
        pages = np.concatenate((holder.pages, extra))
        keep = keep and holder.version == self.version
        if keep:
            self._fill(pages, len(holder.tokens) // SIZE, tokens, holder.salt)
        kept = np.array(tokens, np.int32) if keep else None
        self.cache.release(
            pages,
            holder.node,
            tokens=kept,
            version=self.version,
            salt=holder.salt,
            step=self.step,
        )

    @rule()
    def new_version(self) -> None:
        self.version += 1
        self.cache.clear()

    @rule()
    def flush(self) -> None:
        if self.holders:
            with pytest.raises(SlipstreamError):
                self.cache.flush()
        else:
            self.cache.flush()
            assert self.cache.num_free == self.cache.num_pages

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check_integrity([holder.pages for holder in self.holders])
        held = {int(page) for holder in self.holders for page in holder.pages}
        assert self.cache.num_available == self.cache.num_pages - len(held)

    @invariant()
    def holders_keep_their_content(self) -> None:
        for holder in self.holders:
            for column in range(len(holder.tokens) // SIZE):
                _, salt, tokens = self.content[int(holder.pages[column])]
                assert salt == holder.salt
                assert tokens == holder.tokens[: (column + 1) * SIZE]

    def _fill(self, pages: np.ndarray, start: int, tokens: list[int], salt: str) -> None:
        for column in range(start, len(pages)):
            prefix = tokens[: (column + 1) * SIZE]
            self.content[int(pages[column])] = (self.version, salt, prefix)

    def _check_match(self, pages: list[int], tokens: list[int], salt: str) -> None:
        for column, page in enumerate(pages):
            assert self.content[page] == (self.version, salt, tokens[: (column + 1) * SIZE])


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
