"""The calls made of an NCCL group, on a stand-in: no GPU is needed for their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import EngineDead
from engine.parallel.nccl import NcclCollectives


class StandIn:
    """Two ranks that hold the same; like torch, no handle for what is on the caller's stream."""

    def __init__(self) -> None:
        self.num_aborts = 0
        self.on_callers_stream: list[bool] = []

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        self.on_callers_stream.append(not options.asyncOp)
        tensors[0].mul_(2)

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
        self.on_callers_stream.append(not options.asyncOp)
        assert x.is_contiguous()
        out.copy_(torch.stack([x, x]))

    def abort(self) -> None:
        self.num_aborts += 1


class Host:
    """What the NCCL group asks of the gloo group beside it."""

    closed = False

    def minimum(self, value: int) -> int:
        return value - 1

    def close(self) -> None:
        self.closed = True


def test_sums_in_place_on_the_callers_stream() -> None:
    group = StandIn()
    collectives = NcclCollectives(group, Host())
    x = torch.ones(2, 3)
    assert collectives.all_reduce(x) is x
    assert torch.equal(x, torch.full((2, 3), 2.0))
    assert group.on_callers_stream == [True]
    assert collectives.minimum(5) == 4


def test_gathers_pieces_of_different_widths() -> None:
    group = StandIn()
    gathered = NcclCollectives(group, Host()).all_gather_last(torch.arange(6.0).view(2, 3), [3, 2])
    assert gathered.tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert group.on_callers_stream == [True]


def test_a_group_that_was_given_up_is_broken_once_and_not_used_again() -> None:
    group, host = StandIn(), Host()
    collectives = NcclCollectives(group, host)
    collectives.abort()
    collectives.close()
    assert group.num_aborts == 1
    assert host.closed
    with pytest.raises(EngineDead, match="given up"):
        collectives.all_reduce(torch.ones(1))
