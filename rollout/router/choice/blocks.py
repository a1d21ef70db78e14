"""A prompt as the blocks that it begins with, by hashes of everything up to each one's end."""

from __future__ import annotations

from itertools import accumulate
from operator import xor
from struct import Struct

BLOCK_BYTES = 256
"""Some 50 to 64 ids."""
MOST_BLOCKS = 256
"""Of one prompt, which are looked at: what is longer is told apart by its first 64 KiB."""
_BLOCK = Struct(f"{BLOCK_BYTES}s")


def blocks_of(prompt: bytes) -> list[int]:
    """What stands for the prompt up to the end of each whole block: the hashes of all blocks until
    there, each with its number, by exclusive or. They are keyed, anew in each process."""
    count = min(len(prompt) // BLOCK_BYTES, MOST_BLOCKS)
    blocks = _BLOCK.iter_unpack(memoryview(prompt)[: count * BLOCK_BYTES])
    return list(accumulate(map(hash, enumerate(blocks)), xor))
