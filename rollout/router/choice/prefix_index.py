"""Which workers have which prefixes of prompts in their caches, as far as a router knows.

A prompt is the bytes of its JSON, in blocks; a block is known by the hash of all bytes up to its
end, so that one dictionary holds every prefix. What a worker forgets by itself is not seen here: an
entry is a guess, which is dropped when the worker's epoch moves, or as the least recently used.
"""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_BYTES = 256
"""Some 50 to 64 ids."""
MOST_HOLDERS = 4
MOST_BLOCKS = 256
"""Of one prompt, which are looked at: what is longer is told apart by its first 64 KiB."""

Holder = tuple[str, int]
"""URL and epoch of a worker."""


class PrefixIndex:
    """Holders of prefixes; at most `most` blocks, the least recently used of which goes first."""

    def __init__(self, most: int = 1 << 20) -> None:
        self._most = most
        self._holders: dict[int, list[Holder]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def longest(self, blocks: Sequence[int]) -> list[tuple[Holder, int]]:
        """Holders of prefixes and how many blocks each has, most first; at most `MOST_HOLDERS`."""
        found: dict[Holder, int] = {}
        known = self._holders
        # The number of blocks that anybody has, by bisection: who has a block has those before it.
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        while low and len(found) < MOST_HOLDERS:
            for holder in known.get(blocks[low - 1], ()):
                found.setdefault(holder, low)
            # Whoever has less is found further up, in steps that halve.
            low //= 2
        return sorted(found.items(), key=lambda item: -item[1])[:MOST_HOLDERS]

    def insert(self, blocks: Sequence[int], holder: Holder) -> None:
        """`holder` gets a prompt of these blocks."""
        known = self._holders
        for block in reversed(blocks):
            holders = known.pop(block, None)
            # At the end of the dictionary: that of its first block is the last to go.
            known[block] = _with(holders, holder)
        while len(known) > self._most:
            del known[next(iter(known))]


def blocks_of(prompt: bytes) -> list[int]:
    """The hash of the prompt up to the end of each whole block."""
    found: list[int] = []
    state = 0
    end = min(len(prompt), MOST_BLOCKS * BLOCK_BYTES)
    for at in range(0, end - BLOCK_BYTES + 1, BLOCK_BYTES):
        state = hash((state, prompt[at : at + BLOCK_BYTES]))
        found.append(state)
    return found


def _with(holders: list[Holder] | None, holder: Holder) -> list[Holder]:
    if holders is None:
        return [holder]
    if holders[0] != holder:
        url = holder[0]
        kept = [known for known in holders if known[0] != url]
        return [holder, *kept[: MOST_HOLDERS - 1]]
    return holders
