"""Whether the ranks of every copy of the model hold the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import ParallelConfig
from engine.errors import EngineDead
from engine.protocol import WeightsReport


def difference(reports: Sequence[WeightsReport], parallel: ParallelConfig) -> EngineDead | None:
    """What the checksums of rank 0, 1, ... say: None if each rank of a copy holds what the same
    rank of the first one does, else an error that names the rank and a tensor."""
    first = reports[: parallel.tp_size]
    for rank, report in enumerate(reports):
        other = first[rank % parallel.tp_size]
        for name in {**other.checksums, **report.checksums}:
            if other.checksums.get(name) != report.checksums.get(name):
                return EngineDead(
                    f"{parallel.rank_name(rank)} holds other values of {name!r} than "
                    f"{parallel.rank_name(rank % parallel.tp_size)}: the replica would serve a "
                    "mixture. Start it again",
                    field=f"rank {rank}",
                )
    return None
