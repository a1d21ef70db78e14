"""The same programs on a replica of this process, on one of another, and on a server."""

import asyncio
from typing import Any

import pytest

from engine.errors import EngineDead, InvalidRequest
from engine.protocol import Abort, Pause
from rollout.program import Runner, State
from tests.helpers.http_app import until
from tests.helpers.live_servers import live
from tests.helpers.program_engines import SeededExecutor, seeded_replica
from tests.helpers.replicas import inline, spawned
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ARGUMENTS = [{"question": f"question {number}"} for number in range(12)]


async def program(s: State, question: str) -> tuple[Any, ...]:
    s.system("think")
    s.user(question)
    plan = await s.gen("plan", max_new_tokens=8)

    async def step(branch: State, hint: str) -> State:
        branch.user(hint)
        await branch.gen("try", max_new_tokens=6, stop=["!"])
        return branch

    tries = await s.fork(3).run(step, ["a", "b", "c"])
    s.join(tries[0])
    s.user("which?")
    best = await s.select("best", ["one", "two"])
    texts = [branch["try"].text for branch in tries]
    return plan.text, plan.logprobs, texts, best.text, best.logprobs, s.token_ids


async def endless(s: State, question: str = "q") -> None:
    s.add(question)
    await s.gen("x", max_new_tokens=400)


def test_a_server_draws_what_a_replica_draws() -> None:
    with seeded_replica() as replica:
        here = Runner.of_replica(replica, TOKENIZER).run_batch(program, ARGUMENTS)

    async def there() -> list[Any]:
        async with live(executor=SeededExecutor) as found:
            runner = Runner.of_server(found.url, tokenizer=TOKENIZER)
            alone = await runner.run_async(program, **ARGUMENTS[0])
            batch = await runner.run_batch_async(program, ARGUMENTS)
            assert alone == batch[0]
            with pytest.raises(InvalidRequest, match=r"^x: ") as caught:
                await runner.run_async(_refused)
            assert caught.value.field == "x.temperature"
            return batch

    assert asyncio.run(there()) == here
    assert len({plan for plan, *_ in here}) > 6, "programs have seeds of their own"


async def _refused(s: State) -> None:
    s.add("abc")
    await s.gen("x", temperature=-1.0)


def test_a_replica_in_a_process_of_its_own() -> None:
    with inline() as replica:
        here = Runner.of_replica(replica, TOKENIZER).run_batch(program, ARGUMENTS)
    with spawned() as replica:
        assert Runner.of_replica(replica, TOKENIZER).run_batch(program, ARGUMENTS) == here
        assert replica.idle()


def test_a_batch_is_in_the_engine_at_once() -> None:
    async def short(s: State, text: str) -> None:
        s.add(text)
        await s.fork(2).run(_eight)

    with inline() as replica:
        arguments = [{"text": f"{number:02}"} for number in range(12)]
        Runner.of_replica(replica, TOKENIZER).run_batch(short, arguments)
        # Of one program after another they would be 12 x 8, of 24 requests 24 x 8.
        assert replica.state().num_steps < 20


async def _eight(branch: State) -> None:
    await branch.gen("x", max_new_tokens=8)


def test_a_program_that_is_cancelled_leaves_nothing_in_the_replica() -> None:
    with inline() as replica:

        async def cancelled() -> None:
            running = asyncio.ensure_future(
                Runner.of_replica(replica, TOKENIZER).run_batch_async(endless, [{}, {}])
            )
            await until(lambda: replica.state().num_running == 2)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

        asyncio.run(cancelled())
        assert replica.idle()
        state = replica.state()
        assert (state.num_running, state.num_waiting) == (0, 0)
        assert state.free_pages + state.cached_pages == state.total_pages


def test_a_program_that_is_cancelled_leaves_nothing_in_the_server() -> None:
    async def cancelled() -> None:
        async with live() as found:
            found.server.link.stalled = True
            runner = Runner.of_server(found.url, tokenizer=TOKENIZER)
            running = asyncio.ensure_future(runner.run_batch_async(endless, [{}, {}]))
            await until(lambda: len(found.server.link.requests) == 2)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            rids = {request.rid for request in found.server.link.requests}

            def aborted() -> set[str]:
                ends = [c for c in found.server.link.commands if isinstance(c, Abort)]
                return {rid for end in ends for rid in (end.rid, *end.rids)}

            await until(lambda: rids <= aborted())

    asyncio.run(cancelled())


