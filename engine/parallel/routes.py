"""Which collective goes which way: by mapped memory in one shot or two, or by NCCL.

Pure, and the same on every rank: all of them see the same sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAILBOX_BYTES = 32 << 20
"""Mapped memory of one rank, whatever the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Up to how many bytes each goes by mapped memory; above, by NCCL.

    one_shot, two_shot: of the tensor that an all-reduce adds up; `two_shot` above `one_shot`, in
    pieces where the mailbox is smaller. normed: of one that a norm follows in the same kernel.
    gather: of one rank's rows. scatter: of the rows that one rank gets.
    """

    one_shot: int
    two_shot: int
    normed: int
    gather: int
    scatter: int

    def shots(self, num_bytes: int) -> int:
        """How many shots an all-reduce takes; 0 for NCCL."""
        if num_bytes <= self.one_shot:
            return 1
        return 2 if num_bytes <= self.two_shot else 0


_KIB, _MIB = 1 << 10, 1 << 20
_MEASURED: Mapping[int, Routes] = MappingProxyType(
    {
        2: Routes(
            one_shot=2 * _MIB,
            two_shot=8 * _MIB,
            normed=2 * _MIB,
            gather=8 * _MIB,
            scatter=8 * _MIB,
        ),
        4: Routes(
            one_shot=256 * _KIB,
            two_shot=8 * _MIB,
            normed=256 * _KIB,
            gather=2 * _MIB,
            scatter=2 * _MIB,
        ),
    }
)
"""By the number of ranks. Of 2: measured on two H200 with torch 2.11.0+cu130, NCCL 2.28, on rows of
4,096 bfloat16 (`benchmarks/results/collectives-2xh200.json`). Of 4: from those figures, one shot
sending three times as much as it does between 2, two shots one and a half times."""
# As much as surely gains.
_OTHERS = Routes(
    one_shot=64 * _KIB, two_shot=4 * _MIB, normed=64 * _KIB, gather=256 * _KIB, scatter=256 * _KIB
)


def routes_of(num_ranks: int) -> Routes:
    """The table for a group of `num_ranks`."""
    return _MEASURED.get(num_ranks, _OTHERS)
