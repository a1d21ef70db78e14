"""What a call that waits for a peer keeps others from: nothing, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from engine.errors import UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    Command,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    Reply,
    TensorPiece,
)
from tests.helpers.control_calls import GROUP, Gate, kinds, one, refuse
from tests.helpers.http_app import Server, run, serving, until

RECEIVE = ReceiveBroadcast(group="g", tensors=[TensorPiece(name="w", dtype="float32", shape=[2])])


async def send(server: Server, command: Command) -> tuple[int, str]:
    reply = await server.http.post(
        "/command",
        content=msgspec.json.encode(command),
        headers={"content-type": "application/json"},
    )
    return reply.status_code, reply.text


async def hanging(server: Server, command: Command, gate: Gate) -> asyncio.Task[tuple[int, str]]:
    call = asyncio.ensure_future(send(server, command))
    await until(lambda: bool(gate.held))
    return call


def test_an_abort_ends_a_receive_that_waits() -> None:
    async def test() -> None:
        async with serving() as server:
            assert (await send(server, BeginUpdate(version=1)))[0] == 200
            gate = Gate(server, ReceiveBroadcast)
            call = await hanging(server, RECEIVE, gate)
            assert (await send(server, AbortUpdate(version=1)))[0] == 200
            assert not call.done()
            refuse(server, ReceiveBroadcast, UpdateOrder("the update was aborted"))
            gate.open()
            assert (await call)[0] == 409
            assert (await send(server, BeginUpdate(version=2)))[0] == 200

    run(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/begin_weight_update", {}),
        ("/get_weights_by_name", {"name": "w"}),
        ("/update_weight_version", {"new_version": "x"}),
        ("/weights_checker", {}),
        ("/update_weights_from_disk", {"model_path": "/m"}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
    ],
)
def test_what_cannot_run_beside_a_receive_says_so(
    path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.http.updates.transfers._PATIENCE_S", 0.01)

    async def test() -> None:
        async with serving() as server:
            await send(server, BeginUpdate(version=1))
            gate = Gate(server, ReceiveBroadcast)
            call = await hanging(server, RECEIVE, gate)
            reply = await server.post(path, body)
            assert reply.json()["error"]["field"] == "receiving", reply.text
            assert reply.status_code in (400, 409)
            assert not call.done()
            call.cancel()

    run(test)


async def leave(
    server: Server, path: str, body: bytes, held: Callable[[], bool]
) -> Awaitable[None]:
    """Call a route as a client that leaves once `held`; what the call comes to."""
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, object]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def sent(_: object) -> None:
        return

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }
    call = asyncio.ensure_future(server.app(scope, receive, sent))
    await until(held)
    gone.set()
    return call


@pytest.mark.parametrize("command", [False, True])
def test_a_join_ends_with_its_caller(command: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            gate = Gate(server, JoinGroup)
            join = JoinGroup(
                name="g", address="h", port=1, rank_offset=1, world_size=2, backend="gloo"
            )
            path = "/command" if command else "/init_weights_update_group"
            body = msgspec.json.encode(join if command else GROUP | {"group_name": "g"})
            call = await leave(server, path, body, lambda: bool(gate.held))
            await until(lambda: LeaveGroup(name="g") in server.link.commands)
            gate.open()
            await call

    run(test)


@pytest.mark.parametrize("command", [False, True])
def test_a_receive_ends_with_its_caller(command: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/begin_weight_update")
            (begin,) = [c for c in server.commands() if isinstance(c, BeginUpdate)]
            gate = Gate(server, ReceiveBroadcast)
            path = "/command" if command else "/update_weights_from_distributed"
            body = msgspec.json.encode(RECEIVE if command else one("w"))
            call = await leave(server, path, body, lambda: bool(gate.held))
            abort = AbortUpdate(version=begin.version, owner=begin.owner)
            await until(lambda: abort in server.link.commands)
            gate.open()
            await call
            assert (await server.post("/begin_weight_update")).status_code == 200

    run(test)


def test_a_receive_whose_turn_never_came_leaves_the_update_of_another_alone() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/begin_weight_update")
            gate = Gate(server, ReceiveBroadcast)
            first = asyncio.ensure_future(server.post("/update_weights_from_distributed", one("a")))
            await until(lambda: bool(gate.held))
            server.link.answers[ReceiveBroadcast] = lambda _: Reply()
            body = msgspec.json.encode(one("b"))
            call = await leave(server, "/update_weights_from_distributed", body, lambda: True)
            for _ in range(50):
                await asyncio.sleep(0)
            gate.open()
            await call
            assert (await first).status_code == 200
            assert AbortUpdate not in kinds(server)

    run(test)