def test_errors_stand_in_the_place_of_results_where_they_are_asked_for() -> None:
    async def odd(s: State, number: int) -> int:
        s.add("abc")
        await s.gen("x", max_new_tokens=2 if number else -1)
        return number

    arguments = [{"number": number} for number in (1, 0, 2)]
    with inline() as replica:
        runner = Runner.of_replica(replica, TOKENIZER)
        first, error, last = runner.run_batch(odd, arguments, return_exceptions=True)
        assert (first, last) == (1, 2) and isinstance(error, InvalidRequest)
        with pytest.raises(InvalidRequest) as caught:
            runner.run_batch(odd, arguments)
        assert caught.value.__notes__ == ["in program 1 of the batch"]
        assert runner.run_batch(odd, []) == []


def test_an_engine_that_dies_is_said_to_all_programs() -> None:
    with spawned("die") as replica:
        runner = Runner.of_replica(replica, TOKENIZER)
        found = runner.run_batch(endless, [{}, {}], return_exceptions=True)
    assert [type(error) for error in found] == [EngineDead, EngineDead]


def test_a_server_that_is_not_there() -> None:
    runner = Runner.of_server("http://127.0.0.1:9", tokenizer=TOKENIZER)
    with pytest.raises(EngineDead, match=r"x: no answer from http://127\.0\.0\.1:9"):
        runner.run(endless)
    with pytest.raises(EngineDead):
        Runner.of_server("http://127.0.0.1:9").run(endless)


def test_a_model_of_another_machine_needs_a_tokenizer() -> None:
    async def there() -> None:
        async with live() as found:
            runner = Runner.of_server(found.url)
            await asyncio.to_thread(_without_tokenizer, runner)

    asyncio.run(there())


def _without_tokenizer(runner: Runner) -> None:
    with pytest.raises(InvalidRequest, match="not on this machine") as caught:
        runner.run(endless)
    assert caught.value.field == "tokenizer"


def test_a_paused_replica_is_refused() -> None:
    with inline() as replica:
        replica.send(Pause())
        with pytest.raises(InvalidRequest, match="paused"):
            Runner.of_replica(replica, TOKENIZER).run(endless)


def test_variables_that_are_fields_of_the_template_are_refused() -> None:
    with inline() as replica, pytest.raises(InvalidRequest, match="field of its own"):
        Runner.of_replica(replica, TOKENIZER, chat_template_kwargs={"messages": []})


def test_a_request_that_comes_while_the_last_step_ends_is_not_forgotten() -> None:
    async def many(s: State, number: int) -> None:
        s.add(f"{number}")
        for _ in range(40):
            await s.gen("x", max_new_tokens=1)
            # So that a request comes at any point of the driver's turn.
            await asyncio.sleep(number / 10_000)

    with spawned() as replica:
        arguments = [{"number": number} for number in range(3)]
        Runner.of_replica(replica, TOKENIZER).run_batch(many, arguments)


def test_a_program_that_cancels_itself_takes_no_other_with_it() -> None:
    async def cancels(s: State, number: int) -> int:
        s.add("text")
        if number == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        return len((await s.gen("x", max_new_tokens=3)).token_ids)

    arguments = [{"number": number} for number in range(3)]
    with seeded_replica() as replica:
        runner = Runner.of_replica(replica, TOKENIZER)
        first, second, third = runner.run_batch(cancels, arguments, return_exceptions=True)
        assert (first, third) == (3, 3) and isinstance(second, asyncio.CancelledError)
        with pytest.raises(asyncio.CancelledError) as caught:
            runner.run_batch(cancels, arguments)
        assert caught.value.__notes__ == ["in program 1 of the batch"]

        async def left() -> None:
            batch = runner.run_batch_async(endless, [{}, {}], return_exceptions=True)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batch, 0.05)

        asyncio.run(left())
        state = replica.state()
        assert state.num_running == state.num_waiting == 0


def test_arguments_that_are_no_names_stand_in_the_place_of_their_result() -> None:
    async def size(s: State, number: int) -> int:
        return number

    with seeded_replica() as replica:
        runner = Runner.of_replica(replica, TOKENIZER)
        found = runner.run_batch(size, [{"number": 1}, "x", {"size": 2}], return_exceptions=True)
    assert found[0] == 1 and [type(each) for each in found[1:]] == [TypeError] * 2


@pytest.mark.parametrize("body", ["[1]", "{}", '"text"'])
def test_what_answers_is_no_server_of_a_model(body: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            runner = Runner.of_server(url, tokenizer=TOKENIZER)
            with pytest.raises(EngineDead, match="is no reply to /generate"):
                await runner.run_async(endless)
            with pytest.raises(EngineDead, match="is no server of a model"):
                await asyncio.to_thread(_without_tokenizer, Runner.of_server(url))

    asyncio.run(ask())
