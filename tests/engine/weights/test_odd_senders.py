"""Senders whose bytes are not those announced, and tensors that go nowhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from engine.errors import GroupError, WeightUpdateError
from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, ReceiveBroadcast
from tests.helpers.weight_engines import (
    assert_holds,
    contents,
    fresh,
    join,
    make_rank,
    pieces,
    send,
)

COMPUTED = "model.rotary_emb.inv_freq"


@pytest.mark.parametrize("size", ["fewer", "more"])
@pytest.mark.parametrize("layout", ["tensors", "flat", "buckets"])
@pytest.mark.parametrize("mode", ["shadow", "undo"])
def test_a_broadcast_of_another_size_is_no_update(mode: str, layout: str, size: str) -> None:
    """As from a trainer that announces float32 and sends bfloat16, or the other way round."""
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    wire = list(new.values())
    if layout == "tensors":
        wire[3] = wire[3].to(torch.bfloat16 if size == "fewer" else torch.float64)
    else:
        # One bucket of all, which an alignment may pad.
        whole = torch.cat([tensor.reshape(-1) for tensor in wire])
        wire = [whole.to(torch.bfloat16 if size == "fewer" else torch.float64)]
    sender = join([rank])
    with ThreadPoolExecutor(1) as pool:
        rank.handle(BeginUpdate(version=10, mode=mode))
        sent = pool.submit(send, sender, wire)
        command = ReceiveBroadcast(
            group="g", tensors=pieces(new), layout=layout, bucket_bytes=1 << 20, timeout_s=10.0
        )
        with pytest.raises(GroupError, match=f"{size} bytes"):
            rank.handle(command)
        sender.close()
        with suppress(WeightUpdateError, AssertionError, ValueError):
            sent.result(120)
    assert all(torch.equal(before[name], live) for name, live in contents(model).items())
    rank.session.require_servable()

    sender = join([rank])
    with ThreadPoolExecutor(1) as pool:
        rank.handle(BeginUpdate(version=11, mode=mode))
        sent = pool.submit(send, sender, new.values())
        rank.handle(ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors"))
        sent.result(120)
    rank.handle(CommitUpdate(version=11))
    assert_holds(model, new)
    sender.close()
    rank.close()


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_what_the_model_computes_itself_is_never_half_written(mode: str) -> None:
    """Old checkpoints hold rotary frequencies, which go nowhere: an update of them that is
    dropped leaves nothing to be mended, and one that has them commits."""
    model, rank = make_rank()
    new = fresh(model)
    computed = {COMPUTED: torch.ones(2)}
    rank.handle(BeginUpdate(version=10, mode=mode))
    rank.session.receive(computed.items())
    rank.handle(AbortUpdate(version=10))
    rank.session.require_servable()
    for version, lasting in ((11, False), (12, True)):
        rank.handle(BeginUpdate(version=version, mode=mode))
        rank.session.receive((new | computed).items(), lasting=lasting)
        rank.handle(CommitUpdate(version=version))
        rank.session.require_servable()
    assert_holds(model, new)
