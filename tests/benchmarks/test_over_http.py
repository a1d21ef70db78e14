"""What the benchmark of HTTP counts: replies, whole and in chunks; and its engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.http_app import until
from tests.helpers.replicas import fake_config, make_request

ROOT = Path(__file__).resolve().parents[2]
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def reply_of(count: int, **meta: Any) -> dict[str, Any]:
    return {"output_ids": [7] * count, "meta_info": meta}


def whole(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(frames: list[Any]) -> bytes:
    lines = [f"data: {json.dumps(frame)}\n\n".encode() for frame in frames] + [b"data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_tokens_of_a_reply() -> None:
    from over_http_load import num_tokens

    assert num_tokens(whole(reply_of(5))) == 5
    assert num_tokens(whole([reply_of(2), reply_of(3, output_token_logprobs=[0, 0, 0])])) == 5
    assert num_tokens(chunked([reply_of(1), reply_of(2), reply_of(0)])) == 3
    with pytest.raises(AssertionError):
        num_tokens(whole(reply_of(3, output_token_logprobs=[0])))
    with pytest.raises(AssertionError):
        num_tokens(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("reply", [whole(reply_of(3)), chunked([reply_of(3)])], ids=len)
def test_replies_are_taken_apart_wherever_they_are_cut(reply: bytes, size: int) -> None:
    from over_http_load import Replies

    found: list[bytes] = []
    replies = Replies(lambda _, data: found.append(data))
    for _ in range(2):
        for at in range(0, len(reply), size):
            replies.data_received(reply[at : at + size])
        assert replies.first_at > 0
    assert found == [reply, reply]


def test_connections_send_again_until_there_were_enough_replies() -> None:
    from over_http_load import closed

    async def test() -> dict[str, Any]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(asyncio.IncompleteReadError, ConnectionResetError):
                while head := await reader.readuntil(b"\r\n\r\n"):
                    await reader.readexactly(int(head.partition(b"Length: ")[2].split()[0]))
                    writer.write(whole({}))
            writer.close()
            ended.append(None)

        ended: list[None] = []
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            job = {"port": port, "path": "/", "body": "{}", "connections": 3, "count": 20}
            found = await closed(job)
            await until(lambda: len(ended) == 3)
            return found

    found = asyncio.run(test())
    assert found["statuses"] == ["200"]
    assert 0 < found["p50_s"] <= found["p99_s"] <= found["seconds"]


def test_the_engine_that_costs_nothing_is_one() -> None:
    from over_http_mock import MockExecutor

    from rollout.replica.inline import InlineReplica

    config = fake_config()
    executor = MockExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit([make_request(f"r{i}", [5, 6], max_new_tokens=4) for i in range(3)])
        outputs = []
        while not replica.idle():
            outputs += replica.step()
    assert [output.rid for output in outputs] == ["r0", "r1", "r2"]
    drawn = set(executor._ids[:16].tolist())
    for output in outputs:
        assert len(output.token_ids) == 4 and set(output.token_ids.tolist()) <= drawn
    assert all((output.logprobs < 0).all() for output in outputs)


def test_the_table_has_a_line_for_each_ratio() -> None:
    from over_http import table

    report = {"requests": {"ratio": 0.5, "completions_ratio": 0.25}, "first": {"more_ms": 1.5}}
    lines = table(report).splitlines()
    assert [line.split()[1] for line in lines] == ["0.500", "0.250", "1.500"]
