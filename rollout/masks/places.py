"""Where masks stand in the ranks' table (`StepMasks`), so that each is sent once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from engine.protocol import StepMasks, StepPlan
from rollout.masks.base import KnownMask, num_words
from rollout.scheduler.copies.frame import first_rows, rows_of_copies

_KEPT_BYTES = 16 << 20


class MaskPlaces:
    """The table of the ranks of one copy of the model. Masks that may come again, which are sound,
    keep their places until others need them; of the rows of a step there is a place for each."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        """max_rows: of a step."""
        self._num_words = num_words(vocab_size)
        self._num_places = max_rows + _KEPT_BYTES // (4 * self._num_words)
        self.forget()

    def forget(self) -> None:
        """Nobody knows what the ranks have."""
        self._kept: OrderedDict[KnownMask, int] = OrderedDict()
        self._free: list[int] = []
        self._next = 0

    def frame(self, step: int, rows: Sequence[int], masks: Sequence[KnownMask]) -> StepMasks:
        """The frame of a step. rows: ascending. masks: of each of them."""
        kept = self._kept
        # Each once, and those that stand there already first, so that none of them has to go.
        places = dict.fromkeys(masks, -1)
        for mask in places:
            if mask in kept:
                kept.move_to_end(mask)
                places[mask] = kept[mask]
        new = [mask for mask, place in places.items() if place < 0]
        bits = [mask.bits for mask in new if mask.bits is not None]
        assert len(bits) == len(new), "a mask that allows everything is none"
        for mask in new:
            places[mask] = self._free_place()
            if mask.sound:
                kept[mask] = places[mask]
        self._free += [places[mask] for mask in new if not mask.sound]
        return StepMasks(
            step=step,
            rows=np.array(rows, np.int32),
            places=np.array([places[mask] for mask in masks], np.int32),
            new=np.array([places[mask] for mask in new], np.int32),
            bits=np.stack(bits) if bits else np.empty((0, self._num_words), np.uint32),
        )

    def _free_place(self) -> int:
        if self._free:
            return self._free.pop()
        if self._next < self._num_places:
            self._next += 1
            return self._next - 1
        return self._kept.popitem(last=False)[1]


def framed_masks(
    copies: Sequence[MaskPlaces],
    plan: StepPlan,
    rows: Sequence[int],
    masks: Sequence[KnownMask],
) -> StepMasks:
    """The frame of a step for all copies of the model. rows: ascending, as in `MaskedRow`. masks:
    of each of them."""
    owns = zip(copies, first_rows(plan), rows_of_copies(rows, plan), strict=True)
    first, *further = (
        places.frame(plan.step, [row - start for row in rows[own]], masks[own])
        for places, start, own in owns
    )
    return replace(first, further=further)
