"""What a block adds to the residual stream, whose sum over ranks may still be to do.

The norm that comes next closes it (`RMSNorm.add`): summing over ranks, adding and normalising are
then one kernel.

Legend: T tokens, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.parallel.collectives import Collectives


@dataclass(frozen=True, eq=False)
class Partial:
    """This rank's part of a summand, [T, E]: the parts of all ranks add up to it."""

    own_TE: torch.Tensor
    collectives: Collectives

    def whole(self) -> torch.Tensor:
        """The sum over ranks. Once only: it may overwrite the part."""
        return self.collectives.all_reduce(self.own_TE)


Summand = torch.Tensor | Partial


def whole(summand: Summand) -> torch.Tensor:
    """The summand with nothing left to do, [T, E]."""
    return summand.whole() if isinstance(summand, Partial) else summand
