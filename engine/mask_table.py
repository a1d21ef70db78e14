"""The masks that a rank was sent, and which of them the rows of a step have.

Shapes: S rows, M of them masked, N masks, B words of 32 bits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.protocol import StepMasks
from engine.transfer import Staging, to_device
from kernels.sampling import TokenMasks


@dataclass(frozen=True)
class RowMasks:
    """The masks of some rows of a step.

    rows: int32 [M], ascending. places: int32 [M], the row of `bits_NB` that each has. bits_NB: as
    in `kernels.sampling.TokenMasks`.
    """

    rows: np.ndarray
    places: np.ndarray
    bits_NB: torch.Tensor

    def of(self, chosen_M: np.ndarray) -> RowMasks:
        """Those that `chosen_M` (bool) names."""
        if chosen_M.all():
            return self
        return replace(self, rows=self.rows[chosen_M], places=self.places[chosen_M])

    def bits(self) -> torch.Tensor:
        """The masks one behind the other, int32 [M, B]."""
        places_M = to_device(self.places.astype(np.int64), self.bits_NB.device)
        return self.bits_NB[places_M]

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """The masks as booleans, [M, V]. On a CPU."""
        packed = np.ascontiguousarray(self.bits().numpy(), "<i4").view(np.uint8)
        flags = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))


class MaskTable:
    """As many places as were written to, on one device; what is written is there for every step
    that is queued from then on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)
        self._bits_NB = torch.zeros((0, 0), dtype=torch.int32, device=device)

    def enter(self, masks: StepMasks) -> RowMasks:
        """Write the masks that are new, and return those of the rows of the step."""
        if len(masks.new):
            self._grow(int(masks.new.max()) + 1, masks.bits.shape[1])
            bits = np.ascontiguousarray(masks.bits, "<u4").view(np.int32)
            bits_MB, new_M = self._staging.send([bits, masks.new])
            self._bits_NB.index_copy_(0, new_M.long(), bits_MB)
        return RowMasks(masks.rows, masks.places, self._bits_NB)

    def _grow(self, num_places: int, num_words: int) -> None:
        before_NB = self._bits_NB
        if num_places <= len(before_NB):
            return
        # Twice as many, so that a table that fills up is moved a few times only.
        shape = (max(num_places, 2 * len(before_NB)), num_words)
        self._bits_NB = torch.zeros(shape, dtype=torch.int32, device=self._device)
        if len(before_NB):
            self._bits_NB[: len(before_NB)] = before_NB


def token_masks(masks: RowMasks, num_rows: int, staging: Staging) -> TokenMasks:
    """Masks of some of `num_rows` rows as the draw takes them."""
    mask_S = np.full(num_rows, -1, np.int32)
    mask_S[masks.rows] = masks.places
    (sent_S,) = staging.send([mask_S])
    return TokenMasks(masks.bits_NB, sent_S)
