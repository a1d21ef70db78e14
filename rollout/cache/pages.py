"""The pool of KV pages: a stack of free page ids and one reference count per page."""

from __future__ import annotations

import numpy as np

from engine.errors import OutOfMemory
from engine.protocol import NO_INTS, IntArray
from rollout.booleans import every

_FEW = 8
"""Pages that are counted one by one, as most calls have: an operation of numpy takes longer."""


class PagePool:
    """Hands out page ids 0..num_pages-1 and takes them back at their last release.

    Holders are counted, not named: a sequence and the prefix tree each hold one reference
    to a page they share. All arrays of page ids are int32 [n] without duplicates.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, need at least 1")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.refcounts: IntArray = np.zeros(num_pages, np.int32)
        self._free: IntArray = np.arange(num_pages - 1, -1, -1, dtype=np.int32)

    def allocate(self, count: int) -> IntArray:
        """Take `count` pages, each with one reference; raises OutOfMemory and takes none."""
        if count > self.num_free:
            raise OutOfMemory(
                f"{count} KV pages asked, {self.num_free} of {self.num_pages} are free",
                field="num_pages",
            )
        if count == 0:
            return NO_INTS
        left = self.num_free - count
        # Ascending where the stack allows: a run of consecutive pages is read without a gather.
        pages: IntArray = self._free[left : self.num_free][::-1].copy()
        self.refcounts[pages] = 1
        self.num_free = left
        return pages

    def retain(self, pages: IntArray) -> None:
        """Add one reference to each of `pages`, which must be in use."""
        if len(pages) <= _FEW:
            for page in pages.tolist():
                self._count(page, 1)
            return
        counts = self.refcounts[pages]
        assert every(counts), "retained a free page"
        self.refcounts[pages] = counts + 1

    def release(self, pages: IntArray) -> None:
        """Drop one reference of each of `pages`; those without any left become free."""
        if len(pages) <= _FEW:
            for page in pages.tolist():
                if self._count(page, -1) == 0:
                    self._free[self.num_free] = page
                    self.num_free += 1
            return
        counts = self.refcounts[pages]
        assert every(counts), "released a free page"
        self.refcounts[pages] = counts - 1
        freed = pages[counts == 1]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def _count(self, page: int, change: int) -> int:
        """Change the references of a page that is in use; those it has now."""
        count: int = self.refcounts.item(page)
        assert count > 0, f"{'retained' if change > 0 else 'released'} a free page"
        self.refcounts[page] = count + change
        return count + change

    def release_many(self, pages: IntArray) -> None:
        """As `release`, where a page may be named as often as it is held."""
        counts = self.refcounts - np.bincount(pages, minlength=self.num_pages).astype(np.int32)
        assert (counts >= 0).all(), "released a free page"
        freed = np.flatnonzero((counts == 0) & (self.refcounts > 0)).astype(np.int32)
        self.refcounts[:] = counts
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def check_integrity(self) -> None:
        """Assert that the free stack and the reference counts tell the same story."""
        free = self._free[: self.num_free]
        unused = np.flatnonzero(self.refcounts == 0)
        assert (self.refcounts >= 0).all(), f"negative refcount: {self.refcounts.min()}"
        assert np.array_equal(np.sort(free), unused), (
            f"{len(free)} pages on the free stack, {len(unused)} pages without a holder"
        )
