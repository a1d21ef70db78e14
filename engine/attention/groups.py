"""Groups of adjacent rows that hold the same pages in front, as tiles for the decode kernel.

One level only, in place of the tree of `engine.attention.sharing`: a row goes on from one
state. Groups change when rows come and go, not from step to step. numpy, no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.attention.sharing import common_pages


@dataclass(frozen=True)
class SharedGroup:
    """Rows [row_start, row_stop) all hold the same pages for their first `tokens` positions."""

    row_start: int
    row_stop: int
    tokens: int


@dataclass(frozen=True)
class GroupRule:
    """Which groups are worth tiles of their own.

    unit: shared tokens count in multiples of this. min_rows, min_tokens: of a group.
    tile_rows: rows that one tile holds. max_kv_len: longer rows stay out of groups.
    min_saved, min_tiles: positions that all groups of a batch together need not read again,
    and tiles that they fill; below either no group of the batch counts.
    """

    unit: int
    min_rows: int
    min_tokens: int
    tile_rows: int
    max_kv_len: int
    min_saved: int = 0
    min_tiles: int = 0

    def saved(self, rows: int, tokens: int) -> int:
        """Positions that a group of so many rows need not read again; 0: not worth it."""
        if rows < self.min_rows or tokens < self.min_tokens:
            return 0
        return tokens * (rows - self.tiles(rows))

    def tiles(self, rows: int) -> int:
        """Tiles of a group of so many rows."""
        return -(-rows // self.tile_rows)


def find_groups(
    page_table_RP: np.ndarray, kv_lens_R: np.ndarray, page_size: int, rule: GroupRule
) -> list[SharedGroup]:
    """Groups of adjacent rows that save many reads; each row is in one at most.

    page_table_RP: int [R, P], row r's pages in order. kv_lens_R: int [R]; a group's tokens end
    before the last token of each of its rows.
    """
    if len(kv_lens_R) < rule.min_rows:
        return []
    usable_R = np.where(kv_lens_R > rule.max_kv_len, 0, kv_lens_R - 1)
    pages = common_pages(page_table_RP, usable_R // page_size)
    common = pages * page_size // rule.unit * rule.unit
    # A list: groups are short, and numpy's calls would cost more than they compute.
    saved, groups = _best_groups(common.tolist(), 0, len(kv_lens_R), rule)
    tiles = sum(rule.tiles(group.row_stop - group.row_start) for group in groups)
    return groups if saved >= rule.min_saved and tiles >= rule.min_tiles else []


def _best_groups(
    common: list[int], start: int, stop: int, rule: GroupRule
) -> tuple[int, list[SharedGroup]]:
    """(reads saved, groups) among rows [start, stop): all as one group, or parts that share
    more and, between them, what rows are left."""
    inner = common[start : stop - 1]
    tokens = min(inner)
    saved = rule.saved(stop - start, tokens)
    whole = [SharedGroup(start, stop, tokens)] if saved else []
    if tokens == max(inner):
        return saved, whole
    edges = [start, *(start + 1 + i for i, shared in enumerate(inner) if shared == tokens), stop]
    groups: list[SharedGroup] = []
    total, left = 0, start
    for part_start, part_stop in pairwise(edges):
        if part_stop - part_start < rule.min_rows:
            continue
        part_saved, part = _best_groups(common, part_start, part_stop, rule)
        if part:
            total += part_saved + _add(groups, left, part[0].row_start, tokens, rule)
            groups += part
            left = part[-1].row_stop
    total += _add(groups, left, stop, tokens, rule)
    return (total, groups) if total > saved else (saved, whole)


def _add(groups: list[SharedGroup], start: int, stop: int, tokens: int, rule: GroupRule) -> int:
    saved = rule.saved(stop - start, tokens)
    if saved:
        groups.append(SharedGroup(start, stop, tokens))
    return saved


def tile_groups(groups: list[SharedGroup], num_rows: int, rule: GroupRule) -> np.ndarray:
    """Cut groups into tiles, as `kernels.attention.SharedTiles` lays them out.

    Returns int32: `most_tiles(num_rows, rule)` triples of (first row, rows, tokens), then the
    shared tokens of each row.
    """
    tiles: list[tuple[int, int, int]] = []
    tokens_R = np.zeros(num_rows, dtype=np.int32)
    for group in groups:
        tokens_R[group.row_start : group.row_stop] = group.tokens
        rows = group.row_stop - group.row_start
        count = rule.tiles(rows)
        edges = [group.row_start + rows * part // count for part in range(count + 1)]
        tiles += [(first, last - first, group.tokens) for first, last in pairwise(edges)]
    triples = np.zeros((most_tiles(num_rows, rule), 3), dtype=np.int32)
    triples[: len(tiles)] = np.array(tiles, dtype=np.int32).reshape(-1, 3)
    return np.concatenate((triples.reshape(-1), tokens_R))


def most_tiles(num_rows: int, rule: GroupRule) -> int:
    """No batch of so many rows needs more tiles."""
    return max(num_rows // rule.min_rows, 2 * num_rows // (rule.tile_rows + 1), 1)


class GroupTracker:
    """The groups of the rows that decode, found anew only when they may have changed."""

    def __init__(self, page_size: int, rule: GroupRule) -> None:
        self._page_size = page_size
        self.rule = rule
        self._slots = np.zeros(0, dtype=np.int32)
        self._kv_lens = np.zeros(0, dtype=np.int32)
        self._watched_RP = np.zeros((0, 0), dtype=np.int32)
        self.groups: list[SharedGroup] = []
        self.version = 0
        """Grows whenever `groups` is found anew."""

    def update(self, slots: np.ndarray, kv_lens: np.ndarray, host_pages: np.ndarray) -> None:
        """Make `groups` those of the rows in `slots`, one row of `host_pages` [slots, P] each."""
        if not self._holds(slots, kv_lens, host_pages):
            columns = min(int(kv_lens.max()), self.rule.max_kv_len) // self._page_size
            pages_RP = host_pages[slots, :columns]
            self.groups = find_groups(pages_RP, kv_lens, self._page_size, self.rule)
            shared = max((group.tokens for group in self.groups), default=0)
            self._watched_RP = pages_RP[:, : shared // self._page_size].copy()
            self._slots = slots
            self.version += 1
        self._kv_lens = kv_lens

    def _holds(self, slots: np.ndarray, kv_lens: np.ndarray, host_pages: np.ndarray) -> bool:
        """Whether the rows are those of the last step and still hold the pages they shared.

        Their pages are compared one by one: a slot may have passed to another sequence. That
        the lengths grow only tells when rows that shared nothing may share something now.
        """
        if not np.array_equal(slots, self._slots) or (kv_lens < self._kv_lens).any():
            return False
        longest = self.rule.max_kv_len
        if np.count_nonzero(kv_lens > longest) != np.count_nonzero(self._kv_lens > longest):
            return False
        watched = self._watched_RP.shape[1]
        return np.array_equal(host_pages[slots, :watched], self._watched_RP)
