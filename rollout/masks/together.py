"""Masks of many rows, looked at as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.protocol import BitArray
from rollout.masks.base import (
    Course,
    KnownMask,
    MaskedRow,
    MaskOf,
    PendingMask,
    PendingMasks,
    banned_ids,
)

Asked = tuple[MaskedRow, Sequence[PendingMask]]
"""A row, and what was asked for it."""


@dataclass(frozen=True)
class Answered:
    """The mask of a row, in order, which nothing else restricts; where its output stands, if that
    is known."""

    row: MaskedRow
    mask: KnownMask
    course: Course | None


@dataclass(frozen=True)
class Together:
    """answered: masks that are there. computed: rows whose masks are being computed."""

    answered: list[Answered]
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
        else:
            found.answered.extend(_in_order(masks, rows, inside))
    return found


def _in_order(
    masks: PendingMasks, asked: list[tuple[MaskedRow, int]], inside: BitArray
) -> list[Answered]:
    """The masks of a job that is done, of the rows that nothing else restricts."""
    asked = [
        (row, index) for row, index in asked if not banned_ids(row.request, len(row.output_ids))
    ]
    if not asked:
        return []
    try:
        bits, errors = masks.results()
        courses = masks.courses()
    except Exception:
        # A boundary, as above.
        return []
    if bits.dtype != inside.dtype or bits.shape[1:] != inside.shape:
        return []
    # The largest word is 0 where every word is; only the last has bits of no token.
    allows = (bits[:, -1] & inside[-1]) != 0
    if bits.shape[1] > 1:
        allows |= bits[:, :-1].max(axis=1) != 0
    if errors:
        allows[list(errors)] = False
    return [_answered(row, bits[index], courses[index]) for row, index in asked if allows[index]]


def _answered(row: MaskedRow, bits: BitArray, course: Course | None) -> Answered:
    known = None if course is None else course.mask
    return Answered(row, KnownMask(bits) if known is None else known, course)
