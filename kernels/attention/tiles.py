"""How decode cuts rows and groups of rows, as its callers need to know it. No Triton here.

R rows, K kv heads, T tiles (all that may ever be used; those in use come first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_SPLITS = 32
MIN_SPLIT = 128
"""A row's KV is cut into at most MAX_SPLITS splits of MIN_SPLIT positions or a multiple."""
TILE_ROWS = 16
"""Rows of a tile at most."""
WHOLE_FROM = 128
"""Rows times kv heads from which a program takes a whole row: about one for each processor."""


@dataclass(frozen=True)
class SharedTiles:
    """Runs of adjacent rows whose first pages are the same pages.

    tile_T3: int32 [T, 3], first row, number of rows (TILE_ROWS at most), number of shared
    tokens; zeros where the tile is not in use. Tokens: a multiple of MIN_SPLIT, below the KV
    length of every row of the tile, and MAX_SPLITS * MIN_SPLIT at most.
    tokens_R: int32 [R], shared tokens of the row's tile, 0 for a row without one.
    """

    tile_T3: torch.Tensor
    tokens_R: torch.Tensor


def takes_whole_rows(num_rows: int, num_kv_heads: int) -> bool:
    """Whether a program of a batch without shared tiles takes a whole row: its cost does then
    not depend on any bound of the KV length."""
    return num_rows * num_kv_heads >= WHOLE_FROM
