"""Where the ranks of one group leave each other words: memory that every rank has mapped.

Legend: N ranks, L lanes, W words of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EMPTY = -1
"""A word that nobody has written yet. Two 16-bit numbers or one float32 of these bits are NaN."""
NUM_LANES = 128
"""Programs that exchange words side by side, each with one lane of every other rank."""
HALVES = 2
"""A lane's words for calls of even and of odd turns."""
LANE_UNIT = 4096
"""Words that a lane has some number of times: whole tiles of every size, also in half of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mailbox:
    """The mapped memory of one rank and how it reaches that of the others.

    addresses: of every rank's `words`, as this rank sees them. words: int32 [2, N, L, W], what the
    others leave for this rank; all EMPTY between calls. turns: int32 [L], which half comes next.
    give_up: int32 [1] in pinned memory of the host; not 0 ends every wait, results are then
    undefined and the mailbox of no use any more.
    """

    rank: int
    size: int
    addresses: tuple[int, ...]
    words: torch.Tensor
    turns: torch.Tensor
    give_up: torch.Tensor

    @property
    def lane_words(self) -> int:
        """Words that one rank may leave for another in one lane, W."""
        return self.words.shape[-1]

    @property
    def source_bytes(self) -> int:
        """Bytes that one rank may leave for another in one call."""
        return 4 * NUM_LANES * self.lane_words


def words_shape(size: int, num_bytes: int) -> tuple[int, int, int, int]:
    """Shape of `Mailbox.words` of `size` ranks in `num_bytes`, or in the least that will do."""
    units = num_bytes // (4 * HALVES * size * NUM_LANES * LANE_UNIT)
    return (HALVES, size, NUM_LANES, max(units, 1) * LANE_UNIT)


def open_mailbox(
    rank: int, words: torch.Tensor, addresses: Sequence[int], give_up: torch.Tensor
) -> Mailbox:
    """The mailbox of `rank` over mapped memory of `words_shape`, emptied.

    The ranks have to meet once more between this and the first call: what one leaves before
    another has emptied its memory is lost.
    """
    words.fill_(EMPTY)
    turns = torch.zeros(NUM_LANES, dtype=torch.int32, device=words.device)
    return Mailbox(
        rank=rank,
        size=words.shape[1],
        addresses=tuple(addresses),
        words=words,
        turns=turns,
        give_up=give_up,
    )
