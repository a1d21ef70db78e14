"""Which KV pages hold zeros in place of keys or values that were not finite, and from where on."""

from __future__ import annotations

import numpy as np

_CLEAN = np.iinfo(np.int32).max


class SpoiltPages:
    """Marks of the pages of one pool, on the host.

    The back end that writes zeros for NaN (`engine.attention.torch_native`) marks their places
    and asks, for each step, which rows attend to a marked one: what these sample looks finite
    and is wrong. Of a page the first marked position is kept, so that a row that took over what
    lies before it is not blamed. A mark follows a copy of its page, and ends when something is
    written at its position or before: a page is filled in order, by one row.
    """

    def __init__(self, num_pages: int) -> None:
        self._first_N = np.full(num_pages, _CLEAN, dtype=np.int32)
        self._any = False

    @property
    def any(self) -> bool:
        """Whether a place is marked; while none is, nobody needs to say what is written."""
        return self._any

    def mark(self, pages: np.ndarray, positions: np.ndarray) -> None:
        """These places (any integers; positions in their pages) got zeros for numbers that were
        not finite."""
        np.minimum.at(self._first_N, pages, positions)
        self._any = True

    def copied(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Pages `dst` are now what pages `src` are."""
        if self._any:
            self._first_N[dst] = self._first_N[src]

    def written(self, pages: np.ndarray, positions: np.ndarray) -> None:
        """These places are about to be written, and so is whatever follows in their pages."""
        if self._any:
            ends = positions <= self._first_N[pages]
            self._first_N[pages[ends]] = _CLEAN
            self._any = bool((self._first_N != _CLEAN).any())

    def rows(self, pages_RP: np.ndarray, kv_lens_R: np.ndarray, page_size: int) -> np.ndarray:
        """Which rows read a marked position, bool [R]; page p of a row holds its tokens from
        p * `page_size` on, of which there are `kv_lens_R`."""
        if not self._any:
            return np.zeros(len(kv_lens_R), dtype=np.bool_)
        used_RP = kv_lens_R[:, None] - np.arange(pages_RP.shape[1]) * page_size
        found: np.ndarray = (self._first_N[pages_RP] < used_RP).any(axis=1)
        return found
