"""POST /generate: the native dialect, alone, in batches and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Request, Response

from engine.protocol import GenerateRequest, GenerateResponse
from rollout.http.edge.errors import JsonResponse, error_body, json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import DONE, EventForm, EventStream, answer, frame
from rollout.http.native.generate_call import parse_call, prompt_room
from rollout.http.native.increments import IncrementWriter
from rollout.http.native.prepared_reply import PIECE, PreparedReply
from rollout.http.native.sample import Sample
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.respond import to_wire


def router(services: Services) -> Routes:
    """The route of the native dialect."""
    routes = Routes()

    async def generate(request: Request) -> Response:
        return await answer(request, reply_to_generate(services, await whole_body(request)))

    routes.add_api_route(
        "/generate",
        generate,
        methods=["POST", "PUT"],
        openapi_extra=takes(GenerateRequest, batches=True),
    )
    return routes


async def reply_to_generate(services: Services, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    room = prompt_room(services.engine.facts, services.tokenizer)
    draw_id = services.identity.draw_id
    call = await services.generator.parsed(parse_call, data, room, draw_id)
    samples = await services.generator.samples(call)
    if call.stream:
        return _stream(services, samples)
    return await _reply(services, samples)


async def _reply(services: Services, samples: Sequence[Sample]) -> Response:
    alone = samples[0].index is None
    prepared = {id(s): PreparedReply(s) for s in samples if s.come_in_pieces(PIECE)}
    if alone and not prepared:
        await services.generator.finish(samples)
        return JsonResponse(await services.generator.written(_whole, samples[0], services))
    replies = await _written(services, samples, prepared)
    return json_response(replies[0] if alone else replies)


async def _written(
    services: Services, samples: Sequence[Sample], prepared: Mapping[int, PreparedReply]
) -> list[msgspec.Raw]:
    # Encoded as each finishes: a large batch would hold up the event loop at its end.
    replies: dict[int, msgspec.Raw] = {}
    position = {id(sample): number for number, sample in enumerate(samples)}
    async with aclosing(services.generator.run_together(samples)) as together:
        async for pairs in together:
            for sample, delta in pairs:
                written = prepared.get(id(sample))
                if written is not None:
                    written.add(delta)
                if delta.finished and written is not None:
                    reply = _encoded(written.object(), services)
                elif delta.finished:
                    reply = await services.generator.written(_whole, sample, services)
                else:
                    continue
                replies[position[id(sample)]] = msgspec.Raw(reply)
    return [replies[number] for number in range(len(samples))]


def _stream(services: Services, samples: Sequence[Sample]) -> Response:
    if services.config.incremental_streaming_output:
        return EventStream(_increments(services, samples), _WRITTEN)
    for sample in samples:
        sample.keep_replies()
    return EventStream(_replies(services, samples))


async def _increments(services: Services, samples: Sequence[Sample]) -> AsyncGenerator[bytes, None]:
    """Frames, those that came together in one piece."""
    writers = {id(sample): IncrementWriter(sample, services.labels) for sample in samples}
    async with aclosing(services.generator.run_together(samples)) as together:
        async for pairs in together:
            yield b"".join([writers[id(sample)].frame(delta) for sample, delta in pairs])


async def _replies(
    services: Services, samples: Sequence[Sample]
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(services.generator.run(samples)) as outputs:
        async for sample, _ in outputs:
            yield _object(services, sample.partial())


def _as_written(value: bytes | dict[str, Any]) -> bytes:
    return value if isinstance(value, bytes) else frame(value)


_WRITTEN = EventForm(frame=_as_written, error=error_body, end=DONE)
"""A stream whose source yields frames; errors are objects."""


def _whole(sample: Sample, services: Services) -> bytes:
    return _encoded(to_wire(sample.response()), services)


def _encoded(reply: dict[str, Any], services: Services) -> bytes:
    services.labels.relabel(reply["meta_info"])
    return msgspec.json.encode(reply)


def _object(services: Services, response: GenerateResponse) -> dict[str, Any]:
    found = to_wire(response)
    services.labels.relabel(found["meta_info"])
    return found
