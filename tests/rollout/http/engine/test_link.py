"""The link between server and engine under a load of streams."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import numpy as np

from engine.errors import EngineDead
from engine.protocol import Call, GetState, RequestOutput, decode
from rollout.http.engine.link import Message, ProcessLink
from rollout.http.engine.mailbox import Mailbox
from rollout.requests.outputs import coalesced
from tests.helpers.http_app import run, until


class Frames:
    """Stands for a `ProcessReplica`: a pipe that turns readable, and frames that wait."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.frames: list[list[Message]] = []
        self.num_collected = 0

    def put(self, messages: list[Message]) -> None:
        self.frames.append(messages)
        os.write(self._write, b".")

    def fileno(self) -> int:
        return self._read

    def collect(self) -> list[Message]:
        self.num_collected += 1
        if not self.frames:
            return []
        os.read(self._read, 1)
        return self.frames.pop(0)


def token(rid: str, at: int) -> RequestOutput:
    ids = np.array([at], np.int32)
    return RequestOutput(rid=rid, start=at, token_ids=ids, logprobs=ids.astype(np.float32))


def never(error: EngineDead) -> None:
    raise error


def test_what_comes_while_handlers_are_busy_leaves_in_one_piece_and_in_order() -> None:
    async def test() -> None:
        frames, mailbox = Frames(), Mailbox(["a"])
        link = ProcessLink(frames)
        pieces: list[list[int]] = []

        def deliver(messages: Sequence[Message]) -> None:
            for message in messages:
                mailbox.put(message)

        async def handle() -> None:
            while True:
                for output in coalesced(await mailbox.take()):
                    assert output.start == output.token_ids[0]
                    pieces.append(output.token_ids.tolist())
                    time.sleep(0.03)  # a slow write, which holds up the loop

        link.start(deliver, never)
        handler = asyncio.ensure_future(handle())
        for at in range(60):
            frames.put([token("a", at)])
            await asyncio.sleep(0.001)
        await until(lambda: sum(map(len, pieces)) == 60)
        handler.cancel()
        link.stop()
        assert [at for piece in pieces for at in piece] == list(range(60))
        assert len(pieces) < 60

    run(test)


def test_the_last_frame_is_delivered_though_nothing_wakes_the_link_again() -> None:
    async def test() -> None:
        frames, found = Frames(), []
        link = ProcessLink(frames)

        def deliver(messages: Sequence[Message]) -> None:
            found.extend(messages)
            time.sleep(0.005)

        link.start(deliver, never)
        for at in range(20):
            frames.put([token("a", at)])
            if at % 5 == 0:
                await asyncio.sleep(0.002)
        await until(lambda: len(found) == 20)
        link.stop()
        assert [output.start for output in found] == list(range(20))

    run(test)


def test_a_link_that_rests_is_not_called_again_and_again_by_a_socket_that_is_readable() -> None:
    calls = []

    class Counted(ProcessLink):
        def _drain(self) -> None:
            calls.extend([1] if self._resting else [])
            super()._drain()

    async def test() -> None:
        frames, found = Frames(), []
        link = Counted(frames)

        def deliver(messages: Sequence[Message]) -> None:
            found.extend(messages)
            if len(found) == 1:
                asyncio.get_running_loop().call_soon(frames.put, [token("a", 1)])
                time.sleep(0.02)  # so it rests for as long as it ever does

        link.start(deliver, never)
        frames.put([token("a", 0)])
        await until(lambda: len(found) == 2)
        link.stop()
        # A call a turn of the loop, while handlers have theirs.
        assert len(calls) < 10

    run(test)


class Sending(Frames):
    """Keeps what is sent. fails: posts from this one on, counted from 0, find nobody."""

    def __init__(self, fails: int = 1 << 30) -> None:
        super().__init__()
        self.sent: list[list[Call]] = []
        self.num_posts = 0
        self._fails = fails

    def post_frame(self, frame: bytes) -> None:
        self.num_posts += 1
        if len(self.sent) >= self._fails:
            raise EngineDead("nobody takes a message")
        self.sent.append(decode(frame, list[Call]))


def test_many_messages_of_one_turn_leave_before_its_end_and_few_together() -> None:
    async def test() -> None:
        leader = Sending()
        link = ProcessLink(leader)
        link.start(lambda messages: None, never)
        calls = [Call(id=number, command=GetState()) for number in range(38)]
        for call in calls:
            link.post([call])
        assert [len(frame) for frame in leader.sent] == [16, 16]
        await asyncio.sleep(0)
        assert [call.id for frame in leader.sent for call in frame] == list(range(38))
        link.post(calls[:1])
        link.post(calls[1:3])
        assert len(leader.sent) == 3
        await asyncio.sleep(0)
        assert [len(frame) for frame in leader.sent] == [16, 16, 6, 3]
        link.stop()

    run(test)


def test_an_engine_that_takes_nothing_is_told_of_at_the_end_of_the_turn() -> None:
    async def test() -> None:
        leader, errors = Sending(fails=1), []
        link = ProcessLink(leader)
        link.start(lambda messages: None, errors.append)
        for number in range(50):
            link.post([Call(id=number, command=GetState())])
        # Each may wait for a moment, so it is asked once.
        assert (errors, leader.num_posts) == ([], 2)
        await asyncio.sleep(0)
        assert (len(errors), leader.num_posts) == (1, 3)

    run(test)
