"""Which workers have which prefixes of prompts in their caches, as far as a router knows.

A prompt is the bytes of its JSON, in blocks; a block is known by the hash of all bytes up to its
end, so that one dictionary holds every prefix. What a worker forgets by itself is not seen here: an
entry is a guess, which is dropped when the worker's epoch moves, or as the least recently used.

Holders are numbers, so that a million entries give Python's collector of cycles nothing to walk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MOST_HOLDERS = 4

_EPOCH_BITS = 32


def holder_of(number: int, epoch: int) -> int:
    """The worker of that number, with the cache that it has in that epoch."""
    return number << _EPOCH_BITS | epoch & (1 << _EPOCH_BITS) - 1


def number_of(holder: int) -> int:
    """The worker's number."""
    return holder >> _EPOCH_BITS


class PrefixIndex:
    """Holders of prefixes; at most `most` blocks, the least recently used of which goes first."""

    def __init__(self, most: int = 1 << 20) -> None:
        self._most = most
        # The first of a plain dict is found by passing over all that were deleted before it. One
        # holder stands for itself, several are a tuple, the latest first.
        self._holders: OrderedDict[int, int | tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def num_known(self, blocks: Sequence[int]) -> int:
        """How many of the blocks anybody has; by bisection, since who has one has those before."""
        known, low, high = self._holders, 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        return low

    def longest(self, blocks: Sequence[int], num_known: int) -> dict[int, int]:
        """Holders of prefixes and how many blocks each has, most first; at most `MOST_HOLDERS`."""
        known, found = self._holders, dict[int, int]()
        while num_known and len(found) < MOST_HOLDERS:
            holders = known.get(blocks[num_known - 1], ())
            for holder in (holders,) if isinstance(holders, int) else holders:
                if len(found) < MOST_HOLDERS:
                    found.setdefault(holder, num_known)
            # Whoever has less is found further up, in steps that halve.
            num_known //= 2
        return found

    def insert(self, blocks: Sequence[int], num_known: int, holder: int) -> None:
        """`holder` gets a prompt of these blocks, of which somebody has the first `num_known`."""
        known = self._holders
        # The first block of a prompt is the last of it to go.
        if num_known < len(blocks):
            known.update(dict.fromkeys(reversed(blocks[num_known:]), holder))
        for block in reversed(blocks[:num_known]):
            holders = known.get(block, holder)
            if holders != holder:
                known[block] = _with(holders, holder)
            known.move_to_end(block)
        while len(known) > self._most:
            known.popitem(last=False)


def _with(holders: int | tuple[int, ...], holder: int) -> int | tuple[int, ...]:
    """The holders of a block after `holder` got it too, in place of the same worker before."""
    several = (holders,) if isinstance(holders, int) else holders
    if several[0] == holder:
        return holders
    number = holder >> _EPOCH_BITS
    kept = [known for known in several if known >> _EPOCH_BITS != number]
    return (holder, *kept[: MOST_HOLDERS - 1]) if kept else holder
