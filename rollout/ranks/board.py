"""Which step each rank has launched last: one file that the processes of a replica map."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_NOTHING = -1


class StepBoard:
    """One number a rank; a rank writes its own, and whoever misses it reads all.

    Made by the leader with `create`; ranks open what is there.
    """

    def __init__(self, path: Path, num_ranks: int, *, create: bool = False) -> None:
        if create:
            np.full(num_ranks, _NOTHING, dtype=np.int64).tofile(path)
        self._steps = np.memmap(path, dtype=np.int64, mode="r+", shape=(num_ranks,))

    def note(self, rank: int, step: int) -> None:
        """`rank` has launched `step`."""
        self._steps[rank] = step

    def behind(self, step: int) -> list[int]:
        """Ranks that have not launched `step`."""
        return [rank for rank, last in enumerate(self._steps.tolist()) if last < step]
