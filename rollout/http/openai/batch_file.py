"""Files of OpenAI's batch format: each line names a route and has its body, and is answered by it.

The routes are the server's own, without a socket: a line gets the status and the body that a
server of this model would give. https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import uvloop
from fastapi import Response

from engine.errors import EngineDead, InternalError, InvalidRequest, QueueFull, SlipstreamError
from rollout.files.disk_space import write_all
from rollout.files.jsonl import JsonLine, check_line, read_lines
from rollout.http.config import ServeConfig
from rollout.http.edge.errors import error_response
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.link import ProcessLink
from rollout.http.openai.chat_routes import reply_to_chat
from rollout.http.openai.completion_routes import complete
from rollout.http.scoring.embedding_routes import embed
from rollout.http.services import Services, make_services
from rollout.offline import FileReport, check_output, create_output
from rollout.replica.spawned import ProcessReplica
from rollout.requests.json_types import decode_json
from rollout.requests.seeds import base_seed, derive_seed
from rollout.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MIN_WINDOW = 64
_AGAIN_S = 0.1

_A_LINE = (
    "a line has custom_id, method POST, url, which is /v1/chat/completions, /v1/completions or "
    "/v1/embeddings, and body"
)

CustomId = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class BatchRequest(msgspec.Struct):
    """One line of the input."""

    custom_id: CustomId
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class BatchReply(msgspec.Struct):
    """One line of the output. response: what the route answered, errors of the request too. error:
    of a line that names no request."""

    id: str
    custom_id: str | None
    response: _Response | None = None
    error: _Error | None = None


class _Streamed(msgspec.Struct):
    stream: bool | None = False


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Used(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


def run_batch(
    replica: ProcessReplica,
    tokenizer: Tokenizer | None,
    config: ServeConfig,
    input_path: str | Path,
    output_path: str | Path,
    *,
    seed: int | None = None,
) -> FileReport:
    """Answer every line of a batch file, in input order.

    The replica belongs to this call, which closes it. config: of the server that would answer; its
    `model_name` is what bodies may call the model. A body without a `seed` gets one derived from
    `seed` and the line's number; None draws and logs one.

    Raises InvalidRequest naming `input` or `output` if that file cannot be opened or is no text,
    EngineDead if the replica dies, and DiskFull if the replies do not fit; what was finished is on
    disk then, in whole lines.
    """
    check_output(input_path, output_path)
    # While the event loop runs, nothing may hold it up for as long as a large file takes.
    lines = _parsed(read_lines(Path(input_path), field="input"))
    with (
        create_output(Path(output_path)) as out,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_run(ProcessLink(replica), tokenizer, config, lines, out, seed))


async def _run(
    link: ProcessLink,
    tokenizer: Tokenizer | None,
    config: ServeConfig,
    lines: list[BatchRequest | BatchReply],
    out: FileIO,
    seed: int | None,
) -> FileReport:
    engine = AsyncEngine(link, reply_s=config.reply_s, slow_s=config.start_s)
    try:
        await engine.start()
        services = make_services(config, engine, tokenizer)
        job = _Job(services, lines, out, base_seed(seed))
        await job.run(max(_MIN_WINDOW, 2 * engine.facts.max_running))
        return job.report()
    finally:
        await engine.close()


def _parsed(lines: Iterable[JsonLine]) -> list[BatchRequest | BatchReply]:
    """The requests; in place of a line that is none, its reply."""
    found: list[BatchRequest | BatchReply] = []
    taken: set[str] = set()
    for line in lines:
        named: Any = None
        try:
            named = check_line(line).get("custom_id")
            request: BatchRequest = decode_json(line.data, BatchRequest, field="", what="the line")
            if request.custom_id in taken:
                raise InvalidRequest(f"custom_id {request.custom_id!r} was used by another line")
            taken.add(request.custom_id)
            found.append(request)
        except InvalidRequest as error:
            told = f"{line.where}: {error}; {_A_LINE}"
            reply = BatchReply(id=_new_id("batch_req"), custom_id=None)
            reply.custom_id = named if isinstance(named, str) else None
            reply.error = _Error(code="invalid_request", message=told)
            found.append(reply)
    return found


class _Job:
    """The lines of one file on their way through the routes, a window of them at a time."""

    def __init__(
        self, services: Services, lines: list[BatchRequest | BatchReply], out: FileIO, seed: int
    ) -> None:
        self._services = services
        self._num_lines = len(lines)
        self._source: Iterator[tuple[int, BatchRequest | BatchReply]] = enumerate(lines)
        self._out = out
        self._seed = seed
        self._done: dict[int, BatchReply] = {}
        self._num_written = self._num_errors = 0
        self._num_prompt_tokens = self._num_output_tokens = 0

    async def run(self, window: int) -> None:
        """Answer all lines. Raises EngineDead and DiskFull."""
        workers = min(window, self._num_lines)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work())
        except BaseExceptionGroup as errors:
            # What `except*` raises would be a group again.
            found, rest = errors.split(SlipstreamError)
            if found is None or rest is not None:
                raise
            raise _first(found) from errors

    def report(self) -> FileReport:
        """Totals, once every line is written."""
        assert self._num_written == self._num_lines, "a line was left without an answer"
        return FileReport(
            num_lines=self._num_lines,
            num_errors=self._num_errors,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    async def _work(self) -> None:
        for number, line in self._source:
            reply = line if isinstance(line, BatchReply) else await self._answered(number, line)
            self._done[number] = reply
            self._write_ready()

    async def _answered(self, number: int, line: BatchRequest) -> BatchReply:
        generator = self._services.generator.seeded(derive_seed(self._seed, number))
        services = replace(self._services, generator=generator)
        try:
            response = await self._patiently(services, line)
        except EngineDead:
            raise
        except SlipstreamError as error:
            response = error_response(error)
        except Exception as error:
            # A boundary, as the server's: what is wrong with one line is its own.
            logger.exception("line %s", line.custom_id)
            response = error_response(InternalError(f"{type(error).__name__}: {error}"))
        body = msgspec.Raw(bytes(response.body))
        answer = _Response(response.status_code, _new_id("req"), body)
        return BatchReply(_new_id("batch_req"), line.custom_id, response=answer)

    async def _patiently(self, services: Services, line: BatchRequest) -> Response:
        """The route's reply. Other lines may fill the queue, which has room for each alone: one
        that could never wait in it is refused as `InvalidRequest`."""
        while True:
            with contextlib.suppress(QueueFull):
                return await self._routed(services, line)
            await asyncio.sleep(_AGAIN_S)

    async def _routed(self, services: Services, line: BatchRequest) -> Response:
        data = bytes(line.body)
        if _is_streamed(data):
            raise InvalidRequest("a batch has no streams; leave it out", field="stream")
        if line.url == "/v1/embeddings":
            return await embed(services, data)
        if line.url == "/v1/completions":
            return await complete(services, data)
        return await reply_to_chat(services, services.prompts, data)

    def _write_ready(self) -> None:
        """Write every line that is done and has no unfinished line before it. Raises DiskFull."""
        written = []
        while self._num_written in self._done:
            reply = self._done.pop(self._num_written)
            self._count(reply)
            written.append(msgspec.json.encode(reply) + b"\n")
            self._num_written += 1
        if written:
            write_all(self._out, b"".join(written))

    def _count(self, reply: BatchReply) -> None:
        if reply.response is None or reply.response.status_code != 200:
            self._num_errors += 1
            return
        used = msgspec.json.decode(reply.response.body, type=_Used).usage
        self._num_prompt_tokens += used.prompt_tokens
        self._num_output_tokens += used.completion_tokens


def _is_streamed(data: bytes) -> bool:
    try:
        return bool(decode_json(data, _Streamed).stream)
    except InvalidRequest:
        return False  # The route says what is wrong with the body.


def _first(errors: BaseExceptionGroup[SlipstreamError]) -> SlipstreamError:
    """One of the errors; they are of one cause."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
