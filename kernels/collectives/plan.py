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


SMALL, MIDDLE, LARGE = Cut(256, 2), Cut(1024, 8), Cut(2048, 16)
_MIDDLE_WORDS, _LARGE_WORDS = 256 * NUM_LANES, 1024 * NUM_LANES


def choose(num_words: int) -> Cut:
    """The cut for a share of `num_words`: a few words a thread, in one tile a program while
    there are lanes for it."""
    if num_words <= _MIDDLE_WORDS:
        return SMALL
    return MIDDLE if num_words <= _LARGE_WORDS else LARGE
