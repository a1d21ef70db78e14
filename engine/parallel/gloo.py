"""Collectives over the host: what ranks on a CPU compute with, and how ranks on GPUs agree
while they start.

Legend: N ranks; `...` any dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from engine.errors import EngineDead
from engine.parallel.collectives import Norm, gather_last
from engine.protocol.deadlines import AGREE_S, START_AGREE_S
from kernels.collectives import reference
from kernels.torch_compat import AllgatherOptions, all_gather_flat


class GlooCollectives:
    """Collectives of one rank in a gloo group.

    timeout_s: after which a collective that a rank does not join raises EngineDead. updates:
    another group, of all ranks of the replica, for `agree`. everyone: one for `minimum`, if
    `group` has only some of them.
    """

    description = "gloo"

    def __init__(self, group: Any, timeout_s: float, updates: Any, everyone: Any = None) -> None:
        self._group: Any = group
        self._updates: Any = updates
        self._everyone: Any = everyone or group
        self._rank = group.rank()
        self._timeout_s = timeout_s

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in rank order and float32 at least.

        A ring would add each chunk of x in another order, so that a row's bits would depend on
        the batch it is in.
        """
        return reference.all_reduce(self._gather(x.contiguous(), self._timeout_s).unbind(0))

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One after the other."""
        return norm.add(self.all_reduce(x), residual)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's rows below each other."""
        return reference.all_gather_rows(self._gather(x.contiguous(), self._timeout_s).unbind(0))

    def reduce_scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum, added as `all_reduce` adds."""
        parts = self._gather(x.contiguous(), self._timeout_s).unbind(0)
        return reference.reduce_scatter_rows(parts, self._rank)

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's x [..., sizes[rank]] side by side."""
        return gather_last(x, sizes, lambda padded: self._gather(padded, self._timeout_s))

    def minimum(self, value: int) -> int:
        """The least of every rank's value. Ranks may come to it when they have loaded weights,
        some much sooner than others; one whose process ends does not keep them that long."""
        return int(self._gather(torch.tensor([value]), START_AGREE_S, self._everyone).min())

    def agree(self, value: int) -> int:
        """The least of every rank's value; every rank was told of the command at once."""
        return int(self._gather(torch.tensor([value]), AGREE_S, self._updates).min())

    def abort(self) -> None:
        """Nothing: a call that waits ends when the others' connections do, or in time."""

    def close(self) -> None:
        """Leave the group."""
        self._group = self._updates = self._everyone = None

    def _gather(self, x: torch.Tensor, timeout_s: float, group: Any = None) -> torch.Tensor:
        """Contiguous x [...] -> [N, ...]; as bytes, since gloo does not know every dtype."""
        assert self._group is not None, "a collective after the group was left"
        group = group or self._group
        out = x.new_empty((group.size(), *x.shape))
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=timeout_s)
        source, target = x.reshape(-1).view(torch.uint8), out.view(-1).view(torch.uint8)
        try:
            all_gather_flat(group, target, source, options).wait()
        except RuntimeError as error:
            raise EngineDead(
                f"a rank left or missed a collective: {error}", field="ranks"
            ) from error
        return out
