"""A server process over the slow fake engine, the processes below it, and requests that are open
while something happens to them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.serve_process import ServerProcess, fake_server

ANSWER_S = 120.0
LAST_ANSWERS = "import rollout.http.server\nrollout.http.server._LAST_ANSWERS_S"


def slow_server(
    tp: int = 1, *, timeout_s: float = 60.0, last_answers_s: float = 0.5, options: str = ""
) -> ServerProcess:
    """A server of `tp` ranks, with room for every request of a `Load` at once: one that waited for
    others to end would not begin. timeout_s: for the engine's replies and its ranks' steps.
    last_answers_s: how long it says that its engine is gone, before it leaves as well.
    options: further keyword arguments of its `ServeConfig`, as source text."""
    engine = f"num_pages=4096, parallel=ParallelConfig(tp_size={tp}, timeout_s={timeout_s})"
    server = f"reply_s={timeout_s}, {options}"
    code = fake_server(engine, server, factory="tests.helpers.slow_ranks:build")
    return ServerProcess(["-c", f"{LAST_ANSWERS} = {last_answers_s}\n{code}"])


def family(pid: int) -> dict[str, int]:
    """The processes of a server by what they are: "server", "leader", "rank"."""
    found = {"server": pid}
    for name in ("leader", "rank"):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            break
        (pid,) = map(int, children)
        found[name] = pid
    return found


@dataclass
class Answer:
    """What became of one request. error: the type of the error that it was answered with.
    broken: how its connection broke, if it was not answered."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    broken: str = ""

    @property
    def typed(self) -> bool:
        """Whether the client was told what became of it."""
        return bool(self.finish or self.error) and not self.broken


class Load:
    """Requests that are open at the same time, every second one a stream.

    `started` waits until every stream has had its first token.
    """

    def __init__(self, url: str, *, num: int = 12, num_tokens: int = 300) -> None:
        # One for all: each would read the system's certificates anew.
        limits = httpx.Limits(max_connections=num)
        self._client = httpx.Client(base_url=url, timeout=ANSWER_S, limits=limits)
        self._num_tokens = num_tokens
        self._pool = ThreadPoolExecutor(num)
        self._begun = [threading.Event() for _ in range(num)]
        self._asked = [self._pool.submit(self._ask, number) for number in range(num)]

    def started(self) -> None:
        """Raises AssertionError if a stream does not begin."""
        for number, begun in enumerate(self._begun):
            assert number % 2 == 0 or begun.wait(ANSWER_S), self._asked[number]

    def answers(self) -> list[Answer]:
        """Of all, in order, each in bounded time."""
        return [asked.result(ANSWER_S) for asked in self._asked]

    def expected(self, number: int) -> list[int]:
        """The tokens of request `number`."""
        return expected_tokens([number + 1], self._num_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        self._client.close()

    def _ask(self, number: int) -> Answer:
        answer = Answer()
        sampling = {"max_new_tokens": self._num_tokens, "ignore_eos": True}
        body: dict[str, Any] = {"input_ids": [number + 1], "sampling_params": sampling}
        try:
            if number % 2:
                self._stream(body | {"stream": True}, number, answer)
            else:
                read(answer, self._client.post("/generate", json=body).json())
        except (httpx.TransportError, json.JSONDecodeError) as error:
            answer.broken = f"{type(error).__name__}: {error}"
        return answer

    def _stream(self, body: dict[str, Any], number: int, answer: Answer) -> None:
        with self._client.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    read(answer, json.loads(line.removeprefix("data: ")))
                    self._begun[number].set()
                elif line.startswith("{"):
                    read(answer, json.loads(line))


def read(answer: Answer, found: dict[str, Any]) -> None:
    """Take one object of a reply into an answer."""
    if "error" in found:
        answer.error = found["error"]["type"]
        assert found["error"]["message"]
        return
    answer.tokens = found["output_ids"]
    finish = found["meta_info"]["finish_reason"]
    if finish is not None:
        answer.finish = finish["type"]


def untyped(answers: Sequence[Answer]) -> list[Answer]:
    """Those that were left without a word."""
    return [answer for answer in answers if not answer.typed]
