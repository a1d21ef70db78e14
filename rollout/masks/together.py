"""Masks of many rows, looked at as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.protocol import BitArray, IntArray
from rollout.masks.base import MaskedRow, MaskOf, PendingMask, PendingMasks, banned_ids

Asked = tuple[MaskedRow, Sequence[PendingMask]]
"""A row, and what was asked for it."""


@dataclass(frozen=True)
class Block:
    """Masks of some rows of a step: rows int32 [n], bits uint32 [n, words]."""

    rows: IntArray
    bits: BitArray


def checked_together(asked: Sequence[Asked], inside: BitArray) -> list[Block]:
    """The masks that are there and in order of rows whose one part was computed with those of
    others. Of a row that is left out nothing is said: it has to be looked at by itself.

    inside: uint32 [words], the mask that allows the whole vocabulary.
    """
    jobs: dict[int, tuple[PendingMasks, list[tuple[int, int]]]] = {}
    for row, parts in asked:
        part = parts[0] if len(parts) == 1 else None
        if isinstance(part, MaskOf) and not banned_ids(row.request, len(row.output_ids)):
            jobs.setdefault(id(part.masks), (part.masks, []))[1].append((row.row, part.index))
    blocks = [_in_order(masks, rows, inside) for masks, rows in jobs.values()]
    return [block for block in blocks if block is not None]


def _in_order(masks: PendingMasks, rows: list[tuple[int, int]], inside: BitArray) -> Block | None:
    try:
        if not masks.done():
            return None
        bits, errors = masks.results()
    except Exception:
        # A boundary: each of these rows is told by itself.
        return None
    if bits.dtype != inside.dtype or bits.shape[1:] != inside.shape:
        return None
    # The largest word is 0 where every word is; only the last has bits of no token.
    allows = (bits[:, -1] & inside[-1]) != 0
    if bits.shape[1] > 1:
        allows |= bits[:, :-1].max(axis=1) != 0
    if errors:
        allows[list(errors)] = False
    numbers, indices = np.array(rows, np.int32).T
    kept = allows[indices]
    if kept.all() and len(indices) == len(bits) and (np.diff(indices) == 1).all():
        # All of them, as they are: as in nearly every step, and so that none is copied.
        return Block(numbers, bits)
    return Block(numbers[kept], bits[indices[kept]])
