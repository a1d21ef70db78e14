"""Which rows of a batch read the same KV pages: the tree of shared prefixes of one step.

Samples of one prompt, and prompts with the same few-shot examples, hold the same pages at
the front of their page tables. Reading such pages once for all their rows, instead of once a
row, is hierarchical ("cascade") attention: Juravsky et al., Hydragen, arXiv 2402.05099;
FlashInfer's cascade inference. This file only finds the tree; numpy, no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Page reads that a segment must save to pay for one more attention call and merge a layer.
MIN_PAGES_SAVED = 24


@dataclass(frozen=True)
class Segment:
    """Rows [row_start, row_stop) all hold the same pages in columns [page_start, page_stop)."""

    row_start: int
    row_stop: int
    page_start: int
    page_stop: int


@dataclass(frozen=True)
class SharedPrefixes:
    """Segments, parents before children, and per row the first column no segment covers."""

    segments: list[Segment]
    own_start_R: np.ndarray


def find_shared_prefixes(
    page_table_RP: np.ndarray,
    computed_R: np.ndarray,
    page_size: int,
    min_pages_saved: int = MIN_PAGES_SAVED,
) -> SharedPrefixes:
    """Find page runs that adjacent rows share and that pay for an attention call of their own.

    page_table_RP: int [R, P], row r's pages in order. computed_R: int [R], tokens of each row
    that are in the cache before this step; only pages that lie wholly below it are shared,
    because every query of the row may read them without a causal mask.
    """
    num_rows = len(computed_R)
    own_start = np.zeros(num_rows, dtype=np.int64)
    segments: list[Segment] = []
    if num_rows < 2:
        return SharedPrefixes(segments, own_start)
    common = common_pages(page_table_RP, computed_R // page_size)
    pending = [(0, num_rows, 0)]
    while pending:
        start, stop, depth = pending.pop()
        if stop - start < 2:
            continue
        shared = int(common[start : stop - 1].min())
        if (shared - depth) * (stop - start - 1) >= min_pages_saved:
            segments.append(Segment(start, stop, depth, shared))
            own_start[start:stop] = shared
            depth = shared
        cuts = start + 1 + np.flatnonzero(common[start : stop - 1] == shared)
        edges = [start, *cuts.tolist(), stop]
        pending.extend((a, b, depth) for a, b in pairwise(edges))
    return SharedPrefixes(segments, own_start)


def common_pages(page_table_RP: np.ndarray, full_pages_R: np.ndarray) -> np.ndarray:
    """Leading pages that row r and row r + 1 have in common, both fully computed: [R - 1]."""
    most = int(full_pages_R.max(initial=0))
    limit = np.minimum(full_pages_R[1:], full_pages_R[:-1])
    if most == 0:
        return limit
    differ = page_table_RP[1:, :most] != page_table_RP[:-1, :most]
    first = np.where(differ.any(axis=1), differ.argmax(axis=1), most)
    return np.minimum(first, limit)
