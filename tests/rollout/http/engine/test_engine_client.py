"""The engine client's own promises: order, deadlines, one death for all."""

import asyncio
import dataclasses
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

import rollout.http.engine.client as engine_client
from engine.errors import CommandTimeout, EngineDead, InvalidRequest, OutOfMemory, UpdateOrder
from engine.protocol import (
    Abort,
    BeginUpdate,
    CheckWeights,
    Command,
    CommitUpdate,
    ErrorInfo,
    GetState,
    GetWeight,
    JoinGroup,
    Pause,
    ReceiveBroadcast,
    Reply,
    Resume,
    SetVersion,
)
from engine.protocol.deadlines import MAX_TIMEOUT_S
from rollout.replica.command_replies import reply_deadline_s
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, run, serving, until
from tests.helpers.replicas import fake_config, make_request


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


WIDE = 1 << 64


@pytest.mark.parametrize("held", [False, True])
def test_a_request_that_cannot_be_encoded_leaves_no_trace(held: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            if held:
                engine.outbox.hold()
            wide = replace(make_request("a", [1]), seed=WIDE)
            for _ in range(2):
                with pytest.raises(InvalidRequest, match="64 bits"):
                    engine.submit([make_request("b", [1]), wide])
            assert (engine.num_open, server.link.requests) == (0, [])
            engine.outbox.release()
            box = engine.submit([make_request("a", [1], max_new_tokens=1), make_request("b", [1])])
            (output,) = await box.take()
            assert output.rid == "a"

    run(test)


@pytest.mark.parametrize(
    "command", [GetWeight(name="w", count=WIDE), Abort(message="\ud800"), SetVersion(version=WIDE)]
)
def test_a_command_that_cannot_be_encoded_leaves_every_later_reply_right(command: Command) -> None:
    async def test() -> None:
        async with serving() as server:
            with pytest.raises(InvalidRequest, match=r"message|give an integer|surrogate"):
                await server.engine.send(command)
            with pytest.raises(InvalidRequest, match=r"message|give an integer|surrogate"):
                server.engine.post([Pause(), command])
            assert (await server.engine.send(GetState())).state is not None
            assert (await server.engine.send(Resume())).state is None
            assert server.commands() == [Resume()]

    run(test)


def test_replies_in_another_order_reach_their_callers() -> None:
    async def test() -> None:
        async with serving() as server:
            server.link.silent = True
            futures = server.engine.post([CommitUpdate(version=1), Pause(), Resume()])
            names = {1 + n: name for n, name in enumerate("abc", start=1)}
            # The first id went to the question that every engine is asked at its start.
            for call in (4, 2, 3):
                error = ErrorInfo(kind="UpdateOrder", message=names[call])
                server.link.deliver([Reply(id=call, error=error)])
            found = [future.result().error for future in futures]
            assert [error.message for error in found if error is not None] == ["a", "b", "c"]

    run(test)


def test_a_reply_that_nobody_waits_for_is_ignored() -> None:
    async def test() -> None:
        async with serving() as server:
            server.link.deliver([Reply(id=12345)])
            assert (await server.engine.send(GetState())).state is not None

    run(test)


def test_a_command_without_an_answer_fails_alone_while_the_engine_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "_TICK_S", 0.01)

    async def test() -> None:
        async with serving(reply_s=1.0, slow_s=1.5) as server:
            server.link.swallowed = {CheckWeights}
            with pytest.raises(CommandTimeout, match="lives but did not answer 'check_weights'"):
                await server.engine.send(CheckWeights())
            assert server.engine.dead is None
            assert (await server.engine.send(GetState())).state is not None

    run(test)


def test_an_id_is_free_again_as_soon_as_its_call_was_dropped() -> None:
    """What the engine still says of the first request is not taken for the second."""

    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            await engine.send(Pause())
            engine.discard(engine.submit([make_request("a", [1])]))
            box = engine.submit([make_request("a", [2], max_new_tokens=2)])
            await engine.send(Resume())
            (output,) = await box.take()
            assert output.finish is not None
            assert output.finish.type == "length"
            assert output.token_ids.tolist() == expected_tokens([2], 2)
            assert engine.num_open == 0

    run(test)


def test_pause_wait_ends_after_requests_that_failed_in_every_way() -> None:
    async def test() -> None:
        async with serving() as server:
            bad = {"input_ids": [1], "sampling_params": {"sampling_seed": WIDE}}
            assert (await server.post("/generate", bad)).status_code == 400
            for _ in range(3):
                await server.post("/generate", {"input_ids": [1], "rid": "x" * 10})
            assert server.engine.num_open == 0
            reply = await server.post("/pause?mode=wait")
            assert reply.status_code == 200

    run(test)


