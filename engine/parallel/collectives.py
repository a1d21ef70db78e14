"""What the layers of a sharded model ask of the other ranks.

Legend: N ranks, R rows, D width; `...` any dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.weighting import Weighting


class Norm(Protocol):
    """What a collective asks of the norm that follows it; see `engine.layers.norm.RMSNorm`."""

    eps: float
    weighting: Weighting

    @property
    def weight(self) -> torch.Tensor:
        """[D]."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        ...


class Collectives(Protocol):
    """Collectives of one tensor-parallel group. Every rank makes the same calls in the same
    order, and every rank gets the same bits. A call that the others do not join raises
    EngineDead, or on a GPU returns at once and never completes until `abort`.

    description: how the ranks reach each other, for people."""

    description: str

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, which may be overwritten. x contiguous, any shape."""
        ...

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`norm.add(all_reduce(x), residual)`, the same bits. x: [..., D], as for `all_reduce`."""
        ...

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x [R, ...] below each other: [N * R, ...]. x contiguous."""
        ...

    def reduce_scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's R rows of the sum of every rank's x [N * R, ...], which may be overwritten.
        x contiguous."""
        ...

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's x [..., sizes[rank]] side by side: [..., sum(sizes)]."""
        ...

    def minimum(self, value: int) -> int:
        """The least of every rank's value, over the host, while the ranks start."""
        ...

    def agree(self, value: int) -> int:
        """The least of every rank's value, over a connection of its own: for commands about an
        update, some of which run beside steps, so that their orders cannot cross."""
        ...

    def abort(self) -> None:
        """Give up on the other ranks: calls that wait for them end. Callable from any thread,
        idempotent; nothing else may be called after it."""
        ...

    def close(self) -> None:
        """Leave the group once no captured graph uses it any more. Idempotent."""
        ...


class NoCollectives:
    """The group of a single rank: everything is what it is already."""

    description = "one rank"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x itself."""
        return norm.add(x, residual)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def reduce_scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """x itself."""
        return x

    def minimum(self, value: int) -> int:
        """The value itself."""
        return value

    def agree(self, value: int) -> int:
        """The value itself."""
        return value

    def abort(self) -> None:
        """Nobody to give up on."""

    def close(self) -> None:
        """No group to leave."""


def gather_last(
    x: torch.Tensor,
    sizes: Sequence[int],
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`Collectives.all_gather_last` over a `gather` that takes equal shapes only.

    gather: contiguous x [..., n] -> [ranks, ..., n]. Shorter pieces are padded to the longest.
    """
    padded = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
    pieces = gather(padded)
    return torch.cat([piece[..., :size] for piece, size in zip(pieces, sizes, strict=True)], -1)
