"""The engine client's own promises: order, deadlines, one death for all."""

import asyncio
from dataclasses import dataclass

import pytest

import rollout.http.engine_client as engine_client
from engine.errors import EngineDead, InvalidRequest, UpdateOrder
from engine.protocol import (
    Abort,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    Pause,
    ReceiveBroadcast,
    Resume,
)
from engine.protocol.deadlines import MAX_TIMEOUT_S
from rollout.process_replica import reply_deadline_s
from tests.helpers.http_app import run, serving, until
from tests.helpers.replicas import make_request


def test_commands_and_requests_keep_their_order() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            futures = engine.post([Pause(), Resume(), CommitUpdate(version=1), Pause()])
            replies = [await future for future in futures]
            assert [reply.error is None for reply in replies] == [True, True, False, True]
            with pytest.raises(UpdateOrder, match="no update is open"):
                await engine.send(CommitUpdate(version=1))
            assert [type(c) for c in server.commands()] == [
                Pause, Resume, CommitUpdate, Pause, CommitUpdate,
            ]  # fmt: skip

    run(test)


def test_a_command_that_misses_its_deadline_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "_TICK_S", 0.01)

    async def test() -> None:
        async with serving(reply_s=0.05) as server:
            mailbox = server.engine.submit([make_request("a", [1], max_new_tokens=400)])
            await until(lambda: server.link.requests != [])
            server.link.silent = True
            with pytest.raises(EngineDead, match=r"did not answer 'pause' within 0\.05 s"):
                await server.engine.send(Pause())
            assert "pause" in server.link.killed
            with pytest.raises(EngineDead, match="pause"):
                while True:
                    await mailbox.take()
            with pytest.raises(EngineDead, match="pause"):
                server.engine.submit([make_request("b", [1])])
            with pytest.raises(EngineDead, match="pause"):
                await server.engine.state()

    run(test)


def test_a_silent_engine_with_requests_is_asked_and_then_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "_TICK_S", 0.01)

    async def test() -> None:
        async with serving(reply_s=0.05) as server:
            server.link.silent = True
            mailbox = server.engine.submit([make_request("a", [1])])
            with pytest.raises(EngineDead, match="get_state"):
                await mailbox.take()

    run(test)


def test_the_deadline_of_a_command_outlives_its_own() -> None:
    join = JoinGroup(name="g", address="h", port=1, rank_offset=1, world_size=2, timeout_s=2000.0)
    broadcast = ReceiveBroadcast(group="g", tensors=[], timeout_s=5.0)
    limits = {"reply_s": 10.0, "slow_s": 100.0}
    assert reply_deadline_s(join, **limits) > MAX_TIMEOUT_S
    assert reply_deadline_s(broadcast, **limits) > 100
    assert reply_deadline_s(BeginUpdate(version=1), **limits) == 100
    assert reply_deadline_s(Pause(), **limits) == 10


def test_an_id_twice_in_one_submit() -> None:
    async def test() -> None:
        async with serving() as server:
            pair = [make_request("a", [1]), make_request("a", [2])]
            with pytest.raises(InvalidRequest, match="'a' is already in use"):
                server.engine.submit(pair)
            assert server.engine.num_open == 0

    run(test)


def test_held_requests_that_are_discarded_never_reach_the_engine() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            engine.hold()
            dropped = engine.submit([make_request("a", [1])])
            kept = engine.submit([make_request("b", [1], max_new_tokens=1)])
            assert engine.num_open == 0
            engine.discard(dropped)
            engine.release()
            (output,) = await kept.take()
            assert output.rid == "b"
            assert [request.rid for request in server.link.requests] == ["b"]

    run(test)


def test_held_requests_can_be_aborted() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            engine.hold()
            mailbox = engine.submit([make_request("a-1", [1]), make_request("b", [1])])
            await engine.send(Abort(rid_prefix="a"))
            (output,) = await mailbox.take()
            assert output.finish is not None
            assert (output.rid, output.finish.type) == ("a-1", "abort")
            assert engine.num_open == 0
            engine.release()
            (output,) = await mailbox.take()
            assert (output.rid, len(output.token_ids)) == ("b", 8)

    run(test)


def test_one_command_aborts_a_thousand() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.engine.send(Pause())
            server.commands()
            requests = [make_request(f"x-{i}", [1]) for i in range(1024)]
            mailbox = server.engine.submit(requests)
            stranger = server.engine.submit([make_request("x-10240", [1])])
            server.engine.discard(mailbox)
            state = await server.engine.state(max_age_s=0)
            assert (state.num_running, state.num_waiting) == (0, 1)
            rids = sorted(request.rid for request in requests)
            assert server.commands() == [Abort(rids=rids, message="the client left")]
            assert stranger.open == {"x-10240"}
            assert server.engine.num_open == 1

    run(test)


def test_closing_tells_whoever_waits() -> None:
    @dataclass
    class Seen:
        error: str = ""

    seen = Seen()

    async def test() -> None:
        async with serving() as server:
            await server.engine.send(Pause())
            mailbox = server.engine.submit([make_request("a", [1])])

            async def wait() -> None:
                try:
                    await mailbox.take()
                except EngineDead as error:
                    seen.error = error.message

            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
        await task
        assert server.link.closed

    run(test)
    assert seen.error == "the server is shutting down"
