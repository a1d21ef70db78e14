"""Requests that are held in the server: what happens to them there, and how they leave."""

import pytest

from engine.errors import QueueFull
from engine.protocol import Abort, GetState, Request
from rollout.http.engine.outbox import PART
from rollout.requests.sample_ids import sample_id
from tests.helpers.http_app import Server, run, serving, until
from tests.helpers.replicas import fake_config, make_request

MANY = 4 * PART + 100


def requests_of(name: str, count: int) -> list[Request]:
    return [make_request(f"{name}-{i}", [1], max_new_tokens=2) for i in range(count)]


def parts_of(server: Server) -> list[tuple[int, int]]:
    """(requests in it, steps before it) of every frame from now on that has requests."""
    found: list[tuple[int, int]] = []
    post = server.link.post

    def noted(messages) -> None:
        count = sum(isinstance(message, Request) for message in messages)
        if count:
            found.append((count, server.link.leader.state().num_steps))
        post(messages)

    server.link.post = noted
    return found


def test_held_requests_that_are_discarded_never_reach_the_engine() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            engine.outbox.hold()
            dropped = engine.submit([make_request("a", [1])])
            kept = engine.submit([make_request("b", [1], max_new_tokens=1)])
            assert engine.num_open == 0
            engine.discard(dropped)
            engine.outbox.release()
            (output,) = await kept.take()
            assert output.rid == "b"
            assert [request.rid for request in server.link.requests] == ["b"]

    run(test)


def test_held_requests_can_be_aborted() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            engine.outbox.hold()
            mailbox = engine.submit([make_request("a-1", [1]), make_request("b", [1])])
            await engine.send(Abort(rid_prefix="a"))
            (output,) = await mailbox.take()
            assert output.finish is not None
            assert (output.rid, output.finish.type) == ("a-1", "abort")
            assert engine.num_open == 0
            engine.outbox.release()
            (output,) = await mailbox.take()
            assert (output.rid, len(output.token_ids)) == ("b", 8)

    run(test)


def test_a_release_of_many_lets_steps_go_on_between_its_parts() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            running = engine.submit([make_request("running", [1], max_new_tokens=400)])
            engine.outbox.hold()
            held = [engine.submit(requests_of(f"call{call}", MANY // 4)) for call in range(4)]
            parts = parts_of(server)
            engine.outbox.release()
            late = engine.submit(requests_of("late", 1))
            await until(lambda: not engine.outbox)
            asked = [request.rid for request in server.link.requests]
            want = [f"call{call}-{i}" for call in range(4) for i in range(MANY // 4)]
            assert asked == ["running", *want, "late-0"], "the order of the calls"
            assert max(count for count, _ in parts) <= PART
            steps = [before for _, before in parts]
            assert steps == sorted(set(steps)), "no step was made between two parts"
            for box in (running, *held, late):
                while box.open:
                    await box.take()
            assert engine.num_open == 0

    run(test)


def test_a_hold_keeps_the_parts_that_have_not_left() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            engine.outbox.hold()
            box = engine.submit(requests_of("a", MANY))
            engine.outbox.release()
            engine.outbox.hold()
            for _ in range(3):
                await engine.send(GetState())
            assert (len(server.link.requests), len(engine.outbox)) == (PART, MANY - PART)
            engine.outbox.release()
            await until(lambda: not engine.outbox)
            while box.open:
                await box.take()
            assert len(server.link.requests) == MANY

    run(test)


def test_an_abort_ends_what_is_held_without_the_engine() -> None:
    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            old = engine.submit([make_request("a", [1], max_new_tokens=400)])
            # Its id is free at once, and what the engine still says of it is not the next one's.
            engine.discard(old)
            engine.outbox.hold()
            boxes = [engine.submit(requests_of(name, MANY)) for name in ("b", "c")]
            again = engine.submit([make_request("a", [1])])
            parts = parts_of(server)
            engine.post([Abort(rid_prefix="b"), Abort(rids=["a"], message="a left")])
            assert [bool(box.open) for box in (*boxes, again)] == [False, True, False]
            ends = {o.rid: o.finish for o in [*await boxes[0].take(), *await again.take()]}
            assert len(ends) == MANY + 1
            assert all(finish is not None and finish.type == "abort" for finish in ends.values())
            finish = ends["a"]
            assert finish is not None and finish.message == "a left"
            assert parts == []
            engine.outbox.release()
            await until(lambda: not engine.outbox)
            assert sum(count for count, _ in parts) == MANY

    run(test)


@pytest.mark.parametrize("held", [(), ("q-1",), ("q", "q-1"), ("q",)])
def test_an_abort_by_name_ends_one_request_wherever_it_waits(held: tuple[str, ...]) -> None:
    """Of a request called "q-1" and the sample of "q" that replies show so."""
    requests = {"q": make_request(sample_id("q", 1), [1]), "q-1": make_request("q-1", [1])}

    async def test() -> None:
        async with serving() as server:
            engine = server.engine
            await server.post("/pause_generation", {"mode": "in_place"})
            engine.outbox.release()
            boxes = {n: engine.submit([r]) for n, r in requests.items() if n not in held}
            engine.outbox.hold()
            boxes |= {name: engine.submit([requests[name]]) for name in held}
            await engine.send(Abort(rid="q-01"))
            assert all(box.open for box in boxes.values())
            await engine.send(Abort(rid="q-1"))
            (output,) = await boxes["q-1"].take()
            assert output.finish is not None and output.finish.type == "abort"
            assert boxes["q"].open
            await engine.send(Abort(rid="q-1"))
            assert not boxes["q"].open

    run(test)


def test_what_is_held_counts_against_the_room() -> None:
    async def test() -> None:
        config = fake_config(max_waiting=10)
        async with serving(engine=config) as server:
            engine = server.engine
            engine.outbox.hold()
            room = engine.facts.max_running + engine.facts.max_waiting
            engine.check_room(room - engine.facts.max_running)
            engine.submit(requests_of("a", room))
            with pytest.raises(QueueFull, match="10 sequences wait"):
                engine.check_room(1)

    run(test)
