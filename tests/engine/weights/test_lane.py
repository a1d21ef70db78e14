"""Transfers and groups on threads of their own: order, cancelling, peers of every kind, memory."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from engine.errors import GroupError, WeightUpdateError
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    ReceiveBroadcast,
    Reply,
)
from engine.weights.helpers import MOST_LEFT, Helpers
from engine.weights.lane import MOST_AT_ONCE, Crew, Lane, Look, PendingCommand
from tests.helpers import peers
from tests.helpers.peers import listening, until
from tests.helpers.weight_engines import (
    assert_holds,
    contents,
    fresh,
    join,
    make_rank,
    pieces,
    send,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def join_at(port: int, name: str = "g", **fields: Any) -> JoinGroup:
    settings = {"rank_offset": 1, "world_size": 2, "backend": "gloo", "timeout_s": 60.0, **fields}
    return JoinGroup(name=name, address="127.0.0.1", port=port, **settings)


def test_a_lane_runs_one_after_another_and_off_the_caller_s_thread() -> None:
    lane = Lane(CPU)
    order: list[int] = []
    threads: set[int] = set()

    def run(number: int) -> Any:
        def call(_look: Any) -> Reply:
            threads.add(threading.get_ident())
            time.sleep(0.01)
            order.append(number)
            return Reply(id=number)

        return call

    pending = [lane.start(LoadFromDisk(path="x"), run(number)) for number in range(5)]
    assert [p.result().id for p in pending] == list(range(5)) == order
    assert threads and threading.get_ident() not in threads and len(threads) == 1
    assert lane.close(60)
    assert lane.close(60)


def test_what_a_command_raises_is_the_caller_s() -> None:
    lane = Lane(CPU)

    def broken(_look: Any) -> Reply:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        lane.start(LoadFromDisk(path="x"), broken).result()
    assert lane.start(LoadFromDisk(path="x"), lambda _look: Reply(id=3)).result().id == 3
    lane.close(60)


def test_a_lane_without_its_gpu_answers_every_command() -> None:
    lane = Lane(torch.device("cuda", 99))
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError, AttributeError)):
            lane.start(LoadFromDisk(path="x"), lambda _look: Reply()).result()
    assert lane.close(60)


@pytest.mark.gpu
def test_a_lane_copies_on_its_own_stream_while_another_thread_captures() -> None:
    lane = Lane(torch.device("cuda", 0))
    new, live = torch.randn(1 << 22).pin_memory(), torch.zeros(1 << 22, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    counter = torch.zeros(1, device="cuda")
    streams: list[torch.cuda.Stream] = []

    def copy(_look: Any) -> Reply:
        streams.append(torch.cuda.current_stream())
        live.copy_(new.to("cuda", non_blocking=True))
        return Reply()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        pending = lane.start(LoadFromDisk(path="x"), copy)
        assert pending.wait(60, lambda: None)
        counter += 1
        graph.capture_end()
    pending.result()
    # The reply says that it is done on the device, for whatever stream comes next.
    assert torch.equal(live.cpu(), new)
    assert streams[0] not in (stream, torch.cuda.default_stream())
    graph.replay()
    torch.cuda.synchronize()
    assert counter.item() == 1
    lane.close(60)


def test_a_cancelled_command_ends_and_so_does_one_behind_it() -> None:
    lane = Lane(CPU)

    def waiting(look: Any) -> Reply:
        while True:
            look()
            time.sleep(0.001)

    pending = [lane.start(LoadFromDisk(path="x"), waiting) for _ in range(3)]
    lane.cancel("enough")
    for each in pending:
        with pytest.raises(WeightUpdateError, match="enough"):
            each.result()
    assert lane.start(LoadFromDisk(path="x"), lambda _look: Reply(id=3)).result().id == 3
    assert lane.close(60)


def test_closing_a_lane_that_is_stuck_comes_back() -> None:
    lane = Lane(CPU)
    release = threading.Event()
    lane.start(LoadFromDisk(path="x"), lambda _look: Reply(id=int(release.wait(60))))
    assert not lane.close(0.05)
    release.set()


def test_the_oldest_of_a_full_crew_ends_for_the_next() -> None:
    crew = Crew()
    release = threading.Event()

    def wait(look: Look) -> Reply:
        while not release.wait(0.001):
            look()
        return Reply(id=1)

    first = [crew.start(join_at(1, name=f"g{i}"), wait) for i in range(MOST_AT_ONCE)]
    assert crew.start(LeaveGroup(name="x"), lambda _look: Reply(id=2)).result().id == 2
    newest = crew.start(join_at(1, name="new"), wait)
    with pytest.raises(WeightUpdateError, match="the oldest"):
        first[0].result()
    assert not any(each.done() for each in first[1:])
    release.set()
    assert all(each.result().id == 1 for each in [*first[1:], newest])


def test_a_crew_whose_threads_are_stuck_refuses_more() -> None:
    crew = Crew()
    release = threading.Event()
    started: list[PendingCommand] = []
    while not (started and started[-1].done()):
        assert len(started) < 1000
        run = lambda _look: Reply(id=int(release.wait(60)))  # noqa: E731
        started.append(crew.start(join_at(1, name=f"g{len(started)}"), run))
    with pytest.raises(GroupError, match="have not ended"):
        started[-1].result()
    release.set()
    assert all(each.result().id == 1 for each in started[:-1])


def test_silent_peers_keep_no_trainer_out() -> None:
    _, rank = make_rank()
    with listening(peers.silent) as port, listening(peers.closing) as other:
        silent = [rank.start(join_at(port, name=f"s{i}")) for i in range(MOST_AT_ONCE)]
        # It gets as far as its own peer, who hangs up.
        with pytest.raises(GroupError, match=r"127\.0\.0\.1"):
            rank.start(join_at(other, name="mine", timeout_s=1.0)).result()
        with pytest.raises(WeightUpdateError, match="the oldest"):
            silent[0].result()
        rank.close()


def test_helpers_give_up_and_come_back_and_are_counted() -> None:
    helpers = Helpers()
    release = threading.Event()
    late: list[int] = []
    for _ in range(MOST_LEFT):
        with pytest.raises(TimeoutError):
            helpers.call(
                lambda: 7 if release.wait(60) else 0, time.monotonic(), discard=late.append
            )
    with pytest.raises(GroupError, match="never answered"):
        helpers.call(lambda: 1, time.monotonic() + 60)
    release.set()
    until(lambda: helpers.num_left == 0)
    assert late == [7] * MOST_LEFT
    assert helpers.call(lambda: 1, time.monotonic() + 60) == 1
    with pytest.raises(KeyError):
        helpers.call(lambda: {}["x"], time.monotonic() + 60)


@pytest.mark.parametrize("act", peers.ALL, ids=lambda act: act.__name__)
@pytest.mark.parametrize("rendezvous", ["torch", "vllm"])
def test_a_peer_that_is_no_trainer_is_named_in_time(
    act: peers.Act, rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rank = make_rank()
    backend = "nccl" if rendezvous == "vllm" else "gloo"
    # The address is asked before anything needs the GPU.
    monkeypatch.setattr(rank.groups, "_check", lambda command: None)
    with listening(act) as port:
        command = join_at(port, rendezvous=rendezvous, backend=backend, timeout_s=1.0)
        with pytest.raises(GroupError, match=f"127.0.0.1:{port}"):
            rank.start(command).result()
        assert rank.groups.names == []
    # Whatever was stuck comes back once the peer is gone.
    until(lambda: rank.groups._helpers.num_left == 0)
    rank.close()


@pytest.mark.parametrize("act", [peers.silent, peers.slow, peers.cunning], ids=lambda a: a.__name__)
def test_leaving_a_group_that_forms_ends_it(act: peers.Act) -> None:
    _, rank = make_rank()
    with listening(act) as port:
        pending = rank.start(join_at(port, timeout_s=1000.0))
        time.sleep(0.2)
        assert not pending.done()
        assert rank.start(LeaveGroup(name="g")).result() == Reply()
        with pytest.raises(WeightUpdateError, match="'g' is joined anew or left"):
            pending.result()
    rank.close()


def test_one_silent_peer_keeps_no_other_group_waiting() -> None:
    _, rank = make_rank()
    with listening(peers.silent) as port:
        pending = rank.start(join_at(port, "slow", timeout_s=1000.0))
        join([rank], "other", timeout_s=60.0)
        assert rank.groups.names == ["other"]
        assert not pending.done()
        rank.close()
        with pytest.raises(WeightUpdateError, match="closing"):
            pending.result()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"port": 70000}, "port"),
        ({"port": -1}, "port"),
        ({"port": 0}, "port"),
        ({"world_size": 2**31}, "world_size"),
        ({"world_size": 2**70}, "world_size"),
        ({"rank_offset": -1}, "world_size"),
        ({"timeout_s": 1e308}, "address"),
        ({"timeout_s": float("nan")}, "address"),
        ({"timeout_s": -1.0}, "address"),
    ],
)
def test_numbers_that_no_group_has_are_typed(changes: dict[str, Any], field: str) -> None:
    _, rank = make_rank()
    with listening(peers.closing) as port:
        with pytest.raises(GroupError) as caught:
            rank.handle(join_at(**{"port": port, **changes}))
        assert caught.value.field == field


def test_a_receive_whose_sender_is_silent_is_aborted_and_memory_outlives_it() -> None:
    model, rank = make_rank()
    old = contents(model)
    sender = join([rank], timeout_s=60.0)
    new = fresh(model)
    rank.handle(BeginUpdate(version=4))
    receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=60.0)
    pending = rank.start(receive)
    send(sender, list(new.values())[:2], timeout_s=60.0)
    time.sleep(0.1)
    assert not pending.done()
    rank.cancel("the update was aborted")
    with pytest.raises(WeightUpdateError, match="aborted"):
        pending.result()
    rank.handle(AbortUpdate(version=4))
    for name, tensor in contents(model).items():
        assert torch.equal(tensor, old[name]), name
    # Gloo may still write into what it was given, until its own deadline or the sender's end.
    assert rank.groups.num_parked == 1
    (parked,) = rank.groups._parked
    assert parked.memory and all(tensor.numel() for tensor in parked.memory)
    del parked
    sender.abort()
    until(lambda: rank.groups.num_parked == 0)
    rank.close()


def test_leaving_the_group_of_a_receive_ends_it_first() -> None:
    model, rank = make_rank()
    sender = join([rank], timeout_s=60.0)
    rank.handle(BeginUpdate(version=4))
    receive = ReceiveBroadcast(group="g", tensors=pieces(fresh(model)), timeout_s=60.0)
    pending = rank.start(receive)
    time.sleep(0.05)
    assert rank.start(LeaveGroup(name="g")).result() == Reply()
    with pytest.raises(WeightUpdateError, match="joined anew or left"):
        pending.result()
    assert rank.groups.names == []
    sender.abort()
    until(lambda: rank.groups.num_parked == 0)
    rank.close()


def test_joining_again_while_it_receives_ends_nothing() -> None:
    model, rank = make_rank()
    sender = join([rank], timeout_s=60.0)
    new = fresh(model)
    rank.handle(BeginUpdate(version=4))
    receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=60.0)
    pending = rank.start(receive)
    (command, _) = rank.groups._open["g"]
    assert rank.start(command).result() == Reply()
    send(sender, new.values(), timeout_s=60.0)
    assert pending.result() == Reply()
    rank.session.commit(4)
    assert_holds(model, new)
    rank.close()
