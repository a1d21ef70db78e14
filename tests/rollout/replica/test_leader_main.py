"""The loop of a spawned leader: what it takes in before a step, and what it is not killed by."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import Call, GetState, LeaderMessage, Pause, Reply, RequestOutput, Shutdown
from rollout.replica import leader_main
from rollout.replica.fronts.front_door import FrontDoor
from rollout.replica.ipc import Channel, Unreadable
from rollout.replica.leader import Leader
from rollout.replica.process_log import BoundedStderr
from rollout.replica.pulse import Pulse, pulse_path
from tests.helpers.fake_executor import FakeExecutor, expected_tokens
from tests.helpers.replicas import fake_config, make_request


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Channel, Channel]]:
    """(the caller's end, the leader's end)."""
    endpoint = f"ipc://{tmp_path}/c"
    caller = Channel.listen(endpoint, RequestOutput | Reply)
    leader = Channel.connect(endpoint, LeaderMessage)
    yield caller, leader
    caller.close()
    leader.close()


def serve(caller: Channel, channel: Channel, leader: Leader) -> list[Any]:
    """Run the loop until the Shutdown that waits; everything it sent."""
    caller.send([Call(id=0, command=Shutdown())], timeout_s=5)
    with tempfile.TemporaryDirectory() as folder:
        pulse = Pulse(pulse_path(Path(folder)))
        leader_main._serve(leader, FrontDoor(channel), None, pulse, parent_pid=os.getppid())
    sent: list[Any] = []
    while got := caller.receive(timeout_s=0.1):
        sent += got
    return sent


class Recorder(FakeExecutor):
    """Keeps what each step was given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rows: list[int] = []

    def execute(self, plan: Any) -> Any:
        self.rows.append(len(plan.slots))
        return super().execute(plan)


def make_leader(max_running: int = 128) -> tuple[Leader, Recorder]:
    config = fake_config(num_pages=2000)
    config = replace(
        config, scheduler=replace(config.scheduler, max_running=max_running, max_step_tokens=512)
    )
    executor = Recorder(config)
    return Leader(config, executor), executor


def test_frames_that_wait_are_all_in_the_next_step(ends: tuple[Channel, Channel]) -> None:
    caller, channel = ends
    leader, executor = make_leader()
    for i in range(64):
        caller.send([make_request(f"r{i}", [i + 1, 2], max_new_tokens=2)], timeout_s=5)
    # One turn of the loop takes them in; `_serve` leaves at the Shutdown behind them.
    messages = channel.receive_waiting(timeout_s=5, max_messages=4096)
    while len(messages) < 64:
        messages += channel.receive_waiting(timeout_s=5, max_messages=4096)
    leader_main._obey(leader, messages, {})
    leader.step()
    assert executor.rows == [64]


def test_a_flood_does_not_keep_steps_from_their_turn(ends: tuple[Channel, Channel]) -> None:
    caller, channel = ends
    for _ in range(40):
        caller.send([Call(id=i, command=GetState()) for i in range(10)], timeout_s=5)
    caller.send([], timeout_s=5)
    caller.send([Call(id=1, command=GetState())], timeout_s=5)
    seen = 0
    while seen < 401:
        got = channel.receive_waiting(timeout_s=5, max_messages=100)
        assert len(got) <= 110
        seen += len(got)


def test_messages_outside_the_protocol_are_refused_one_by_one(
    ends: tuple[Channel, Channel],
) -> None:
    caller, channel = ends
    leader, _ = make_leader()
    pack = msgspec.msgpack.encode
    request = make_request("good", [3, 4])
    caller.send([request], timeout_s=5)
    frames: list[Any] = [
        [{"type": "call", "id": 7, "command": {"type": "no such thing"}}],
        [{"type": "request", "rid": "odd", "prompt_ids": "text", "sampling": {}, "seed": 1}],
        [{"type": "nothing"}, 3, None],
        {"not": "a list"},
        "text",
    ]
    for frame in frames:
        caller.send_frame(pack(frame), timeout_s=5)
    caller.send_frame(b"\xc1\xff\x00 no message pack", timeout_s=5)
    caller.send_frame(b"", timeout_s=5)
    caller.send([Call(id=8, command=GetState())], timeout_s=5)
    sent: list[Reply | RequestOutput] = []

    def hand_over(messages: list[Any]) -> None:
        if messages:
            channel.send(messages, timeout_s=5)
            sent.extend(caller.receive(timeout_s=5))

    while 8 not in {m.id for m in sent if isinstance(m, Reply)}:
        waiting = channel.receive_waiting(timeout_s=5, max_messages=100)
        answers, leaving = leader_main._obey(leader, waiting, {})
        assert not leaving
        hand_over(answers)
    while not leader.idle():
        hand_over(leader.step())
    replies = {m.id: m for m in sent if isinstance(m, Reply)}
    outputs_by = {m.rid: m for m in sent if isinstance(m, RequestOutput)}
    assert replies[7].error is not None
    assert replies[7].error.kind == "InvalidRequest"
    assert replies[8].state is not None
    finish = outputs_by["odd"].finish
    assert finish is not None and finish.error == "InvalidRequest"
    assert np.array_equal(outputs_by["good"].token_ids, expected_tokens([3, 4], 8))


def test_unreadable_says_whom_it_names(ends: tuple[Channel, Channel]) -> None:
    caller, channel = ends
    caller.send([Pause()], timeout_s=5)
    (found,) = channel.receive_waiting(timeout_s=5, max_messages=10)
    assert isinstance(found, Unreadable)
    assert found.call is None and found.rid == ""


def test_the_loop_serves_and_leaves(ends: tuple[Channel, Channel]) -> None:
    caller, channel = ends
    leader, _ = make_leader()
    caller.send([Call(id=3, command=GetState())], timeout_s=5)
    assert [message.id for message in serve(caller, channel, leader)] in ([3], [])


def test_a_log_is_cut_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with path.open("a+b", buffering=0) as file:
        stream = open(file.fileno(), "w", closefd=False)  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        handler = BoundedStderr(max_bytes=10_000, kept_bytes=1000)
        for i in range(2000):
            handler.emit(logging.LogRecord("n", 20, "p", 1, f"line {i}", None, None))
            assert path.stat().st_size < 11_000
        assert path.read_text().endswith("line 1999\n")
