"""Which KV pages hold zeros in place of keys or values that were not finite."""

from __future__ import annotations

import numpy as np


class SpoiltPages:
    """Marks of the pages of one pool, on the host.

    The back end that writes zeros for NaN (`engine.attention.torch_native`) marks their pages
    and asks, for each step, which rows attend to a marked page: what these sample looks finite
    and is wrong. A mark follows a copy of its page and ends when the page is begun anew.
    """

    def __init__(self, num_pages: int) -> None:
        self._marks = np.zeros(num_pages, dtype=np.bool_)
        self._any = False

    def mark(self, pages: np.ndarray) -> None:
        """These pages (any integers) got zeros for numbers that were not finite."""
        self._marks[pages] = True
        self._any = True

    def copied(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Pages `dst` are now what pages `src` are."""
        if self._any:
            self._marks[dst] = self._marks[src]

    def begun(self, pages: np.ndarray) -> None:
        """These pages are about to be written from their first position on."""
        if self._any:
            self._marks[pages] = False
            self._any = bool(self._marks.any())

    def rows(self, pages_RP: np.ndarray, kv_lens_R: np.ndarray, page_size: int) -> np.ndarray:
        """Which rows read a marked page, bool [R]; page p of a row holds its tokens from
        p * `page_size` on, of which there are `kv_lens_R`."""
        if not self._any:
            return np.zeros(len(kv_lens_R), dtype=np.bool_)
        used_RP = np.arange(pages_RP.shape[1]) < -(-kv_lens_R // page_size)[:, None]
        found: np.ndarray = (self._marks[pages_RP] & used_RP).any(axis=1)
        return found
