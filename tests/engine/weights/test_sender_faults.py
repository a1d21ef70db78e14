"""Senders that die or stall at any point of an update, and the update that follows."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from engine.errors import GroupError, UpdateOrder, UpdateTimeout, WeightUpdateError
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    LeaveGroup,
    ReceiveBroadcast,
    plan_buckets,
)
from tests.helpers.weight_engines import (
    assert_holds,
    contents,
    fresh,
    join,
    join_command,
    make_rank,
    pieces,
    send,
    specs,
)

ROOT = Path(__file__).resolve().parents[3]
BUCKET_BYTES = 2000


def buckets_of(new: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    packed = []
    for bucket in plan_buckets(pieces(new), BUCKET_BYTES):
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for placed in bucket.placements:
            flat = new[placed.piece.name].reshape(-1).view(torch.uint8)
            buffer[placed.offset : placed.offset + placed.num_bytes] = flat
        packed.append(buffer)
    return packed


def receive(new: dict[str, torch.Tensor], **fields) -> ReceiveBroadcast:
    return ReceiveBroadcast(
        group="g", tensors=pieces(new), bucket_bytes=BUCKET_BYTES, timeout_s=5.0, **fields
    )


def publish(rank, new: dict[str, torch.Tensor], version: int, mode: str) -> None:
    """A whole update by a new sender, as the trainer that came back sends it."""
    sender = join([rank])
    rank.handle(BeginUpdate(version=version, manifest=specs(new), mode=mode))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, sender, buckets_of(new))
        rank.handle(replace(receive(new), timeout_s=3600.0))
        sent.result(60)
    rank.handle(CommitUpdate(version=version))


@pytest.mark.parametrize("when", ["start", "middle", "end"])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_sender_that_dies_leaves_the_old_version_or_a_refusal(mode: str, when: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    packed = buckets_of(new)
    assert len(packed) > 4
    count = {"start": 0, "middle": len(packed) // 2, "end": len(packed) - 1}[when]
    sender = join([rank])
    rank.handle(BeginUpdate(version=4, manifest=specs(new), mode=mode))

    def die() -> None:
        send(sender, packed[:count])
        sender.abort()

    with ThreadPoolExecutor(1) as pool:
        died = pool.submit(die)
        with pytest.raises(GroupError, match=r"rank 0 of group 'g' is gone") as refusal:
            rank.handle(replace(receive(new), timeout_s=3600.0))
        died.result(60)
    first_missing = plan_buckets(pieces(new), BUCKET_BYTES)[count].placements[0].piece.name
    assert refusal.value.field == first_missing
    assert rank.groups.names == []
    with pytest.raises(UpdateOrder, match="failed"):
        rank.handle(CommitUpdate(version=4))
    rank.handle(AbortUpdate(version=4))
    assert rank.session.version == 3
    if mode != "in_place":
        assert_holds(model, before)
        rank.session.require_servable()
    else:
        with pytest.raises(WeightUpdateError, match="may be a mixture"):
            rank.session.require_servable()
    again = fresh(model, seed=2)
    publish(rank, again, 5, mode)
    assert_holds(model, again)
    rank.session.require_servable()
    assert rank.session.version == 5
    rank.close()


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_sender_that_stalls_is_given_up_in_time(mode: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    sender = join([rank])
    rank.handle(BeginUpdate(version=4, mode=mode))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, sender, buckets_of(new)[:2])
        with pytest.raises(UpdateTimeout, match="did not come from rank 0 of group 'g' in time"):
            rank.handle(
                ReceiveBroadcast(
                    group="g", tensors=pieces(new), timeout_s=0.5, bucket_bytes=BUCKET_BYTES
                )
            )
        sent.result(60)
    sender.abort()
    if mode != "in_place":
        assert_holds(model, before)
    publish(rank, new, 4, mode)
    assert_holds(model, new)
    rank.close()


def test_the_update_s_own_deadline_ends_a_transfer() -> None:
    model, rank = make_rank()
    sender, new = join([rank]), fresh(model)
    rank.handle(BeginUpdate(version=4, timeout_s=0.4))
    with pytest.raises(UpdateTimeout):
        rank.handle(replace(receive(new), timeout_s=3600.0))
    sender.abort()
    rank.close()


def test_two_ranks_both_notice_and_serve_the_old_version() -> None:
    pairs = [make_rank(rank, 2) for rank in range(2)]
    ranks = [rank for _, rank in pairs]
    before, new = [contents(model) for model, _ in pairs], fresh(make_rank()[0])
    sender = join(ranks)
    for rank in ranks:
        rank.handle(BeginUpdate(version=4, manifest=specs(new), mode="shadow"))

    def die() -> None:
        send(sender, buckets_of(new)[:2])
        sender.abort()

    with ThreadPoolExecutor(3) as pool:
        died = pool.submit(die)
        received = [pool.submit(rank.handle, receive(new)) for rank in ranks]
        for future in received:
            with pytest.raises(WeightUpdateError):
                future.result(60)
        died.result(60)
    for (model, rank), old in zip(pairs, before, strict=True):
        held = contents(model)
        assert all(torch.equal(held[name], old[name]) for name in old)
        rank.session.require_servable()
        rank.close()


SENDER = """
import os, signal, sys
import torch
from trainer_bridge.process_group import SenderGroup

sender = SenderGroup("g", world_size=2, backend="gloo", timeout_s=60)
print(sender.port, flush=True)
sender.connect()
for size in map(int, sys.argv[1:]):
    sender.wait(sender.broadcast(torch.ones(size, dtype=torch.uint8)), 1e12)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_is_noticed() -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    sizes = [str(bucket.numel()) for bucket in buckets_of(new)[:3]]
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER, *sizes], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        class Sender:
            name, address, world_size = "g", "127.0.0.1", 2

        Sender.port = port
        rank.handle(join_command(Sender, 1, timeout_s=30.0))
        rank.handle(BeginUpdate(version=4, manifest=specs(new), mode="shadow"))
        with pytest.raises(GroupError, match="rank 0 of group 'g' is gone"):
            rank.handle(replace(receive(new), timeout_s=3600.0))
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()
    assert_holds(model, before)
    rank.handle(LeaveGroup(name="g"))
    publish(rank, new, 4, "shadow")
    assert_holds(model, new)
    rank.close()
