"""POST /classify and /v1/classify: scores of sequence classifiers, such as reward models.

SGLang's form, `text` or `input_ids`, gives raw scores; vLLM's, `input` or `messages`, labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Request, Response
from msgspec import Raw

from engine.protocol import ClassifyRequest
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.native.generate_call import prompt_room
from rollout.http.openapi import takes
from rollout.http.scoring.bodies import ClassifyBody, ClassifyChatBody
from rollout.http.scoring.call import require, run_prompts
from rollout.http.scoring.inputs import parse_either, prompts_of_either
from rollout.http.scoring.native_form import native_reply, parse_native
from rollout.http.scoring.prompts import encoded, places
from rollout.http.scoring.vectors import probabilities
from rollout.http.services import Services
from rollout.requests.json_types import decode_json


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def classify(request: Request) -> Response:
        return await answer(request, run(await whole_body(request)))

    async def run(data: bytes) -> Response:
        if await services.generator.parsed(_is_labelled, data):
            return await _labels(services, data)
        return await _scores(services, data)

    reads = takes((ClassifyRequest, ClassifyBody, ClassifyChatBody), batches=True)
    routes.add_api_route("/classify", classify, methods=["POST", "PUT"], openapi_extra=reads)
    routes.add_api_route("/v1/classify", classify, methods=["POST"], openapi_extra=reads)
    return routes


def _is_labelled(data: bytes) -> bool:
    """Whether a body is of vLLM's form."""
    found: dict[str, Raw] = decode_json(data, dict[str, Raw])
    return not {"text", "input_ids"} & found.keys() and bool({"input", "messages"} & found.keys())


async def _scores(services: Services, data: bytes) -> Response:
    room = prompt_room(services.engine.facts, services.tokenizer)
    call, _ = await services.generator.parsed(
        parse_native, data, room, ClassifyRequest, "classify", "/classify"
    )
    await services.generator.finish(samples := await services.generator.samples(call))
    found = [native_reply(services, sample, sample.output.scores) for sample in samples]
    return json_response(found if call.batch else found[0])


async def _labels(services: Services, data: bytes) -> Response:
    body = await services.generator.parsed(
        parse_either, data, ClassifyBody, ClassifyChatBody, services.prompts
    )
    require(services, body, "classify")
    prompts, field = await prompts_of_either(services, body, len(data))
    call = await run_prompts(
        services,
        body,
        await encoded(services, prompts, body, field=field),
        task="classify",
        prefix="classify",
        places=places(field, len(prompts)),
    )
    labels, data_ = services.engine.facts.labels, []
    for index, (logits, version) in enumerate(zip(call.values(), call.versions(), strict=True)):
        best = int(np.argmax(logits))
        entry: dict[str, Any] = {
            "index": index,
            "label": labels[best] if best < len(labels) else None,
            "probs": probabilities(logits) if body.use_activation else logits.tolist(),
            "num_classes": len(logits),
            "weight_version": version,
        }
        data_.append(entry)
    return json_response(call.reply(data_))
