"""Joining and leaving a trainer's groups, and everything that can be wrong with one."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.errors import GroupError
from engine.protocol import BeginUpdate, JoinGroup, LeaveGroup, ReceiveBroadcast
from tests.helpers.children import ROOT, child_environment
from tests.helpers.peers import until
from tests.helpers.weight_engines import fresh, join, join_command, make_rank, pieces
from trainer_bridge.process_group import SenderGroup

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_groups_come_go_and_come_again_under_one_name() -> None:
    _, rank = make_rank()
    for _ in range(3):
        sender = join([rank])
        other = join([rank], "other")
        assert rank.groups.names == ["g", "other"]
        rank.handle(LeaveGroup(name="g"))
        rank.handle(LeaveGroup(name="g"))
        assert rank.groups.names == ["other"]
        sender.close()
        other.close()
    rank.close()
    assert rank.groups.names == []


def test_joining_again_by_the_same_arguments_is_no_error() -> None:
    _, rank = make_rank()
    sender = join([rank], timeout_s=60.0)
    again = join_command(sender, 1, timeout_s=60.0)
    rank.handle(again)
    rank.handle(again)
    rank.close()


def test_a_trainer_that_came_back_at_the_same_address_is_joined() -> None:
    _, rank = make_rank()
    port = free_port()
    for _ in range(2):
        sender = SenderGroup("g", world_size=2, backend="gloo", port=port, timeout_s=60.0)
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(rank.handle, join_command(sender, 1, timeout_s=60.0))
            sender.connect()
            joined.result(60)
        sender.close()
        del sender
        gc.collect()
    rank.close()


def test_a_default_group_beside_it_is_not_touched() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _, rank = make_rank()
        sender = join([rank])
        rank.close()
        sender.close()
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        assert value.item() == 1.0
    finally:
        torch.distributed.destroy_process_group()


def test_a_group_made_by_torch_itself_pairs_with_ours() -> None:
    """Trainers call torch's helper; its store keys must be the ones that are read here."""
    from datetime import timedelta

    from torch.distributed import distributed_c10d as c10d

    model, rank = make_rank()
    timeout = timedelta(seconds=10)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = JoinGroup(
        name="g",
        address="127.0.0.1",
        port=store.port,
        rank_offset=1,
        world_size=2,
        backend="gloo",
        timeout_s=60.0,
    )
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(rank.handle, command)
        group, _ = c10d._new_process_group_helper(
            2,
            0,
            [],
            c10d.Backend("gloo"),
            torch.distributed.PrefixStore("g", store),
            group_name="g",
            timeout=timeout,
        )
        joined.result(60)
    new = fresh(model)
    rank.handle(BeginUpdate(version=4))
    with ThreadPoolExecutor(1) as pool:
        receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors")
        received = pool.submit(rank.handle, receive)
        for tensor in new.values():
            group.broadcast([tensor], torch.distributed.BroadcastOptions()).wait()
        received.result(60)
    assert rank.session.commit(4).num_tensors == len(new)
    rank.close()
    world = c10d._world
    for register in (world.pg_map, world.pg_names, world.pg_backend_config, world.pg_to_tag):
        register.pop(group, None)
    world.tags_to_pg.clear()
    c10d._unregister_process_group(group.group_name)


def test_nobody_listens() -> None:
    _, rank = make_rank()
    port = free_port()
    command = JoinGroup(
        name="g",
        address="127.0.0.1",
        port=port,
        rank_offset=1,
        world_size=2,
        timeout_s=0.4,
        backend="gloo",
    )
    with pytest.raises(GroupError, match=f"nobody answers at 127.0.0.1:{port}"):
        rank.handle(command)
    assert rank.groups.names == []


def test_a_rank_that_never_joins_is_named_by_both_sides() -> None:
    _, rank = make_rank()
    sender = SenderGroup("g", world_size=4, backend="gloo", timeout_s=5.0)
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(rank.handle, join_command(sender, 2, timeout_s=3.0))
        until(lambda: sender.num_arrived() == 1 or joined.done())
        with pytest.raises(GroupError, match="rank 1, 3 of 4"):
            sender.connect()
        with pytest.raises(GroupError, match=r"rank 1, rank 3 of 4 did not join group 'g'") as late:
            joined.result(60)
    assert late.value.field == "rank 1"
    assert rank.groups.names == []


def test_a_trainer_that_listens_and_never_connects_is_named() -> None:
    _, rank = make_rank()
    sender = SenderGroup("g", world_size=2, backend="gloo", timeout_s=60.0)
    with pytest.raises(GroupError, match=r"rank 0 \(trainer\)"):
        rank.handle(join_command(sender, 1, timeout_s=2.0))


@pytest.mark.parametrize("offset,world_size", [(0, 2), (1, 1), (2, 2), (1, 2)])
def test_a_wrong_world_size_is_refused_with_its_arithmetic(offset: int, world_size: int) -> None:
    _, rank = make_rank(tp_size=2)
    command = JoinGroup(
        name="g",
        address="127.0.0.1",
        port=1,
        rank_offset=offset,
        world_size=world_size,
        backend="gloo",
    )
    with pytest.raises(GroupError, match=f"world_size {world_size}") as refusal:
        rank.handle(command)
    assert refusal.value.field == "world_size"


def test_a_port_in_use_is_named_by_the_sender() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(GroupError, match=str(port)):
            SenderGroup("g", world_size=2, backend="gloo", port=port)


def test_nccl_needs_a_gpu() -> None:
    _, rank = make_rank()
    command = JoinGroup(name="g", address="127.0.0.1", port=1, rank_offset=1, world_size=2)
    with pytest.raises(GroupError, match="needs a GPU"):
        rank.handle(command)


def test_a_group_that_is_not_there_and_a_source_that_is_no_rank() -> None:
    model, rank = make_rank()
    tensors = pieces(fresh(model))
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(GroupError, match=r"no group 'g': join it first.*open: none"):
        rank.handle(ReceiveBroadcast(group="g", tensors=tensors))
    sender = join([rank])
    with pytest.raises(GroupError, match="ranks 0 to 1, not 2"):
        rank.handle(ReceiveBroadcast(group="g", tensors=tensors, source=2))
    assert rank.session.open_version == 4
    rank.close()
    sender.close()


DROPPED = """
import gc, sys
from engine.protocol import AbortUpdate, BeginUpdate, ReceiveBroadcast
from rollout.replica.leave import run_and_leave
from tests.helpers.weight_engines import fresh, join, make_rank, pieces

def main(arguments):
    model, rank = make_rank()
    sender = join([rank], timeout_s=600.0)
    new = fresh(model)
    rank.handle(BeginUpdate(version=4, timeout_s=600.0))
    receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=600.0)
    pending = rank.start(receive)
    while not rank.groups._memory.get("g"):
        pass
    rank.cancel("the update was aborted")
    try:
        pending.result()
    except Exception as error:
        assert "aborted" in str(error), error
    rank.handle(AbortUpdate(version=4))
    assert rank.groups.num_parked == 1
    rank.close()
    del rank, pending, model
    gc.collect()
    sys.stdout.write("collected")
    sys.stdout.flush()
    return 0

run_and_leave(main, [])
"""


def test_a_receive_that_was_given_up_keeps_no_process_from_going_on_or_leaving() -> None:
    """Its deadline is ten minutes away, and a destructor of gloo's would wait for it."""
    done = subprocess.run(
        [sys.executable, "-c", DROPPED],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stdout) == (0, "collected"), done.stderr
