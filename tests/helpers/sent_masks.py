"""What a rank has of the masks that it was sent."""

from __future__ import annotations

import numpy as np

from engine.protocol import BitArray, StepMasks


class SentMasks:
    """The table of one rank."""

    def __init__(self) -> None:
        self._table: dict[int, BitArray] = {}

    def enter(self, masks: StepMasks) -> dict[int, BitArray]:
        """The mask of each row of a frame, its copy's alone."""
        assert len(set(masks.new.tolist())) == len(masks.new) == len(masks.bits)
        for place, bits in zip(masks.new.tolist(), masks.bits, strict=True):
            self._table[place] = bits.copy()
        rows = zip(masks.rows.tolist(), masks.places.tolist(), strict=True)
        return {row: self._table[place] for row, place in rows}


def one_a_row(step: int, rows: list[int], bits: list[BitArray]) -> StepMasks:
    """A frame in which each row has a mask of its own, at places 0, 1, ..."""
    places = np.arange(len(rows), dtype=np.int32)
    return StepMasks(
        step=step,
        rows=np.array(rows, np.int32),
        places=places,
        new=places,
        bits=np.stack(bits) if bits else np.empty((0, 1), np.uint32),
    )
