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


@dataclass(frozen=True)
class Together:
    """blocks: masks that are there and in order. computed: rows whose masks are being computed."""

    blocks: list[Block]
    computed: set[int]


def look_together(asked: Sequence[Asked], inside: BitArray) -> Together:
    """What came of the rows whose one part is computed with those of others; every such job is
    asked once. Of a row that is left out nothing is said: it has to be looked at by itself.

    inside: uint32 [words], the mask that allows the whole vocabulary.
    """
    jobs: dict[int, tuple[PendingMasks, list[tuple[MaskedRow, int]]]] = {}
    for row, parts in asked:
        part = parts[0] if len(parts) == 1 else None
        if isinstance(part, MaskOf):
            jobs.setdefault(id(part.masks), (part.masks, []))[1].append((row, part.index))
    found = Together([], set())
    for masks, rows in jobs.values():
        try:
            done = masks.done()
        except Exception:
            # A boundary: each of these rows is told by itself.
            continue
        if not done:
            found.computed.update(row.row for row, _ in rows)
        elif (block := _in_order(masks, rows, inside)) is not None:
            found.blocks.append(block)
    return found


def _in_order(
    masks: PendingMasks, asked: list[tuple[MaskedRow, int]], inside: BitArray
) -> Block | None:
    """The masks of a job that is done, of the rows that nothing else restricts."""
    rows = [
        (row.row, index) for row, index in asked if not banned_ids(row.request, len(row.output_ids))
    ]
    if not rows:
        return None
    try:
        bits, errors = masks.results()
    except Exception:
        # A boundary, as above.
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
