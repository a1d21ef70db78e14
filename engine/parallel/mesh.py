"""The place of one rank among the ranks of a replica."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Coordinates of this rank: `tp_rank` of the `tp_size` ranks that share one copy of the model,
    which is copy `dp_rank` of `dp_size`. Each copy computes rows of its own.

    ep_size: ranks that share the experts of a layer: 1, or all of the replica.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    ep_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} is no rank of tp_size {self.tp_size}")
        if self.dp_size < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank {self.dp_rank} is no rank of dp_size {self.dp_size}")
        if self.ep_size not in (1, self.size):
            raise ValueError(f"ep_size {self.ep_size} is neither 1 nor all {self.size} ranks")

    @classmethod
    def of(cls, config: ParallelConfig, rank: int) -> Mesh:
        """The place of the replica's `rank`: the ranks of a copy are adjacent."""
        dp_rank, tp_rank = divmod(rank, config.tp_size)
        return cls(
            dp_rank=dp_rank,
            dp_size=config.dp_size,
            tp_rank=tp_rank,
            tp_size=config.tp_size,
            ep_size=config.num_ranks if config.ep else 1,
        )

    @property
    def rank(self) -> int:
        """This rank among all of the replica."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def size(self) -> int:
        """Ranks of the replica."""
        return self.dp_size * self.tp_size
