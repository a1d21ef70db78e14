"""The place of one rank among the ranks of a replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Tensor-parallel coordinates of this rank: `tp_rank` of `tp_size` ranks."""

    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} is no rank of tp_size {self.tp_size}")