def test_leaving_ends_requests_with_what_they_have() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 400}}
            some = asyncio.create_task(server.post("/generate", body))
            stream = asyncio.create_task(server.post("/generate", {**body, "stream": True}))
            await until(lambda: server.link.leader.state().num_output_tokens > 10)
            await server.engine.send(Pause(mode="keep"))
            none = asyncio.create_task(server.post("/generate", body))
            await until(lambda: len(server.link.requests) == 3)
            await server.engine.leave(30.0)
            reply = (await some).json()
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
            assert reply["output_ids"] == expected_tokens([5], len(reply["output_ids"]))
            frames = (await stream).text.strip().split("\n\n")
            assert frames[-1] == "data: [DONE]"
            assert '"type":"abort"' in frames[-2]
            refused = await none
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "EngineDead")
            late = await server.post("/generate", body)
            assert "shutting down" in late.json()["error"]["message"]
            assert late.status_code == (await server.get("/health")).status_code == 503

    run(test)


def test_health_says_when_requests_see_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "_TICK_S", 3600.0)

    async def test() -> None:
        async with serving(reply_s=60.0) as server:
            assert (await server.get("/health")).status_code == 200
            server.link.silent = True
            box = server.engine.submit([make_request("a", [1])])
            assert (await server.get("/health")).status_code == 200
            server.engine._heard.progress_at -= 61.0
            reply = await server.get("/health")
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "NotReady")
            assert "no step" in reply.json()["error"]["message"]
            server.engine.discard(box)
            assert (await server.get("/health")).status_code == 200

    run(test)


def dies(server: Server) -> None:
    server.link.die()
    assert server.engine.dead is not None


def test_another_engine_takes_over_and_knows_nothing_of_the_old_one() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            await engine.send(Pause())
            assert (await server.post("/begin_weight_update")).status_code == 200
            waiting = asyncio.create_task(server.post("/generate", {"input_ids": [5]}))
            await until(lambda: engine.num_open == 1)
            dies(server)
            engine.explain("it is being started again")
            assert (await waiting).status_code == 503
            for stream in (False, True):
                refused = await server.post("/generate", {"input_ids": [5], "stream": stream})
                assert (refused.status_code, "started again" in refused.text) == (503, True)
            restarted = asyncio.create_task(engine.restart(server.another_engine(), start_s=30.0))
            reply = await server.post("/generate", {"input_ids": [5]})
            assert reply.status_code == 503
            await restarted
            reply = await server.post("/generate", {"input_ids": [5]})
            assert reply.json()["output_ids"] == expected_tokens([5], 128)
            ended = await server.post("/end_weight_update")
            assert ended.status_code == 400
            assert "no update is open" in ended.text, "the update went with the old engine"

    run(test)


def test_an_engine_without_a_version_refuses_until_one_is_published() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            dies(server)
            config = dataclasses.replace(fake_config(), weight_version=7, refusal="publish 7")
            link = server.another_engine(config)
            await engine.restart(link, start_s=30.0, no_version="publish 7")
            for path in ("/generate", "/v1/completions"):
                for stream in (False, True):
                    body = {"input_ids": [5], "prompt": [5], "stream": stream}
                    del body["prompt" if path == "/generate" else "input_ids"]
                    reply = await server.post(path, body)
                    assert (reply.status_code, "publish 7" in reply.text) == (503, True), path
            assert link.requests == []
            ready = await server.get("/ready")
            assert (ready.status_code, "publish 7" in ready.text) == (503, True)
            info = (await server.get("/server_info")).json()
            assert info["internal_states"][0]["refusal"] == "publish 7"
            reply = await server.post("/update_weights_from_disk", {"model_path": "/3"})
            assert reply.status_code == 200, reply.text
            assert (await engine.send(GetState())).state.version == 8
            reply = await server.post("/generate", {"input_ids": [5]})
            assert reply.json()["output_ids"] == expected_tokens([5], 128, 3)

    run(test)


def test_an_engine_that_cannot_be_built_again_says_why() -> None:
    async def test() -> None:
        async with serving() as server:
            dies(server)
            link = server.another_engine()
            link.silent = True
            restarted = asyncio.create_task(server.engine.restart(link, start_s=30.0))
            await asyncio.sleep(0)
            link.deliver([Reply(error=ErrorInfo(kind="OutOfMemory", message="no room"))])
            with pytest.raises(OutOfMemory, match="no room"):
                await restarted
            restarted = asyncio.create_task(server.engine.restart(link, start_s=30.0))
            await asyncio.sleep(0)
            link.die()
            with pytest.raises(EngineDead, match="signal 9"):
                await restarted
            assert server.engine.dead is not None

    run(test)
