"""How calls are cut into programs."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.collectives.mailbox import NUM_LANES


@dataclass(frozen=True)
class Cut:
    """Programs of `warps` warps that take `tile` words at a time; `programs` of them at most."""

    tile: int
    warps: int
    programs: int = NUM_LANES


_ALIGNED = 16
"""Words; where shares begin at a multiple of them, accesses are of 16 bytes."""
SMALL, MIDDLE, LARGE = Cut(256, 2), Cut(1024, 8), Cut(2048, 16)
_MIDDLE_WORDS, _LARGE_WORDS = 256 * NUM_LANES, 1024 * NUM_LANES


def programs(num_words: int, cut: Cut, lane_words: int) -> int:
    """How many programs take `num_words`; each has room for its tiles in its lane."""
    tiles = -(-num_words // cut.tile)
    used = min(tiles, cut.programs)
    assert -(-tiles // used) * cut.tile <= lane_words, "more than a lane holds"
    return used


def share_words(num_words: int, size: int) -> int:
    """Words of an all-reduce in two shots that one of `size` ranks adds up; the last rank's may be
    fewer."""
    return -(-num_words // (size * _ALIGNED)) * _ALIGNED


def choose(num_words: int) -> Cut:
    """The cut for a share of `num_words`: a few words a thread, in one tile a program while
    there are lanes for it."""
    if num_words <= _MIDDLE_WORDS:
        return SMALL
    return MIDDLE if num_words <= _LARGE_WORDS else LARGE
