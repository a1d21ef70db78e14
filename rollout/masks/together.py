"""Masks of many rows, looked at as one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import BitArray
from rollout.masks.base import MaskedRow, MaskOf, PendingMask, PendingMasks, banned_ids

Asked = tuple[MaskedRow, Sequence[PendingMask]]
"""A row, and what was asked for it."""


def checked_together(asked: Sequence[Asked], inside: BitArray) -> dict[int, BitArray]:
    """The masks that are there and in order of rows whose one part was computed with those of
    others, by row. Of a row that is left out nothing is said: it has to be looked at by itself.

    inside: uint32 [words], the mask that allows the whole vocabulary.
    """
    jobs: dict[int, tuple[PendingMasks, list[tuple[int, int]]]] = {}
    for row, parts in asked:
        part = parts[0] if len(parts) == 1 else None
        if isinstance(part, MaskOf) and not banned_ids(row.request, len(row.output_ids)):
            jobs.setdefault(id(part.masks), (part.masks, []))[1].append((row.row, part.index))
    found: dict[int, BitArray] = {}
    for masks, rows in jobs.values():
        found |= _in_order(masks, rows, inside)
    return found


def _in_order(
    masks: PendingMasks, rows: list[tuple[int, int]], inside: BitArray
) -> dict[int, BitArray]:
    try:
        if not masks.done():
            return {}
        bits, errors = masks.results()
    except Exception:
        # A boundary: each of these rows is told by itself.
        return {}
    if bits.dtype != inside.dtype or bits.shape[1:] != inside.shape:
        return {}
    # The largest word is 0 where every word is; only the last has bits of no token.
    allows = (bits[:, -1] & inside[-1]) != 0
    if bits.shape[1] > 1:
        allows |= bits[:, :-1].max(axis=1) != 0
    return {row: bits[index] for row, index in rows if index not in errors and allows[index]}
