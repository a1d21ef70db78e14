"""A group that cannot be ended may still write to its buffers: nobody else gets their memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from engine.errors import GroupError
from engine.protocol import BeginUpdate, JoinGroup, ReceiveBroadcast
from tests.helpers.weight_engines import fresh, make_rank, pieces, specs


class BreakingGroup:
    """Hands out buffers and breaks at the third broadcast."""

    name = "g"

    def __init__(self, *, hangs: bool) -> None:
        self._hangs = hangs
        self.buffers: list[weakref.ref[torch.Tensor]] = []

    def empty(self, num_bytes: int) -> torch.Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self.buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> int:
        if len(self.buffers) > 2:
            raise GroupError("rank 0 is gone", field=tensor)
        return 0

    def wait(self, ticket: int, deadline: float) -> None:
        pass

    def is_alive(self) -> bool:
        return True

    def abort(self) -> bool:
        return not self._hangs


@pytest.mark.parametrize("hangs", [True, False])
def test_buffers_live_as_long_as_something_may_write_to_them(hangs: bool) -> None:
    model, rank = make_rank()
    new = fresh(model)
    group = BreakingGroup(hangs=hangs)
    join = JoinGroup(name="g", address="", port=0, rank_offset=1, world_size=2)
    rank.groups._open["g"] = (join, group)
    rank.handle(BeginUpdate(version=4, manifest=specs(new), mode="shadow"))
    with pytest.raises(GroupError, match="rank 0 is gone"):
        rank.handle(ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors"))
    gc.collect()
    alive = [ref() is not None for ref in group.buffers]
    assert alive[:2] == [hangs, hangs]
    rank.session.require_servable()
    rank.close()
