"""Request ids in replies and in the log, and what the log says of requests and never says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from rollout.logs.logging_setup import ACCESS_LOGGER, JsonFormatter, TextFormatter
from tests.helpers.http_app import run, serving

BODY = {"text": "a secret prompt", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}


class Lines(logging.Handler):
    """Keeps lines as they would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter(""))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def of(self, logger: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.lines]
        return [line for line in found if line["logger"] == logger]


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, root, access = Lines(), logging.getLogger(), logging.getLogger(ACCESS_LOGGER)
    levels = root.level, access.level
    # The client of these tests says what it calls.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    root.addHandler(lines)
    root.setLevel(logging.DEBUG)
    access.setLevel(logging.INFO)
    yield lines
    root.removeHandler(lines)
    root.setLevel(levels[0])
    access.setLevel(levels[1])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/health", "/nowhere"])
def test_a_reply_has_the_id_of_its_request(path: str) -> None:
    async def test() -> None:
        async with serving() as server:
            kept = await server.post(path, BODY, headers={"x-request-id": "mine-1"})
            assert kept.headers.get_list("x-request-id") == ["mine-1"]
            drawn = [(await server.post(path, BODY)).headers["x-request-id"] for _ in range(2)]
            assert len(set(drawn)) == 2 and all(len(name) == 32 for name in drawn)

    run(test)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "a\tb"])
def test_an_id_that_could_not_stand_in_a_log_is_drawn_anew(given: str) -> None:
    async def test() -> None:
        async with serving() as server:
            headers = {"x-request-id": given.encode()}
            found = (await server.get("/health", headers=headers)).headers["x-request-id"]
            assert found != given and len(found) == 32

    run(test)


def test_a_stream_and_a_refusal_have_it_too() -> None:
    async def test() -> None:
        async with serving(api_key="k") as server:
            headers = {"x-request-id": "r", "authorization": "Bearer k"}
            stream = await server.post("/generate", {**BODY, "stream": True}, headers=headers)
            assert (stream.status_code, stream.headers["x-request-id"]) == (200, "r")
            refused = await server.post("/generate", BODY, headers={"x-request-id": "s"})
            assert (refused.status_code, refused.headers["x-request-id"]) == (401, "s")

    run(test)


def test_a_line_for_each_request_says_what_it_cost(log: Lines) -> None:
    async def test() -> None:
        async with serving(access_log=True, api_key="sesame") as server:
            headers = {"x-request-id": "r1", "authorization": "Bearer sesame"}
            body = {**BODY, "sampling_params": {**BODY["sampling_params"], "n": 2}}  # type: ignore[dict-item]
            await server.post("/generate?key=hidden", body, headers=headers)
            await server.post("/generate", BODY, headers={"x-request-id": "r2"})

    run(test)
    first, second = log.of(ACCESS_LOGGER)
    assert (first["request_id"], first["status"], first["path"]) == ("r1", 200, "/generate")
    assert first["output_tokens"] == 8 and first["finish_reasons"] == {"length": 2}
    assert len(first["rids"]) == 2 and first["seconds"] >= first["first_token_s"] >= 0
    assert (second["request_id"], second["status"]) == ("r2", 401)
    assert "rids" not in second
    text = "\n".join(log.lines)
    for secret in ("secret", "sesame", "hidden"):
        assert secret not in text


def test_without_the_option_there_is_none(log: Lines) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/generate", BODY)

    run(test)
    assert log.of(ACCESS_LOGGER) == []


def test_whatever_is_logged_within_a_request_names_it(
    log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving() as server:
            checked = server.engine.check_open

            def check_open() -> None:
                logging.getLogger("some.library").info("looked\nat it")
                checked()

            monkeypatch.setattr(server.engine, "check_open", check_open)
            await server.post("/generate", BODY, headers={"x-request-id": "r7"})

    run(test)
    line, *_ = log.of("some.library")
    assert (line["request_id"], line["message"], line["level"]) == ("r7", "looked\nat it", "info")


def test_for_people_it_stands_behind_the_first_line() -> None:
    async def test() -> None:
        async with serving() as server:
            record = logging.LogRecord("a", logging.INFO, "", 1, "one\ntwo", (), None)
            assert TextFormatter("front-1").format(record) == "front-1: one\n  two"
            await server.get("/health", headers={"x-request-id": "r8"})
            assert TextFormatter("").format(record) == "one [r8]\n  two"

    run(test)


def test_what_a_client_sends_begins_no_line_and_steers_no_terminal(log: Lines) -> None:
    async def test() -> None:
        async with serving(access_log=True) as server:
            await server.get("/a%0A127.0.0.1%20POST%20/forged%1b[31m?key=hidden")
            await server.get("/" + "long" * 1000)

    run(test)
    first, second = log.of(ACCESS_LOGGER)
    assert first["path"] == "/a%0A127.0.0.1%20POST%20/forged%1B%5B31m"
    assert first["message"].count("\n") == 0
    assert len(second["path"]) < 600


def test_a_message_of_a_request_that_steers_a_terminal_is_shown_escaped() -> None:
    told = "request \x1b[31mred\r\x85\u2028\udc80\ninfo: forged"
    record = logging.LogRecord("a", logging.INFO, "", 1, told, (), None)
    shown = TextFormatter("").format(record)
    assert shown == "request \\x1b[31mred\\r\\x85\\u2028\\udc80\n  info: forged"
    line = JsonFormatter("").format(record)
    assert json.loads(line)["message"] == told
    assert line.isascii() and len(line.splitlines()) == 1
