"""POST /generate: the native dialect, alone, in batches and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.protocol import GenerateRequest, GenerateResponse
from rollout.http.edge.errors import json_response
from rollout.http.edge.sse import EventStream, answer
from rollout.http.native.generate_call import parse_call, prompt_room
from rollout.http.native.sample import Sample
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.respond import to_wire


def router(services: Services) -> APIRouter:
    """The route of the native dialect."""
    routes = APIRouter()

    async def generate(request: Request) -> Response:
        return await answer(request, run(await request.body()))

    async def run(data: bytes) -> Response:
        room = prompt_room(services.engine.facts, services.tokenizer)
        call = await services.generator.parsed(parse_call, data, room)
        samples = await services.generator.samples(call)
        if call.stream:
            return EventStream(_frames(services, samples))
        return await _reply(services, samples)

    routes.add_api_route(
        "/generate",
        generate,
        methods=["POST", "PUT"],
        openapi_extra=takes(GenerateRequest, batches=True),
    )
    return routes


async def _reply(services: Services, samples: Sequence[Sample]) -> Response:
    # Encoded as each finishes: a large batch would hold up the event loop at its end.
    replies: dict[int, msgspec.Raw] = {}
    position = {id(sample): number for number, sample in enumerate(samples)}
    async with aclosing(services.generator.run(samples)) as outputs:
        async for sample, delta in outputs:
            if delta.finished:
                reply = await services.generator.written(_whole, sample, services)
                replies[position[id(sample)]] = msgspec.Raw(reply)
    found = [replies[number] for number in range(len(samples))]
    return json_response(found if samples[0].index is not None else found[0])


async def _frames(
    services: Services, samples: Sequence[Sample]
) -> AsyncGenerator[dict[str, Any], None]:
    incremental = services.config.incremental_streaming_output
    async with aclosing(services.generator.run(samples)) as outputs:
        async for sample, delta in outputs:
            reply = sample.increment(delta) if incremental else sample.partial()
            yield _object(services, reply)


def _whole(sample: Sample, services: Services) -> bytes:
    return msgspec.json.encode(_object(services, sample.response()))


def _object(services: Services, response: GenerateResponse) -> dict[str, Any]:
    found = to_wire(response)
    services.labels.relabel(found["meta_info"])
    return found
