"""POST /v1/embeddings, as OpenAI and vLLM have it, and SGLang's POST /encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.protocol import FloatArray
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.native.generate_call import prompt_room
from rollout.http.native.long_prompts import check_long_prompt
from rollout.http.openapi import takes
from rollout.http.scoring.bodies import (
    EmbeddingBody,
    EmbeddingChatBody,
    EmbeddingOptions,
    EncodeRequest,
)
from rollout.http.scoring.call import ScoringCall, require, run_prompts
from rollout.http.scoring.inputs import parse_either, prompts_of_either
from rollout.http.scoring.native_form import native_reply, parse_native
from rollout.http.scoring.prompts import encoded, places
from rollout.http.scoring.vectors import as_base64, shaped
from rollout.http.services import Services

_INLINE_NUMBERS = 1 << 16


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def embeddings(request: Request) -> Response:
        return await answer(request, embed(services, await whole_body(request)))

    async def encode(request: Request) -> Response:
        return await answer(request, _encode(services, await whole_body(request)))

    routes.add_api_route(
        "/v1/embeddings",
        embeddings,
        methods=["POST"],
        openapi_extra=takes((EmbeddingBody, EmbeddingChatBody)),
    )
    routes.add_api_route(
        "/encode",
        encode,
        methods=["POST", "PUT"],
        openapi_extra=takes(EncodeRequest, batches=True),
    )
    return routes


async def embed(services: Services, data: bytes) -> Response:
    """The reply to one body of /v1/embeddings. Raises the typed error that it is refused or fails
    with."""
    room = prompt_room(services.engine.facts, services.tokenizer)
    check_long_prompt(data, text_bytes=room.text_bytes, num_ids=room.num_ids)
    body = await services.generator.parsed(
        parse_either, data, EmbeddingBody, EmbeddingChatBody, services.prompts
    )
    require(services, body, "embed")
    check_dimensions(services, body.dimensions)
    prompts, field = await prompts_of_either(services, body, len(data))
    call = await run_prompts(
        services,
        body,
        await encoded(services, prompts, body, field=field),
        task="embed",
        pooling=body.pooling,
        prefix="embd",
        places=places(field, len(prompts)),
    )
    vectors = call.values()
    if sum(map(len, vectors)) <= _INLINE_NUMBERS:
        return _reply(body, call, vectors)
    return await services.generator.workers.run(_reply, body, call, vectors)


def check_dimensions(services: Services, dimensions: int | None) -> None:
    """Raise InvalidRequest (`dimensions`) for more numbers than an embedding has, or none."""
    most = services.engine.facts.hidden_size
    if dimensions is not None and not 1 <= dimensions <= most:
        raise InvalidRequest(
            f"dimensions is {dimensions}; embeddings of this model have {most}: give 1 to {most}",
            field="dimensions",
        )


def _reply(body: EmbeddingOptions, call: ScoringCall, vectors: Sequence[FloatArray]) -> Response:
    normalize = body.normalize if body.use_activation is None else body.use_activation
    data: list[dict[str, Any]] = []
    for index, (vector, version) in enumerate(zip(vectors, call.versions(), strict=True)):
        found = shaped(vector, dimensions=body.dimensions, normalize=normalize)
        written = as_base64(found) if body.encoding_format == "base64" else found.tolist()
        entry = {"object": "embedding", "index": index, "embedding": written}
        data.append({**entry, "weight_version": version})
    return json_response(call.reply(data))


async def _encode(services: Services, data: bytes) -> Response:
    room = prompt_room(services.engine.facts, services.tokenizer)
    call, options = await services.generator.parsed(
        parse_native, data, room, EncodeRequest, "embed", "/encode"
    )
    check_dimensions(services, options.dimensions)
    samples = await services.generator.samples(replace(call, pooling=options.pooling))
    await services.generator.finish(samples)
    found = []
    for sample in samples:
        vector = sample.output.embedding
        if vector is not None:
            vector = shaped(vector, dimensions=options.dimensions, normalize=options.normalize)
        found.append(native_reply(services, sample, vector))
    return json_response(found if call.batch else found[0])
